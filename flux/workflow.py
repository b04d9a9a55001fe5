"""FLUX.1 in ComfyUI. Source: ComfyUI's templates of FLUX.1 dev and schnell with separate files."""

from protocols.workflows import STILL_LATENT, ComfyModel, shift_flux

FLUX = ComfyModel(
    vae="ae.safetensors",
    text_encoders=("clip_l.safetensors", "t5xxl_fp16.safetensors"),
    text_type="flux",
    latent=STILL_LATENT,
    patches=shift_flux,
    guidance="FluxGuidance",
)
