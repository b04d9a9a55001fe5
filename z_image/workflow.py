"""Z-Image in ComfyUI. Source: ComfyUI's templates of Z-Image and Z-Image-Turbo."""

from protocols.workflows import STILL_LATENT, ComfyModel, shift_continuous

Z_IMAGE_NODES = ComfyModel(
    vae="ae.safetensors",
    text_encoders=("qwen_3_4b.safetensors",),
    text_type="lumina2",
    latent=STILL_LATENT,
    patches=shift_continuous,
    weighs_words=False,  # a language model reads the brackets themselves
)
