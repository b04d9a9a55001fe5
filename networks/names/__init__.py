"""Module names of each family's network in every layout: data, which checkpoints and LoRA files share.

flux: FLUX.1 and Chroma: published names and diffusers' layout
framepack: FramePack: its own layout is that of diffusers
hunyuan: HunyuanVideo and SkyReels V1: ComfyUI's and diffusers' layout
hunyuan_image: HunyuanImage-2.1: ComfyUI's and diffusers' layout
layouts: how names are written down, and renaming tensors
lumina: Lumina-Image-2.0: published names and diffusers' layout
stable_diffusion: U-Nets of Stable Diffusion: diffusers' names are ours
text_encoders: module paths of text encoders in LoRA files
wan: Wan2.1 and Wan2.2: published names and diffusers' layout
"""
