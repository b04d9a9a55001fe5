"""FLUX.1 Kontext: FLUX.1 dev that edits an image, with the commands and caches of musubi-tuner."""
