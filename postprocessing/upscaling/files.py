"""Read upscalers from files: SwinIR, RRDBNet in three generations of names, Real-ESRGAN's compact nets."""

import re
from collections.abc import Callable, Collection, Container, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch

from checkpoints.dialects import (
    LoadPlan,
    Names,
    count,
    load_planned,
    make_shape_reader,
    make_wrong_kind_error,
    rename_sources,
    translate_name,
)
from checkpoints.opening import Checkpoint, list_tensor_sources, open_checkpoint
from modules.errors import CheckpointError
from modules.layers.convolution import set_memory_format
from postprocessing.upscaling.rrdb import COLOURS, CompactConfig, CompactNet, RrdbConfig, RRDBNet
from postprocessing.upscaling.swinir import SwinIR, SwinirConfig

MODEL_OPTION = "--model"
RELEASED_FILES = "a SwinIR, ESRGAN, BSRGAN or Real-ESRGAN file (.pth or .safetensors)"
# prefixes of all tensor names, which depend on the program that saved the file
PREFIXES = ("module.", "params_ema.", "params.", "state_dict.", "module.", "netG_A.", "netG.", "net_g.")
META = torch.device("meta")
Config = SwinirConfig | RrdbConfig | CompactConfig
Network = SwinIR | RRDBNet | CompactNet

_DENSE = r"\.RDB(\d+)\.conv(\w+?)"
OLD_NAMES: Names = (
    (r"model\.0\.(\w+)", r"conv_first.\1"),
    (rf"model\.1\.sub\.(\d+){_DENSE}(?:\.0)?\.(\w+)", r"body.\1.rdb\2.conv\3.\4"),
    (r"model\.1\.sub\.\d+\.(\w+)", r"conv_body.\1"),
)
MIDDLE_NAMES: Names = (
    (rf"RRDB_trunk\.(\d+){_DENSE}\.(\w+)", r"body.\1.rdb\2.conv\3.\4"),
    (r"trunk_conv\.(\w+)", r"conv_body.\1"),
    (r"upconv(\d+)\.(\w+)", r"conv_up\1.\2"),
    (r"HRconv\.(\w+)", r"conv_hr.\1"),
)
SWINIR_NAME = "layers.0.residual_group.blocks.0.attn.relative_position_bias_table"
BUFFERS = ("*.attn_mask", "*.relative_position_index")  # of SwinIR; computed here

HAT_NAME = "layers.0.residual_group.overlap_attn.relative_position_bias_table"  # HAT only


@dataclass(frozen=True)
class UpscalerKind:
    """An upscaling architecture: how its network is built and run."""

    name: str
    mode: str  # value of --mode
    build: Callable[[Any], Network]
    repeats_edge: bool  # how images are padded to its step: as in the original tools


SWINIR = UpscalerKind("SwinIR", "swinir", SwinIR, repeats_edge=True)
COMPACT = UpscalerKind("compact Real-ESRGAN", "esrgan", CompactNet, repeats_edge=False)
RRDB = UpscalerKind("ESRGAN", "esrgan", RRDBNet, repeats_edge=False)


@dataclass(frozen=True)
class Upscaler:
    """A loaded upscaling network with its kind and configuration."""

    kind: UpscalerKind
    config: Config
    network: Network


def check_file(path: Path) -> tuple[UpscalerKind, Config]:
    """Return the kind and the configuration of an upscaler file, from its header.

    Raises:
        CheckpointError: If the file is not an upscaler.
    """
    upscaler = load_upscaler(path, META, torch.float32)
    return upscaler.kind, upscaler.config


def load_upscaler(path: Path, device: torch.device, dtype: torch.dtype) -> Upscaler:
    """Load an upscaler; its kind and dimensions follow from the names and shapes of its tensors.

    Norms and attention biases stay in float32.

    Raises:
        CheckpointError: If the file is not an upscaler.
    """
    with open_checkpoint(path) as checkpoint:
        checkpoint = checkpoint.without_prefix(*PREFIXES)
        kind, make_plan = _find_kind(checkpoint.tensors)
        plan = make_plan(checkpoint)

        def select_tensor_dtype(name: str, _: torch.dtype) -> torch.dtype:
            """Return the dtype to load a tensor in: float32 for norms and attention biases."""
            return torch.float32 if "norm" in name or name.endswith("_bias_table") else dtype

        network = load_planned(plan, kind.build, device=device, dtype=select_tensor_dtype, label=MODEL_OPTION)
    if device != META:  # tensors on the meta device have no values to rearrange
        set_memory_format(network, device)
    return Upscaler(kind, plan.config, network)


