"""Text encoders and autoencoders that several families use; clip_l.py is the simplest example."""
