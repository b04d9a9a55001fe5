"""TAEHV, a tiny decoder of video latents, for previews: a few convolutions with a memory of one frame.

Source: madebyollin/taehv (MIT license), the networks `taehv`, `taew2_1` and their like. The files also
contain an encoder, which is not used.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pixel_shuffle, relu

from checkpoints.dialects import LoadPlan, load_planned, make_shape_reader, make_wrong_kind_error
from checkpoints.opening import Checkpoint, list_tensor_sources, open_checkpoint
from modules.devices import pin, send_ahead, tensor_on
from modules.errors import CheckpointError
from modules.media.reading import Frame
from protocols.data import LatentSpec
from runtime.planning.dry_run import ACCELERATOR, allocate_empty_weights, dry_run, find_peak_phase

# Previews without a decoder: map latent channels linearly to colors, and enlarge to the video's size.
#
# The maps are data of each family, `LatentSpec.preview_factors` and `preview_bias`. Source: least squares
# fits of latents to downscaled pixels, which all known tools use.
MIN_RANGE = 1e-6  # of colors: a clip of one color stays dark instead of becoming noise


def project(latents: Tensor, spec: LatentSpec) -> Tensor:
    """Project latents, C F h w in model space, to RGB, 3 F h w float32 on the same device, not clamped.

    This does not wait for the device, and computes in float32 even under autocast.
    """
    factors = tensor_on(latents.device, spec.preview_factors, torch.float32)  # C 3
    bias = tensor_on(latents.device, spec.preview_bias, torch.float32)
    with torch.autocast(latents.device.type, enabled=False):
        return torch.einsum("cfhw,cr->rfhw", latents.float(), factors) + bias.view(3, 1, 1, 1)


def enlarge(colors: Tensor, height_factor: int, width_factor: int) -> Iterator[Frame]:
    """Yield bicubically resized frames, H W 3 uint8; the clip's values are stretched to 0..255.

    NaN and infinite values become 0 first.

    Args:
        colors: Colors, 3 F h w.
        height_factor: Factor on the height.
        width_factor: Factor on the width.
    """
    colors = colors.nan_to_num(0.0, 0.0, 0.0)
    lowest, highest = colors.amin(), colors.amax()
    colors = (colors - lowest) * (255 / (highest - lowest).clamp(min=MIN_RANGE))
    for frame in colors.permute(1, 2, 3, 0).contiguous().numpy():
        # OpenCV, because torch's bicubic takes eight times as long for nearly the same values
        larger = cv2.resize(frame, None, fx=width_factor, fy=height_factor, interpolation=cv2.INTER_CUBIC)
        yield np.rint(larger.clip(0, 255)).astype(np.uint8)


def to_frames(colors: Tensor) -> Tensor:
    """Convert RGB, F 3 H W, to F H W 3 uint8 on the same device; values are clamped to 0..1."""
    return (colors.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


# Letters: F frames, C channels, h w height and width of the latents or of features

MAX_LATENT = 3.0  # latents are squeezed smoothly into -MAX_LATENT..MAX_LATENT
ENLARGEMENT = 8  # in height and width: each of three stages doubles them
STAGES = (3, 9, 15)  # number of the first layer of each stage; a stage begins with three memory blocks
FILES = (
    "taew2_1 for Wan, taew2_2 for Wan2.2 TI2V-5B, taehv for HunyuanVideo and others with its VAE, "
    "taehv1_5 for HunyuanVideo 1.5 (.pth or .safetensors)"
)
META, CPU = torch.device("meta"), torch.device("cpu")


@dataclass(frozen=True)
class TaehvConfig:
    """Dimensions of a TAEHV decoder."""

    channels: int  # of latents
    widths: tuple[int, int, int, int]  # of the features: before and after each stage
    strides: tuple[int, int, int]  # frames that each stage makes from one frame
    patch: int = 1  # pixels per position of the last layer, in height and width

    @property
    def frames(self) -> int:
        """Return how many frames a latent frame decodes to; the first latent frame uses only the last."""
        return prod(self.strides)


class MemoryBlock(nn.Module):
    """Residual convolutions over the current and the previous frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the result, and the features to pass to the next call as `last`.

        Args:
            x: Features, F C h w.
            last: Features of the previous frame, 1 C h w.
        """
        past = torch.cat([torch.zeros_like(x[:1]) if last is None else last, x[:-1]])
        return relu(self.conv(torch.cat([x, past], dim=1)) + x), x[-1:]


class Growth(nn.Module):
    """Expand each frame to `stride` frames with a convolution."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Rearrange each frame's channels into `stride` frames."""
        return self.conv(x).reshape(-1, *x.shape[1:])


