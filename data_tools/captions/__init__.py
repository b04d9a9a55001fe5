"""Write captions with a vision-language model, here or on a server, and edit captions."""
