"""Linear layers with weights in 8 bits."""