def _find_kind(names: Container[str]) -> tuple[UpscalerKind, Callable[[Checkpoint], LoadPlan[Any]]]:
    """Return the kind of upscaler that has these tensor names, and the function that reads its dimensions."""
    # HAT has SwinIR's names too, and is not supported
    if SWINIR_NAME in names and HAT_NAME not in names:
        return SWINIR, _read_swinir
    if "body.0.weight" in names:
        return COMPACT, _read_compact
    return RRDB, _read_rrdb  # raises CheckpointError for other files


def _read_rrdb(checkpoint: Checkpoint) -> LoadPlan[RrdbConfig]:
    """Plan the loading of an ESRGAN or Real-ESRGAN; tensor names differ between releases."""
    # Networks for small factors take a pixel-unshuffled image: more channels at a smaller size.
    table = _list_rrdb_names(checkpoint)
    sources = rename_sources(list_tensor_sources(checkpoint), lambda name: translate_name(name, table))
    shape = _Shapes(checkpoint, make_shape_reader(checkpoint, sources))
    features, channels, *_ = shape.of("conv_first.weight", 4)
    shape.expect("conv_last.weight", 4, axis=0, size=COLOURS)
    num_doublings = 0
    while f"conv_up{num_doublings + 1}.weight" in sources:
        num_doublings += 1
    # pixel unshuffle by r multiplies the color channels by r * r
    unshuffle = isqrt(channels // COLOURS)
    factors = [2**power for power in range(num_doublings + 1)]
    if channels != COLOURS * unshuffle**2 or unshuffle not in factors:
        raise shape.error(
            f"its first layer requires {channels} channels for a network that makes images "
            f"{2**num_doublings} times larger"
        )
    config = RrdbConfig(
        features=features,
        growth=shape.of("body.0.rdb1.conv1.weight", 4)[0],
        blocks=count(sources, r"body\.\d+"),
        doublings=num_doublings,
        unshuffle=unshuffle,
        has_shortcuts="body.0.rdb1.conv1x1.weight" in sources,
    )
    return LoadPlan(config, checkpoint, sources)


def _list_rrdb_names(checkpoint: Checkpoint) -> Names:
    """Return pairs (regular expression, replacement) that convert the tensor names of an ESRGAN file to ours.

    Files of three generations have different names: the oldest ones are numbered by nn.Sequential.
    """
    names = checkpoint.tensors
    if "model.1.sub.0.RDB1.conv1.0.weight" in names:
        # The patterns of the layers after the blocks, in the oldest files: `model.N` of an nn.Sequential.
        layers = (re.fullmatch(r"model\.(\d{1,3})\.[^.]*", name) for name in names)
        last = max((int(layer[1]) for layer in layers if layer), default=0)
        num_doublings = max(last - 4, 0) // 3
        patterns = [(rf"model\.{3 * up}\.(\w+)", rf"conv_up{up}.\1") for up in range(1, num_doublings + 1)]
        patterns.append((rf"model\.{3 * num_doublings + 2}\.(\w+)", r"conv_hr.\1"))
        patterns.append((rf"model\.{3 * num_doublings + 4}\.(\w+)", r"conv_last.\1"))
        return (*OLD_NAMES, *tuple(patterns))
    if "RRDB_trunk.0.RDB1.conv1.weight" in names:
        return MIDDLE_NAMES
    if "body.0.rdb1.conv1.weight" not in names:
        raise make_wrong_kind_error(checkpoint, "an upscaler", MODEL_OPTION, RELEASED_FILES)
    return ()


def _read_compact(checkpoint: Checkpoint) -> LoadPlan[CompactConfig]:
    """Plan the loading of a compact upscaler, which alternates convolutions and PReLUs."""
    sources = list_tensor_sources(checkpoint)
    shape = _Shapes(checkpoint, make_shape_reader(checkpoint, sources))
    shape.expect("body.0.weight", 4, axis=1, size=COLOURS)
    layers = count(sources, r"body\.\d+")
    if layers < 5 or layers % 2 == 0:
        raise shape.error(f"it has {layers} layers, not convolutions and PReLUs in turns")
    shape.of("body.1.weight", 1)
    factor = _read_factor(shape, f"body.{layers - 1}.weight", COLOURS)
    features = shape.of("body.0.weight", 4)[0]
    config = CompactConfig(features, (layers - 3) // 2, factor)
    return LoadPlan(config, checkpoint, sources)


def _read_swinir(checkpoint: Checkpoint) -> LoadPlan[SwinirConfig]:
    """Plan the loading of a SwinIR; its configuration is read from tensor shapes."""
    sources = list_tensor_sources(checkpoint)
    shape = _Shapes(checkpoint, make_shape_reader(checkpoint, sources))
    dim, channels, *_ = shape.of("conv_first.weight", 4)
    if channels != COLOURS:
        raise shape.error(f"it is for images with {channels} channels, such as grayscale")
    layers = range(count(sources, r"layers\.\d+"))
    heads = tuple(
        shape.of(f"layers.{layer}.residual_group.blocks.0.attn.relative_position_bias_table", 2)[1]
        for layer in layers
    )
    window = _read_window(shape, dim, heads)
    end = _read_swinir_end(shape, sources)
    depths = tuple(count(sources, rf"layers\.{layer}\.residual_group\.blocks\.\d+") for layer in layers)
    config = SwinirConfig(
        dim=dim,
        heads=heads,
        depths=depths,
        window=window,
        hidden=shape.of("layers.0.residual_group.blocks.0.mlp.fc1.weight", 2)[0],
        # three convolutions form a sequence, whose names contain an index
        convolutions=1 if "conv_after_body.weight" in sources else 3,
        upsampler=end.upsampler,
        upsampling_factors=tuple(end.upsampling_factors),
        features=end.features,
        pixel_range=255.0 if window == 7 else 1.0,  # only the JPEG models have windows of 7
    )
    return LoadPlan(config, checkpoint, sources, ignore=BUFFERS)


def _read_window(shape: "_Shapes", dim: int, heads: Sequence[int]) -> int:
    """Return the side of the windows, from the shape of the attention bias table."""
    num_distances = shape.of(SWINIR_NAME, 2)[0]
    side = isqrt(num_distances)
    if side**2 != num_distances or side % 2 == 0 or side < 3 or any(dim % number for number in heads):
        raise shape.error(f"{dim} channels, {heads} heads and {num_distances} distances do not go together")
    return (side + 1) // 2


@dataclass(frozen=True)
class _SwinirEnd:
    """How a SwinIR upsamples after its last block."""

    upsampler: str  # their kind
    upsampling_factors: Sequence[int] = ()  # factor of each enlargement
    features: int = 0  # channels during upsampling


def _read_swinir_end(shape: "_Shapes", sources: Collection[str]) -> _SwinirEnd:
    """Return how a SwinIR upsamples, from the names of the layers after its last block."""
    if "conv_before_upsample.0.weight" in sources:
        features = shape.of("conv_before_upsample.0.weight", 4)[0]
        shape.expect("conv_last.weight", 4, axis=0, size=COLOURS)
        if "conv_up1.weight" in sources:
            return _SwinirEnd("nearest+conv", [2] * count(sources, r"conv_up\d+"), features)
        # the digits are layer numbers: pixel shuffles between the convolutions have no weights
        conv_names = [name for name in sources if name.startswith("upsample.") and name.endswith(".weight")]
        layers = sorted(int(name.split(".")[1]) for name in conv_names)
        upsampling_factors = [_read_factor(shape, f"upsample.{layer}.weight", features) for layer in layers]
        return _SwinirEnd("pixelshuffle", upsampling_factors, features)
    if "upsample.0.weight" in sources:
        return _SwinirEnd("pixelshuffledirect", [_read_factor(shape, "upsample.0.weight", COLOURS)])
    shape.expect("conv_last.weight", 4, axis=0, size=COLOURS)
    return _SwinirEnd("none")  # same size: denoising, or removal of JPEG artifacts


def _read_factor(shape: "_Shapes", name: str, channels: int) -> int:
    """Return the factor of a pixel-shuffle convolution with `channels` channels after the shuffle."""
    rows = shape.of(name, 4)[0]
    factor = isqrt(rows // channels)
    if factor < 1 or rows != channels * factor**2:
        raise shape.error(f"{name} has {rows} rows, which is not a square number of {channels} channels")
    return factor


@dataclass(frozen=True)
class _Shapes:
    """Shapes of a checkpoint's tensors, by the names of this project's modules."""

    checkpoint: Checkpoint
    shape: Callable[[str], tuple[int, ...]]

    def of(self, name: str, axes: int) -> tuple[int, ...]:
        """Return the shape of a tensor in the file.

        Raises:
            CheckpointError: If the tensor is missing or does not have `axes` axes.
        """
        sizes = self.shape(name)
        if len(sizes) != axes or 0 in sizes:
            raise self.error(f"{name} has the shape {' x '.join(map(str, sizes)) or 'of a single number'}")
        return sizes

    def expect(self, name: str, axes: int, axis: int, size: int) -> None:
        """Raise CheckpointError unless a tensor has `axes` axes and `size` entries along `axis`."""
        size_in_file = self.of(name, axes)[axis]
        if size_in_file != size:
            raise self.error(f"{name} is for images of {size_in_file} channels, not {size}")

    def error(self, reason: str) -> CheckpointError:
        path = self.checkpoint.path
        return CheckpointError(
            f"{path} is an upscaler that cannot be used here: {reason}.\n"
            f"  Pass {RELEASED_FILES} to {MODEL_OPTION}.",
            path,
        )
