"""Qwen-Image in ComfyUI, text to image. Source: ComfyUI's template of Qwen-Image."""

from protocols.workflows import STILL_LATENT, ComfyModel, shift_continuous

TEXT_TO_IMAGE = ComfyModel(
    vae="qwen_image_vae.safetensors",
    text_encoders=("qwen_2.5_vl_7b.safetensors",),
    text_type="qwen_image",
    latent=STILL_LATENT,
    patches=shift_continuous,
    weighs_words=False,  # a language model reads the brackets themselves
)
