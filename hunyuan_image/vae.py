"""The VAE of HunyuanImage-2.1: pictures to latents and back, 32 pixels to one along each side.

Latents are those of cache files: not multiplied by the scaling factor. A picture is a clip of one frame.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from encoders.autoencoder import ATTENTION, DIFFUSERS, PictureVae, as_matrices
from hunyuan_image.configs import LATENT, STRIDE
from hunyuan_image.vae_blocks import (
    FOLDED,
    GROUPS,
    HunyuanImageVaeConfig,
    HunyuanImageVaeDecoder,
    HunyuanImageVaeEncoder,
    compute_in_rows,
)
from modules.checkpoints.dialects import (
    LoadPlan,
    count,
    load_planned,
    other_kind,
    rename_sources,
    shapes_of,
    translate_name,
)
from modules.checkpoints.opening import Checkpoint, open_checkpoint, plain_sources
from modules.contract.loading import TensorSource
from modules.devices import dtype_name
from modules.errors import CheckpointError
from modules.layers.convolution import lay_out

LEVELS = 6
RELEASE = (
    "hunyuan_image_2.1_vae_fp16.safetensors, vae/vae_2_1/pytorch_model.ckpt of tencent/HunyuanImage-2.1 or a "
    "diffusers vae folder"
)
WHAT = "the VAE of HunyuanImage-2.1"
_LAYER = re.compile(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(.+)")


def read_vae(checkpoint: Checkpoint) -> LoadPlan[HunyuanImageVaeConfig]:
    """Plan how to load the VAE: the released file or diffusers' layout.

    Raises CheckpointError for another file.
    """
    checkpoint = checkpoint.without_prefix("module.", "_orig_mod.", "first_stage_model.", "vae.")
    sources = plain_sources(checkpoint)
    if "encoder.down_blocks.0.conv1.weight" in sources:
        sources = rename_sources(sources, NamesByLevel(sources))
    if "encoder.down.0.downsample.conv.weight" not in sources or "decoder.conv_in.weight" not in sources:
        raise other_kind(checkpoint, WHAT, "--vae", RELEASE)
    as_matrices(sources, ATTENTION)
    return LoadPlan(_read_config(checkpoint, sources), checkpoint, sources)


def _read_config(checkpoint: Checkpoint, sources: Mapping[str, TensorSource]) -> HunyuanImageVaeConfig:
    shape = shapes_of(checkpoint, sources, other_kind(checkpoint, WHAT, "--vae", RELEASE))
    levels = {count(sources, rf"{part}\.\d+") for part in (r"encoder\.down", r"decoder\.up")}
    if levels != {LEVELS}:
        raise _wrong(checkpoint, f"it has {' and '.join(map(str, levels))} levels, the model has {LEVELS}")
    widths = tuple(shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(LEVELS))
    channels = shape("decoder.conv_in.weight")[1]
    if channels != LATENT.channels:
        raise _wrong(checkpoint, f"it has {channels} latent channels, the model has {LATENT.channels}")
    uneven = [width for width in widths if width % GROUPS]
    pairs = zip(widths, widths[1:], strict=False)
    if uneven or widths[-1] % (2 * channels) or any((FOLDED * near) % far for near, far in pairs):
        raise _wrong(checkpoint, f"its levels have {', '.join(map(str, widths))} channels, which do not fit")
    return HunyuanImageVaeConfig(
        channels,
        widths,
        count(sources, r"encoder\.down\.0\.block\.\d+"),
        count(sources, r"decoder\.up\.0\.block\.\d+"),
    )


def _wrong(checkpoint: Checkpoint, why: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path} is not {WHAT}: {why}.\n  Give {RELEASE} to --vae.", checkpoint.path
    )


class NamesByLevel:
    """Turn diffusers' names into the published ones; a level ends with the layer that changes resolution."""

    def __init__(self, names: Iterable[str]) -> None:
        found = [match for match in map(_LAYER.fullmatch, names) if match]
        self._changes = {
            part: sorted({int(match[3]) for match in found if match[1] == part and match[4] == "conv.weight"})
            for part in ("encoder", "decoder")
        }

    def __call__(self, name: str) -> str:
        layer = _LAYER.fullmatch(name)
        if layer is None:
            return translate_name(name, DIFFUSERS)
        part, way, place, rest = layer[1], layer[2], int(layer[3]), layer[4]
        changes = self._changes[part]
        level = sum(change < place for change in changes)
        if place in changes:
            return f"{part}.{way}.{level}.{way}sample.{rest}"
        first = changes[level - 1] + 1 if level else 0
        return f"{part}.{way}.{level}.block.{place - first}.{rest}"


logger = logging.getLogger(__name__)


class HunyuanImageVae(PictureVae):
    """Encoder and decoder. Build it on the meta device and load a checkpoint with `load_vae`."""

    stride = STRIDE
    limits = (-30.0, 20.0)

    def __init__(self, config: HunyuanImageVaeConfig, tile: int | None = None) -> None:
        super().__init__(tile)
        self.encoder = HunyuanImageVaeEncoder(config)
        self.decoder = HunyuanImageVaeDecoder(config)


def load_vae(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    chunk_size: int | None = None,
    tile: int | None = None,
) -> HunyuanImageVae:
    """Load the VAE from any of its file layouts.

    chunk_size: rows that a convolution computes at a time; it changes memory, not results. tile: edge of a
    tile in pixels. Raises CheckpointError if the file is damaged or holds another model.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_vae(checkpoint)
        vae = load_planned(plan, lambda config: HunyuanImageVae(config, tile), device, dtype, WHAT)
    lay_out(vae, device)
    if chunk_size is not None:
        compute_in_rows(vae, chunk_size)
    logger.info("VAE: %s, computing in %s", path, dtype_name(dtype))
    return vae
