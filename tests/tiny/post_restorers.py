"""Tiny GFPGAN, CodeFormer and ParseNet files with the names of the published ones."""

from pathlib import Path

import torch
from torch import Tensor, nn

from postprocessing.faces.codeformer import (
    CONV,
    NORM,
    RES,
    RESIZE,
    CodeFormer,
    CodeFormerBlock,
    CodeFormerConfig,
)
from postprocessing.faces.gfpgan import Gfpgan, GfpganConfig
from postprocessing.faces.restorers import ParseNet, ParseNetConfig
from tests.golden_cases import make_weights
from tests.tiny.dit_files import write_tensors

SIZE = 32  # of faces
GFPGAN = GfpganConfig(body=(6, 8, 10, 12), decoder=(16, 12, 10, 8), style=14, modulated_channels=(6, 5, 4))
CODEFORMER = CodeFormerConfig(
    encoder=(
        CodeFormerBlock(CONV, 3, 32),
        CodeFormerBlock(RES, 32, 32),
        CodeFormerBlock(RESIZE, 32, 32),
        CodeFormerBlock(RES, 32, 64),
        CodeFormerBlock(RESIZE, 64, 64),
        CodeFormerBlock("attention", 64, 64),
        CodeFormerBlock(RESIZE, 64, 64),
        CodeFormerBlock(RES, 64, 64),
        CodeFormerBlock(NORM, 64, 64),
        CodeFormerBlock(CONV, 64, 12),
    ),
    generator=(
        CodeFormerBlock(CONV, 12, 64),
        CodeFormerBlock("attention", 64, 64),
        CodeFormerBlock(RESIZE, 64, 64),
        CodeFormerBlock(RES, 64, 64),
        CodeFormerBlock(RESIZE, 64, 64),
        CodeFormerBlock(RES, 64, 64),
        CodeFormerBlock(RESIZE, 64, 64),
        CodeFormerBlock(RES, 64, 32),
        CodeFormerBlock(NORM, 32, 32),
        CodeFormerBlock(CONV, 32, 3),
    ),
    num_positions=16,
    tokens=16,
    hidden=20,
    layers=2,
    codes=(24, 12),
    fusion_sizes=(8, 16),
)
PARSENET = ParseNetConfig(down=(4, 6, 8), blocks=1, up=(8, 6, 4))


def rule_weights(key: str, network: nn.Module) -> dict[str, Tensor]:
    """Weights by the rule of the golden vectors, for a network made on any device."""
    shapes = [[name, list(weight.shape)] for name, weight in network.state_dict().items()]
    return make_weights(key, shapes)


def gfpgan_weights(config: GfpganConfig = GFPGAN) -> dict[str, Tensor]:
    """With the tensors that restoring does not use, as in the published files."""
    weights = rule_weights("tiny-gfpgan", Gfpgan(config))
    weights["toRGB.0.weight"] = torch.zeros(3, config.body[-2], 1, 1)
    weights["stylegan_decoder.style_mlp.1.weight"] = torch.zeros(config.style, config.style)
    return weights


def codeformer_weights(config: CodeFormerConfig = CODEFORMER) -> dict[str, Tensor]:
    """Random weights."""
    return rule_weights("tiny-codeformer", CodeFormer(config))


def parsenet_weights(part: int | None = None, config: ParseNetConfig = PARSENET) -> dict[str, Tensor]:
    """Random weights; part: of the face, 0 to 18, that every pixel is said to belong to."""
    weights = rule_weights("tiny-parsenet", ParseNet(config))
    weights["out_img_conv.conv2d.weight"] = torch.zeros(3, config.up[-1], 3, 3)
    weights["encoder.1.conv1.norm.norm.num_batches_tracked"] = torch.tensor(7)
    if part is not None:
        weights["out_mask_conv.conv2d.weight"].zero_()
        weights["out_mask_conv.conv2d.bias"][part] = 10.0
    return weights


def write_model(path: Path, weights: dict[str, Tensor], wrapper: str | None = None) -> Path:
    """A .pth file, its tensors below a key such as params_ema, or a safetensors file."""
    if wrapper is None:
        return write_tensors(path, weights)
    torch.save({wrapper: weights}, path)
    return path
