"""A FLUX.1 ControlNet beside the transformer, in diffusers' class: its files, and what it adds to blocks.

Its residuals are added to the image tokens after the blocks, as diffusers' transformer does: each of its n
residuals serves ceil(blocks / n) consecutive blocks. It sees the control image as latents of the autoencoder.
Source: `FluxControlNetModel`, `FluxControlNetPipeline` and `FluxTransformer2DModel` of diffusers.
"""
# Letters: B batch, L image tokens, T text tokens, Z latent channels, C width

import inspect
import logging
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel
from torch import Tensor, nn

from checkpoints.dialects import LoadPlan, count, load_planned, make_wrong_kind_error
from checkpoints.model_files import find_model_folder
from checkpoints.opening import Checkpoint, list_tensor_sources, open_checkpoint
from flux.configs import FluxConfig
from flux.model import get_token_grid, pack
from flux.options import CONTROL_NET
from hunyuan_model.model import rotary_widths
from modules.errors import CheckpointError
from modules.text_files import parse_json, read_text
from protocols.loading import TensorInfo

logger = logging.getLogger(__name__)

FILES = ("config.json", "diffusion_pytorch_model*")  # files of a repository on the hub
FITTING_FILES = (
    "a folder in diffusers' layout or its safetensors file, such as InstantX/FLUX.1-dev-Controlnet-Canny"
)
CONTROL_EMBEDDER = "controlnet_x_embedder.weight"
TIMESTEPS = 1000  # diffusers' class takes 0..1


class FluxControl(nn.Module):
    """A frozen ControlNet that computes what is added after each block of a transformer."""

    def __init__(self, network: FluxControlNetModel, config: FluxConfig) -> None:
        """Wrap a ControlNet for a transformer with this `config`."""
        super().__init__()
        self.network = network
        self._blocks = config.double_blocks, config.single_blocks

    @torch.no_grad()
    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        t5: Tensor,
        pooled: Tensor | None,
        guidance: Tensor | None,
        control: Tensor,
        strength: float = 1.0,
    ) -> list[Tensor | None]:
        """Return what the frozen ControlNet adds after each block of the transformer, B L C or None.

        Args:
            noisy: Noisy latents, B Z 1 H W.
            timesteps: B, 0..1000.
            t5: States of T5, B T D.
            pooled: State of CLIP-L, B E.
            guidance: B, not scaled.
            control: Latents of the control image in model space, B Z 1 H W.
            strength: Factor of all additions.
        """
        return compute_block_residuals(
            self.network,
            self._blocks,
            noisy=noisy,
            timesteps=timesteps,
            t5=t5,
            pooled=pooled,
            guidance=guidance,
            control=control,
            strength=strength,
        )


def compute_block_residuals(
    network: FluxControlNetModel,
    blocks: tuple[int, int],
    *,
    noisy: Tensor,
    timesteps: Tensor,
    t5: Tensor,
    pooled: Tensor | None,
    guidance: Tensor | None,
    control: Tensor,
    strength: float,
) -> list[Tensor | None]:
    """Return what a ControlNet adds after each block, B L C, double blocks first; None if it adds nothing.

    Args:
        network: The ControlNet.
        blocks: Numbers of double and single blocks of the transformer.
        noisy: Noisy latents, B Z 1 H W.
        timesteps: B, 0..1000.
        t5: States of T5, B T D.
        pooled: State of CLIP-L, B E.
        guidance: B, not scaled.
        control: Latents of the control image in model space, B Z 1 H W.
        strength: Factor of all additions.
    """
    dtype = network.dtype
    device = noisy.device
    has_guidance: bool = network.config["guidance_embeds"]
    _, rows, columns = get_token_grid(noisy)
    # (image, row, column) of each image token; the network makes its rotary table from them
    positions = torch.zeros(rows, columns, 3, device=device)
    positions[..., 1] += torch.arange(rows, device=device)[:, None]
    positions[..., 2] += torch.arange(columns, device=device)[None]
    assert pooled is not None  # only Chroma has none, and its files are refused with a ControlNet
    outputs = network(
        hidden_states=pack(noisy).to(dtype),
        controlnet_cond=pack(control).to(dtype),
        conditioning_scale=strength,
        encoder_hidden_states=t5.to(dtype),
        pooled_projections=pooled.to(dtype),
        timestep=timesteps / TIMESTEPS,
        guidance=guidance if has_guidance else None,
        img_ids=positions.flatten(0, 1),
        txt_ids=torch.zeros(t5.shape[1], 3, device=device),  # text tokens are all at the origin
        return_dict=False,
    )
    residuals: list[Tensor | None] = []
    # each output serves several neighboring blocks: the ControlNet has fewer blocks
    for output, num_blocks in zip(outputs, blocks, strict=True):
        residuals += repeat_over_blocks(output, num_blocks)
    return residuals