class TinyDecoder(nn.Module):
    """Decode latents frame by frame, so that memory does not grow with the clip."""

    def __init__(self, config: TaehvConfig) -> None:
        super().__init__()
        width = config.widths[0]
        layers: dict[str, nn.Module] = {"1": nn.Conv2d(config.channels, width, 3, padding=1)}
        for number, stride, wider in zip(STAGES, config.strides, config.widths[1:], strict=True):
            for block in range(3):
                layers[str(number + block)] = MemoryBlock(width)
            layers[str(number + 4)] = Growth(width, stride)
            layers[str(number + 5)] = nn.Conv2d(width, wider, 3, padding=1, bias=False)
            width = wider
        layers["22"] = nn.Conv2d(width, 3 * config.patch**2, 3, padding=1)
        self.decoder = nn.ModuleDict(layers)  # named as in the files
        self.config = config

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode a clip; yield the colors of each latent frame, F 3 H W, about 0..1 but not clamped.

        Args:
            latents: Latents in model space, C F h w, on any device.
        """
        weight = next(self.parameters())
        memory: dict[int, Tensor] = {}  # each memory block's input for the previous frame
        layers = self.decoder
        for index in range(latents.shape[1]):
            latent = send_ahead(latents[:, index], weight.device).to(weight.dtype)
            x = relu(layers["1"](torch.tanh(latent[None] / MAX_LATENT) * MAX_LATENT))  # 1 C h w
            # layers are named by their index in the released nn.Sequential. A stage has three memory blocks,
            # an upsampling (without weights), a temporal expansion, and a convolution
            for first in STAGES:
                for block in range(first, first + 3):
                    x, memory[block] = layers[str(block)](x, memory.get(block))
                x = layers[str(first + 4)](interpolate(x, scale_factor=2.0, mode="nearest"))
                x = layers[str(first + 5)](x)
            x = layers["22"](relu(x))
            chunk = x if self.config.patch == 1 else pixel_shuffle(x, self.config.patch)
            # the first latent frame encodes a single frame
            yield chunk[self.config.frames - 1 :] if index == 0 else chunk


@dataclass(frozen=True)
class TinyVae:
    """Decoder weights in host memory; they are on the device only while decoding."""

    config: TaehvConfig
    weights: Mapping[str, Tensor]

    @torch.no_grad()
    def frames(self, latents: Tensor, device: torch.device) -> Iterator[Tensor]:
        """Decode latents on `device`; yield the frames of each latent frame, F H W 3 uint8.

        Args:
            latents: Latents, C F h w, on any device.
            device: Device of the run.
        """
        # weights are on the device only during this call
        with META:
            decoder = TinyDecoder(self.config)
        moved = {name: send_ahead(weight, device) for name, weight in self.weights.items()}
        decoder.load_state_dict(moved, assign=True)
        del moved
        with torch.autocast(device.type, enabled=False):
            for chunk in decoder.decode(latents):
                yield to_frames(chunk.float())


def read_taehv(checkpoint: Checkpoint) -> LoadPlan[TaehvConfig]:
    """Plan how to load the decoder of a TAEHV file.

    Raises:
        CheckpointError: If the file is not a TAEHV file.
    """
    names = checkpoint.tensors
    if "decoder.3.conv.0.weight" not in names or "decoder.22.weight" not in names:
        raise _make_kind_error(checkpoint)
    sources = {}
    for name, source in list_tensor_sources(checkpoint).items():
        if name.startswith("decoder."):
            sources[name] = source
    get_shape = make_shape_reader(checkpoint, sources)

    def read_channels(layer: str) -> tuple[int, int]:
        """Return a convolution's output and input channels."""
        shape = get_shape(f"decoder.{layer}.weight")
        if len(shape) != 4 or 0 in shape:
            raise _make_kind_error(checkpoint)
        return shape[0], shape[1]

    config = _read_config(read_channels)
    # previews only decode
    return LoadPlan(config, checkpoint, sources, ignore=("encoder.*",))


def _make_kind_error(checkpoint: Checkpoint) -> CheckpointError:
    """Return the exception for a file that is not a TAEHV decoder."""
    return make_wrong_kind_error(checkpoint, "a TAEHV", "--preview_vae", FILES)


