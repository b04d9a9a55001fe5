"""Module names of each family's network in every layout: data, which checkpoints and LoRA files share.

image: FLUX.1, Chroma, HunyuanImage-2.1, Lumina: published and diffusers' layout
layouts: how names are written down, and renaming tensors
numbering: order in which known trainers number a LoRA's modules
stable_diffusion: U-Nets, whose names in diffusers are ours; text encoders
video: Wan, HunyuanVideo, FramePack, LTX-2: published, ComfyUI's and diffusers' layout
"""
