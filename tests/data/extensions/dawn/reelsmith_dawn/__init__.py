"""A family: Wan under another name, whose LoRA files say so."""
