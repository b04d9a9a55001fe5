"""ParseNet: say which part of a face each pixel belongs to, so that clothes and background stay.

Source: Chen et al. 2021 (PSFRGAN), arXiv 2009.08709, as published with facexlib.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, leaky_relu

from modules.checkpoints.dialects import LoadPlan, checked_shapes_of, count, other_kind
from modules.checkpoints.opening import Checkpoint, plain_sources

# Letters: B faces, C channels, h w height and width

CLASSES = 19
# in the order of CelebAMask-HQ: skin, nose, glasses, eyes, brows, ears, mouth, lips, hair; 15 is ear rings.
# Background, hat, necklace, neck and clothes stay as they are.
OF_THE_FACE = (*range(1, 14), 15)
FILES = "parsing_parsenet.pth"
UNUSED = ("out_img_conv.*", "*.num_batches_tracked")  # what the network learned with


@dataclass(frozen=True)
class ParseNetConfig:
    """Dimensions."""

    down: tuple[int, ...]  # channels before and after each halving
    blocks: int  # at the smallest size
    up: tuple[int, ...]  # channels before and after each doubling

    @property
    def stride(self) -> int:
        """Return the divisor of height and width."""
        return 1 << (len(self.down) - 1)


class ConvLayer(nn.Module):
    """A convolution of 3 x 3 with mirrored edges; with a norm it has no bias."""

    def __init__(self, width_in: int, width: int, has_norm: bool, stride: int = 1) -> None:
        super().__init__()
        self.conv2d = nn.Conv2d(
            width_in, width, 3, stride, padding=1, padding_mode="reflect", bias=not has_norm
        )
        self.norm = nn.ModuleDict()  # one deeper, as in the files
        if has_norm:
            norm = nn.BatchNorm2d(width)
            norm.num_batches_tracked = None  # for learning only; some files lack it
            self.norm["norm"] = norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2d(x)
        for norm in self.norm.values():
            x = norm(x)
        return x


class ParsingBlock(nn.Module):
    """Two convolutions beside a straight path; `scale` of 0.5, 1 or 2 changes height and width."""

    def __init__(self, width_in: int, width: int, scale: float) -> None:
        super().__init__()
        stride = 2 if scale < 1 else 1
        self.conv1 = ConvLayer(width_in, width, has_norm=True)
        self.conv2 = ConvLayer(width, width, has_norm=True, stride=stride)
        self.shortcut_func = None if scale == 1 else ConvLayer(width_in, width, has_norm=False, stride=stride)
        self.doubles = scale > 1

    def forward(self, x: Tensor) -> Tensor:
        if self.doubles:
            x = interpolate(x, scale_factor=2, mode="nearest")
        straight = x if self.shortcut_func is None else self.shortcut_func(x)
        return straight + self.conv2(leaky_relu(self.conv1(x), 0.2))


class ParseNet(nn.Module):
    """Scores of the parts of a face for each pixel."""

    def __init__(self, config: ParseNetConfig) -> None:
        super().__init__()
        deepest = config.down[-1]
        self.config = config
        self.encoder = nn.Sequential(
            ConvLayer(3, config.down[0], has_norm=False),
            *(ParsingBlock(a, b, 0.5) for a, b in pairwise(config.down)),
        )
        self.body = nn.Sequential(*(ParsingBlock(deepest, deepest, 1) for _ in range(config.blocks)))
        self.decoder = nn.Sequential(*(ParsingBlock(a, b, 2) for a, b in pairwise(config.up)))
        self.out_mask_conv = ConvLayer(config.up[-1], CLASSES, has_norm=False)

    def forward(self, faces: Tensor) -> Tensor:
        """faces: B 3 h w, -1..1, multiples of the stride. Returns the scores in float32, B 19 h w."""
        x = self.encoder(faces.to(self.out_mask_conv.conv2d.weight.dtype))
        return self.out_mask_conv(self.decoder(x + self.body(x))).float()


def face_parts(scores: Tensor) -> Tensor:
    """Return where the face is, B h w, as bool, of the scores of ParseNet, B 19 h w."""
    is_face = torch.zeros(CLASSES, dtype=torch.bool, device=scores.device)
    is_face[list(OF_THE_FACE)] = True
    return is_face[scores.argmax(dim=1)]


def read_parsenet(checkpoint: Checkpoint) -> LoadPlan[ParseNetConfig]:
    """Plan how to load a ParseNet file. Raises CheckpointError for any other file."""
    other = other_kind(checkpoint, f"a ParseNet of {CLASSES} parts", "the folder of --model", FILES)
    if "out_mask_conv.conv2d.weight" not in checkpoint.tensors:
        raise other
    sources = plain_sources(checkpoint)
    shape = checked_shapes_of(checkpoint, sources, other)

    def rows(name: str) -> int:
        return shape(f"{name}.conv2d.weight")[0]

    downs = count(sources, r"encoder\.\d+") - 1
    ups = count(sources, r"decoder\.\d+")
    down = (rows("encoder.0"), *(rows(f"encoder.{n + 1}.conv1") for n in range(downs)))
    up = (down[-1], *(rows(f"decoder.{n}.conv1") for n in range(ups)))
    if downs != ups or rows("out_mask_conv") != CLASSES:
        raise other
    config = ParseNetConfig(down, count(sources, r"body\.\d+"), up)
    return LoadPlan(config, checkpoint, sources, ignore=UNUSED)