def _read_config(read_channels: Callable[[str], tuple[int, int]]) -> TaehvConfig:
    """Return the dimensions of a TAEHV decoder, inferred from the channels of its convolutions."""
    # `read_channels` returns a convolution's output and input channels. Its argument is the index in the
    # released nn.Sequential: a stage that starts at layer n expands time at n + 4, and projects to the next
    # stage's width at n + 5.
    first_width, latent_channels = read_channels("1")
    next_widths = [read_channels(str(first + 5))[0] for first in STAGES]
    widths = (first_width, next_widths[0], next_widths[1], next_widths[2])
    # a growth layer has `width` output channels for each frame that it makes from one frame
    growth_channels = [read_channels(f"{first + 4}.conv")[0] for first in STAGES]
    strides = (
        growth_channels[0] // widths[0],
        growth_channels[1] // widths[1],
        growth_channels[2] // widths[2],
    )
    color_channels, _ = read_channels("22")  # 3 colors of patch x patch pixels
    return TaehvConfig(
        channels=latent_channels,
        widths=widths,
        strides=strides,
        patch=max(1, round((color_channels / 3) ** 0.5)),
    )


def adapt_to_latents(plan: LoadPlan[TaehvConfig], latent: LatentSpec) -> LoadPlan[TaehvConfig]:
    """Return a TAEHV plan adapted to a family's latents: for image models, without temporal upsampling.

    Raises:
        CheckpointError: If the file is for other latents.
    """
    config = plan.config
    path = plan.checkpoint.path
    if latent.stride[0] == 1:
        # TAEHV upsamples time by adding frames as channels; keep the last frame's channels
        config = replace(config, strides=(1, 1, 1))
        sources = dict(plan.sources)
        for first, width in zip(STAGES, config.widths, strict=False):
            name = f"decoder.{first + 4}.conv.weight"
            # `width=width` binds the width of this iteration: the function runs when the weight is read
            sources[name] = sources[name].with_step(lambda weight, width=width: weight[-width:])  # type: ignore[misc]
        plan = replace(plan, config=config, sources=sources)
    size = config.patch * ENLARGEMENT
    stride = (config.frames, size, size)
    if config.channels == latent.channels and stride == latent.stride:
        return plan
    pixels = "{} x {} x {} (frames, height, width)"
    raise CheckpointError(
        f"--preview_vae {path} is for other latents: it decodes {config.channels} channels to "
        f"{pixels.format(*stride)} pixels each; this model's have {latent.channels} channels of "
        f"{pixels.format(*latent.stride)}.\n  Pass {FILES}.",
        path,
    )


def check_taehv(path: Path, latent: LatentSpec) -> TaehvConfig:
    """Return a decoder's dimensions, from tensor names and shapes alone.

    Raises:
        CheckpointError: If the file is not a TAEHV file or is for other latents.
    """
    with open_checkpoint(path) as checkpoint:
        plan = adapt_to_latents(read_taehv(checkpoint), latent)
        _load(plan, META, torch.float32)
        return plan.config


def load_taehv(path: Path, latent: LatentSpec, device: torch.device) -> TinyVae:
    """Load a TAEHV decoder into host memory, in the dtype for decoding on `device`.

    Raises CheckpointError if the file is not a TAEHV file or is for other latents.
    """
    with open_checkpoint(path) as checkpoint:
        plan = adapt_to_latents(read_taehv(checkpoint), latent)
        weights = _load(plan, CPU, select_dtype(device)).state_dict()
    if device.type == "cuda":  # sending pinned weights does not wait for the device
        weights = {name: pin(weight) for name, weight in weights.items()}
    return TinyVae(plan.config, weights)


def _load(plan: LoadPlan[TaehvConfig], device: torch.device, dtype: torch.dtype) -> TinyDecoder:
    """Load the planned decoder onto a device; for META, only check names and shapes."""
    return load_planned(plan, TinyDecoder, device=device, dtype=dtype, label="--preview_vae")


def select_dtype(device: torch.device) -> torch.dtype:
    """Return the decoding dtype: float32 on a CPU, else float16, which is precise enough for previews."""
    return torch.float32 if device.type == "cpu" else torch.float16


@lru_cache(maxsize=16)  # asked at each preview, and slow; a run has few sizes
def decoding_bytes(config: TaehvConfig, dtype: torch.dtype, height: int, width: int) -> int:
    """Return the device memory in bytes that decoding takes, weights included, found by a dry run.

    The result does not depend on the number of frames.

    Args:
        config: Dimensions of the decoder.
        dtype: Dtype of the weights.
        height: Height of the latents.
        width: Width of the latents.
    """
    with META:
        decoder = TinyDecoder(config).to(dtype)
    with dry_run() as ledger, torch.no_grad():
        allocate_empty_weights(decoder, ledger)
        # two latent frames, because the second one needs states that the first one leaves behind
        latents = torch.empty(config.channels, 2, height, width, device=ACCELERATOR)
        for chunk in decoder.decode(latents):
            to_frames(chunk.float())
    _, bytes_by_kind = find_peak_phase(ledger.peaks)
    return sum(bytes_by_kind.values())
