"""From a folder of clips or images to a trained LoRA: the files that describe it, and its commands."""
