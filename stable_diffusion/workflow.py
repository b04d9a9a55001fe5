"""Stable Diffusion 1.x, 2.x and XL in ComfyUI: one checkpoint has all networks."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from protocols.requests import Prepared
from protocols.workflows import ComfyModel, ComfyNode, list_no_patches

# samplers of `sampling_options` without "k_" -> samplers of ComfyUI; the others have no counterpart there
SAMPLERS: Mapping[str, str] = {
    "ddim": "ddim",
    "lms": "lms",
    "euler": "euler",
    "euler_a": "euler_ancestral",
    "heun": "heun",
    "dpm_2": "dpm_2",
    "dpm_2_a": "dpm_2_ancestral",
    "dpmsolver++": "dpmpp_2m",
}


def describe_checkpoint(
    vae: str, clip_skip: int | None, predicts_velocity: bool, zero_terminal_snr: bool
) -> ComfyModel:
    """Describe how ComfyUI must run a checkpoint.

    Args:
        vae: File name of a separate VAE; "" for the checkpoint's VAE.
        clip_skip: Text encoder layer to take states from, counted from the end; None for the default.
        predicts_velocity: Whether the U-Net predicts v.
        zero_terminal_snr: Whether the last timestep is pure noise.
    """
    sampling = {"sampling": "v_prediction", "zsnr": zero_terminal_snr}
    skip = () if clip_skip is None else (ComfyNode("CLIPSetLastLayer", {"stop_at_clip_layer": -clip_skip}),)
    return ComfyModel(
        vae=vae,
        patches=partial(_patch_sampling, sampling) if predicts_velocity else list_no_patches,
        text_patches=skip,
        samplers={**SAMPLERS, **{f"k_{name}": sampler for name, sampler in SAMPLERS.items()}},
        scheduler="normal",
        schedulers={"ddim": "ddim_uniform"},
        is_weighted=True,
    )


def _patch_sampling(sampling: Mapping[str, Any], prepared: Prepared) -> tuple[ComfyNode, ...]:
    return (ComfyNode("ModelSamplingDiscrete", sampling),)
