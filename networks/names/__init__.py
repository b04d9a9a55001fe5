"""Module names of each family's network in every layout: data, which checkpoints and LoRA files share."""
