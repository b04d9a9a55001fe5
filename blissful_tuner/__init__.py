"""Tools and options around generation: guidance, previews, prompts, step caches, metadata."""
