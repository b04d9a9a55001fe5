"""From a folder of clips or pictures to a trained LoRA: the files that describe it, and its commands."""