def repeat_over_blocks(output: list[Tensor] | None, blocks: int) -> list[Tensor | None]:
    """Return the tensor to add after each block; one output serves several consecutive blocks.

    A ControlNet without blocks of a kind has no output for that kind, and nothing is added.
    """
    if not output:
        return [None] * blocks
    span = math.ceil(blocks / len(output))
    return [output[block // span] for block in range(blocks)]


def load_control_net(path: Path, config: FluxConfig, device: torch.device, dtype: torch.dtype) -> FluxControl:
    """Load a frozen ControlNet for a transformer with the dimensions `config`.

    Raises CheckpointError if the file does not fit it, or is not a ControlNet of FLUX.1 that sees latents.
    """
    network = load_network(path, config, device, dtype)
    logger.info("ControlNet: %s, frozen", path)
    return FluxControl(network, config)


def load_network(
    path: Path, config: FluxConfig, device: torch.device, dtype: torch.dtype
) -> FluxControlNetModel:
    """Load a ControlNet for a transformer; on the meta device no weights are read.

    Raises CheckpointError if the file does not fit it, or is not a ControlNet of FLUX.1 that sees latents.
    """
    with _open(path) as checkpoint:
        settings = read_control_net(path, checkpoint, config)
        plan = LoadPlan(settings, checkpoint, list_tensor_sources(checkpoint))
        return load_planned(plan, build_network, device, dtype, label=CONTROL_NET)


def build_network(settings: Mapping[str, Any]) -> FluxControlNetModel:
    """Build diffusers' ControlNet with these arguments."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # to developers: diffusers moves one of its classes
        return FluxControlNetModel(**settings)


def read_settings(path: Path, config: FluxConfig) -> dict[str, Any]:
    """Return a ControlNet's settings, from its header.

    Raises CheckpointError if it does not fit a transformer with the dimensions `config`.
    """
    with _open(path) as checkpoint:
        return read_control_net(path, checkpoint, config)


def read_control_net(path: Path, checkpoint: Checkpoint, config: FluxConfig) -> dict[str, Any]:
    """Check a ControlNet file, and return its settings from config.json or the tensors' shapes.

    Args:
        path: File or folder, for messages.
        checkpoint: The open file.
        config: Dimensions of the transformer.

    Raises:
        CheckpointError: If the file is not a ControlNet of FLUX.1 that takes latents, or does not fit the
            transformer.
    """
    names = checkpoint.tensors
    hint = next((name for name in names if name.startswith("input_hint_block.")), None)
    # reject ControlNets of other kinds
    if hint is not None:
        raise CheckpointError(
            f"{CONTROL_NET} {path} takes pixels ({hint}), as those of XLabs do, but caches contain latents "
            f"of control images.\n  Pass one that takes latents: {FITTING_FILES}.",
            path,
        )
    if CONTROL_EMBEDDER not in names or "transformer_blocks.0.attn.to_q.weight" not in names:
        raise make_wrong_kind_error(checkpoint, "a ControlNet of FLUX.1", CONTROL_NET, FITTING_FILES)
    if "controlnet_mode_embedder.weight" in names:
        raise CheckpointError(
            f"{CONTROL_NET} {path} is a Union ControlNet that needs the kind of each control image, "
            f"which datasets do not state.\n  Pass one for a single kind, or without modes: {FITTING_FILES}.",
            path,
        )
    _check_dimensions(path, names, config)
    return _read_or_infer_settings(path, checkpoint, config)


def _check_dimensions(path: Path, tensors: Mapping[str, TensorInfo], config: FluxConfig) -> None:
    """Raise CheckpointError if a ControlNet's dimensions are not those of the transformer."""

    def count_inputs(layer: str) -> int:
        return tensors[layer].shape[1] if layer in tensors else 0

    # dimension -> its size in the ControlNet and in the transformer
    sizes = {
        "width": (tensors[CONTROL_EMBEDDER].shape[0], config.dim),
        "token width": (tensors[CONTROL_EMBEDDER].shape[1], config.token_dim),
        "text": (count_inputs("context_embedder.weight"), config.text_dim),
        "pooled text": (count_inputs("time_text_embed.text_embedder.linear_1.weight"), config.pooled_dim),
    }
    misfits = [
        f"{dimension} {size} and {needed}" for dimension, (size, needed) in sizes.items() if size != needed
    ]
    if misfits:
        raise CheckpointError(
            f"{CONTROL_NET} {path} does not fit the transformer: {', '.join(misfits)}. ControlNets of FLUX.1 "
            "fit dev and schnell, not Chroma",
            path,
        )


def make_control_net_settings(config: FluxConfig, double_blocks: int, single_blocks: int) -> dict[str, Any]:
    """Return diffusers' settings for a ControlNet with this many blocks of a FLUX.1 transformer."""
    head = config.dim // config.num_heads
    return {
        "in_channels": config.token_dim,
        "num_layers": double_blocks,
        "num_single_layers": single_blocks,
        "attention_head_dim": head,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.text_dim,
        "pooled_projection_dim": config.pooled_dim,
        "guidance_embeds": config.has_guidance,
        "axes_dims_rope": list(rotary_widths(head)),
    }


def _open(path: Path) -> Checkpoint:
    """Open a checkpoint file, a diffusers folder, or a folder downloaded from a Hub repository."""
    return open_checkpoint(path if path.exists() else find_model_folder(CONTROL_NET, path.as_posix(), FILES))


def _read_config(path: Path, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the arguments of FluxControlNetModel from a ControlNet's config.json."""
    # None if the file is missing or describes another model.
    weights = checkpoint.path
    config_path = weights / "config.json" if weights.is_dir() else weights.with_name("config.json")
    if not config_path.is_file():
        return None
    try:
        settings = parse_json(read_text(config_path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config_path} cannot be read ({error}). Copy it again.", path) from error
    if not isinstance(settings, Mapping) or settings.get("_class_name") != FluxControlNetModel.__name__:
        return None
    # other settings, such as the version of diffusers, are not arguments of the class
    parameters = inspect.signature(FluxControlNetModel.__init__).parameters
    return {name: value for name, value in settings.items() if name in parameters}


def _read_or_infer_settings(path: Path, checkpoint: Checkpoint, config: FluxConfig) -> dict[str, Any]:
    """Return a ControlNet's settings from its config.json; without one, infer them from its tensors."""
    names = checkpoint.tensors
    settings = _read_config(path, checkpoint)
    if settings is not None:
        return settings
    (head_width,) = names["transformer_blocks.0.attn.norm_q.weight"].shape
    transformer_head = config.dim // config.num_heads
    if head_width != transformer_head:
        raise CheckpointError(
            f"{CONTROL_NET} {path}: its heads have width {head_width}, but those of the transformer have "
            f"{transformer_head}. Pass the folder with its config.json",
            path,
        )
    double_blocks = count(names, r"transformer_blocks\.\d+")
    single_blocks = count(names, r"single_transformer_blocks\.\d+")
    # `_check_dimensions` has shown that the other dimensions are the transformer's
    settings = make_control_net_settings(config, double_blocks, single_blocks)
    has_guidance = "time_text_embed.guidance_embedder.linear_1.weight" in names
    return {**settings, "guidance_embeds": has_guidance}
