"""The files in the folder of --model, and what they say about the network."""
