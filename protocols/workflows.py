"""How a family describes the ComfyUI nodes that generate its images and videos.

Nodes, their inputs, samplers and schedulers have the names of ComfyUI itself, without third-party packages.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from protocols.requests import Prepared

# our solvers -> samplers of ComfyUI
SAMPLERS: Mapping[str, str] = MappingProxyType(
    {
        "euler": "euler",
        "euler-trained": "euler",
        "euler-terminal": "euler",
        "euler-tenth": "euler",
        "euler-thousandth": "euler",
        "unipc": "uni_pc_bh2",
        "unipc-bh1": "uni_pc",
        "dpm++": "dpmpp_2m",
        "dpm++sde": "dpmpp_2m_sde",
        "lcm": "lcm",
    }
)
STILL_LATENT, CLIP_LATENT = "EmptySD3LatentImage", "EmptyHunyuanLatentVideo"


@dataclass(frozen=True)
class ComfyNode:
    """A ComfyUI node that changes a model or its text encoders, with its other inputs."""

    name: str  # name of its class
    inputs: Mapping[str, Any]


def list_no_patches(prepared: Prepared) -> Sequence[ComfyNode]:
    """Return no nodes: the noise levels are those that ComfyUI gives the model."""
    return ()


def shift_continuous(prepared: Prepared) -> Sequence[ComfyNode]:
    """Return the node that shifts noise levels of models that take timesteps from 0 to 1."""
    return (ComfyNode("ModelSamplingAuraFlow", {"shift": prepared.flow_shift}),)


def shift_thousand(prepared: Prepared) -> Sequence[ComfyNode]:
    """Return the node that shifts noise levels of models that take timesteps from 0 to 1000."""
    return (ComfyNode("ModelSamplingSD3", {"shift": prepared.flow_shift}),)


def shift_flux(prepared: Prepared) -> Sequence[ComfyNode]:
    """Return FLUX's node, which shifts noise levels by one value for small and another for large images.

    Both values are the request's shift, so the image size has no effect.
    """
    shift = math.log(prepared.flow_shift)
    sides = {"width": prepared.width, "height": prepared.height}
    return (ComfyNode("ModelSamplingFlux", {"max_shift": shift, "base_shift": shift, **sides}),)


@dataclass(frozen=True)
class ComfyModel:
    """Nodes and settings with which ComfyUI loads and runs a model; files are named as for ComfyUI."""

    vae: str = ""  # "": the checkpoint has it
    text_encoders: tuple[str, ...] = ()  # (): the checkpoint has them
    text_type: str = ""  # type that their loader is given
    latent: str = "EmptyLatentImage"  # node that creates the initial latents
    has_length: bool = False  # whether this node takes a number of frames
    patches: Callable[[Prepared], Sequence[ComfyNode]] = list_no_patches  # of the model, in order
    text_patches: tuple[ComfyNode, ...] = ()
    guidance: str = ""  # node of the embedded guidance; "": the model has none
    samplers: Mapping[str, str] = field(default_factory=lambda: SAMPLERS)
    scheduler: str = "simple"
    schedulers: Mapping[str, str] = field(default_factory=dict)  # by sampler, where they differ
    # whether parentheses in prompts weight words there; `is_weighted`: samples read them in the same way
    weighs_words: bool = True
    is_weighted: bool = False
