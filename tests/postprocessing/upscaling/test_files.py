"""Upscalers from files: equal to the recorded ones, under all names, in all sizes; other files are named."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from modules.errors import CheckpointError
from postprocessing.tiling import pad_to_multiple
from postprocessing.upscaling.files import check_file, load_upscaler
from postprocessing.upscaling.swinir import attend
from tests.golden_cases import make_weights, read_case
from tests.manifests import tensor_list, write_hollow
from tests.tiny.post_upscaling import (
    COMPACT,
    RRDB,
    SWINIR,
    compact_weights,
    in_middle_names,
    in_old_names,
    rrdb_weights,
    swinir_weights,
    write,
)

CPU = torch.device("cpu")
NEAR = {"rtol": 0.0, "atol": 1e-5}  # float32; differences are below 1e-6


def enlarge(
    path: Path, images: Tensor, repeats_edge: bool | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What a file's network makes; repeats_edge: None: as its kind has it."""
    upscaler = load_upscaler(path, CPU, dtype)
    height, width = (upscaler.config.factor * side for side in images.shape[-2:])
    repeats = upscaler.kind.repeats_edge if repeats_edge is None else repeats_edge
    padded = pad_to_multiple(images, upscaler.config.step, repeats).to(dtype)
    with torch.no_grad():
        return upscaler.network(padded)[..., :height, :width].float()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_swinir_equals_the_recorded_one(tmp_path: Path, suffix: str) -> None:
    case, tensors = read_case("swinir")
    weights: dict[str, Any] = make_weights(case["weights_model_key"], case["weights"])
    if suffix == "pth":
        weights = {"params": {"x": torch.ones(1)}, "params_ema": weights}
    path = write(tmp_path / f"x.{suffix}", weights)

    torch.testing.assert_close(enlarge(path, tensors["in"], False), tensors["out_reflect"], **NEAR)
    torch.testing.assert_close(enlarge(path, tensors["in"]), tensors["out_flip"], **NEAR)
    torch.testing.assert_close(enlarge(path, tensors["in_exact"]), tensors["out_exact"], **NEAR)


@pytest.mark.parametrize("names", ["new", "old", "middle"])
@pytest.mark.parametrize(("model", "inputs"), [("x4", ["x4"]), ("x2", ["x2", "x2_odd"])])
def test_rrdb_equals_the_recorded_one(tmp_path: Path, model: str, inputs: list[str], names: str) -> None:
    case, tensors = read_case("rrdb")
    description = case["models"][model]
    weights = make_weights(description["weights_model_key"], description["weights"])
    if names != "new":
        weights = in_middle_names(weights) if names == "middle" else in_old_names(weights)
    path = write(tmp_path / "x.pth", weights)

    for name in inputs:
        torch.testing.assert_close(enlarge(path, tensors[f"{name}_in"]), tensors[f"{name}_out"], **NEAR)


@pytest.mark.parametrize(
    ("manifest", "kind", "facts"),
    [
        ("swinir-large-realsr-x4-gan", "SwinIR", {"dim": 240, "depths": (6,) * 9, "convolutions": 3}),
        ("swinir-medium-realsr-x4-gan", "SwinIR", {"dim": 180, "heads": (6,) * 6, "convolutions": 1}),
        ("esrgan-x4-old", "ESRGAN", {"features": 64, "blocks": 23, "factor": 4}),
        ("esrgan-x4-mid", "ESRGAN", {"features": 64, "blocks": 23, "factor": 4}),
        ("realesrgan-x4plus", "ESRGAN", {"growth": 32, "blocks": 23, "factor": 4}),
        ("realesrgan-x2plus", "ESRGAN", {"unshuffle": 2, "doublings": 2, "factor": 2}),
    ],
)
def test_published_files_fit(tmp_path: Path, manifest: str, kind: str, facts: dict[str, Any]) -> None:
    found, config = check_file(write_hollow(tmp_path / "x.safetensors", tensor_list(manifest)))
    assert found.name == kind
    assert {name: getattr(config, name) for name in facts} == facts


@pytest.mark.parametrize(
    ("doublings", "unshuffle", "rename"),
    [(0, 1, in_old_names), (1, 1, in_old_names), (3, 1, None), (2, 2, None), (2, 4, in_old_names)],
)
def test_any_factor_is_read_from_the_names(
    tmp_path: Path, doublings: int, unshuffle: int, rename: Any
) -> None:
    config = replace(RRDB, doublings=doublings, unshuffle=unshuffle, has_shortcuts=doublings == 2)
    weights = rrdb_weights(config)
    new = write(tmp_path / "new.pth", weights)
    if rename is not None:
        weights = rename(weights, config)
    path = write(tmp_path / "x.pth", {"module." + name: weight for name, weight in weights.items()})

    kind, found = check_file(path)
    images = torch.rand(1, 3, 5, 6)

    assert (kind.name, found) == ("ESRGAN", config)
    factor = 2**doublings // unshuffle
    made = enlarge(path, images)
    assert made.shape == (1, 3, 5 * factor, 6 * factor)
    assert torch.equal(made, enlarge(new, images))


@pytest.mark.parametrize(
    ("upsampler", "upsampling_factors", "window", "convolutions"),
    [
        ("nearest+conv", (2,), 4, 1),
        ("nearest+conv", (2, 2), 7, 3),
        ("pixelshuffle", (3,), 4, 3),
        ("pixelshuffle", (2, 2, 2), 7, 1),
        ("pixelshuffledirect", (3,), 4, 1),
        ("none", (), 7, 3),
    ],
)
def test_every_form_of_swinir_is_read_from_the_shapes(
    tmp_path: Path, upsampler: str, upsampling_factors: tuple[int, ...], window: int, convolutions: int
) -> None:
    config = replace(
        SWINIR,
        upsampler=upsampler,
        upsampling_factors=upsampling_factors,
        window=window,
        convolutions=convolutions,
        features=8 if upsampler in {"nearest+conv", "pixelshuffle"} else 0,
        pixel_range=255.0 if window == 7 else 1.0,
    )
    weights = swinir_weights(config)
    # buffers of the published files, which are for one size
    weights["layers.0.residual_group.blocks.1.attn_mask"] = torch.full((4, 16, 16), 9.0)
    weights["layers.0.residual_group.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16).long()
    path = write(tmp_path / "x.pth", {"netG." + name: weight for name, weight in weights.items()})

    kind, found = check_file(path)

    assert (kind.name, found) == ("SwinIR", config)
    assert enlarge(path, torch.rand(1, 3, 5, 9)).shape == (1, 3, 5 * config.factor, 9 * config.factor)


@pytest.mark.parametrize(("depth", "factor"), [(1, 2), (3, 4)])
def test_compact_networks_are_read_from_the_shapes(tmp_path: Path, depth: int, factor: int) -> None:
    config = replace(COMPACT, depth=depth, factor=factor)
    weights = compact_weights(config)
    path = write(tmp_path / "x.pth", {"params": weights})
    images = torch.rand(1, 3, 5, 6)

    kind, found = check_file(path)
    made = enlarge(path, images)

    assert (kind.name, found) == ("compact Real-ESRGAN", config)
    x = images
    for layer in range(0, 2 * depth + 2, 2):
        x = conv2d(x, weights[f"body.{layer}.weight"], weights[f"body.{layer}.bias"], padding=1)
        x = torch.where(x > 0, x, x * weights[f"body.{layer + 1}.weight"].view(1, -1, 1, 1))
    last = f"body.{2 * depth + 2}"
    x = conv2d(x, weights[f"{last}.weight"], weights[f"{last}.bias"], padding=1)
    # channel (color, down, across) -> place (down, across) of each pixel
    shuffled = x.view(1, 3, factor, factor, 5, 6).permute(0, 1, 4, 2, 5, 3).reshape(made.shape)
    near = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    torch.testing.assert_close(made, shuffled + near, **NEAR)


def test_heads_may_be_filled_up_to_a_width_that_kernels_take() -> None:
    q, k, v = torch.randn(3, 5, 2, 16, 6)
    bias = torch.randn(2, 16, 16)
    scores = torch.softmax(q @ k.transpose(-1, -2) / 6**0.5 + bias, dim=-1)
    for multiple in (1, 8):
        made = attend(q, k, v, bias, multiple)
        torch.testing.assert_close(made, scores @ v, rtol=0, atol=1e-5)


def test_windows_do_not_see_what_shifting_brought_beside_them(tmp_path: Path) -> None:
    """A change at the right edge reaches the left one through windows only, not around the picture."""
    weights = swinir_weights(
        replace(SWINIR, upsampler="none", upsampling_factors=(), features=0, convolutions=1)
    )
    # convolutions that see no neighbors
    weights = {name: each * _center(each) if each.dim() == 4 else each for name, each in weights.items()}
    path = write(tmp_path / "x.pth", weights)
    images = torch.rand(1, 3, 24, 24)
    changed = images.clone()
    changed[..., -1, -1] += 1

    differs = (enlarge(path, images) != enlarge(path, changed)).any(dim=1)[0]

    # one layer of two blocks, one of one: 4 + 2 + 4 pixels at most
    assert differs[-1, -1]
    assert not differs[:12].any()
    assert not differs[:, :12].any()


def _center(weight: Tensor) -> Tensor:
    mask = torch.zeros_like(weight)
    mask[:, :, weight.shape[2] // 2, weight.shape[3] // 2] = 1
    return mask


OVERLAP = "layers.0.residual_group.overlap_attn.relative_position_bias_table"
TABLE = "layers.0.residual_group.blocks.0.attn.relative_position_bias_table"


@pytest.mark.parametrize(
    ("weights", "name", "shape", "words"),
    [
        (rrdb_weights(), "conv_first.weight", (8, 4, 3, 3), "requires 4 channels"),
        (rrdb_weights(), "conv_first.weight", (8, 192, 3, 3), "requires 192 channels"),
        (rrdb_weights(), "conv_first.weight", (8,), "conv_first.weight has the shape 8"),
        (rrdb_weights(), "conv_last.weight", (4, 8, 3, 3), "images of 4 channels, not 3"),
        (rrdb_weights(), "conv_last.weight", None, "conv_last.weight is missing"),
        (rrdb_weights(), "body.1.rdb2.conv3.bias", None, "missing: body.1.rdb2.conv3.bias"),
        (rrdb_weights(), "extra.weight", (2, 2), "unexpected: extra.weight"),
        (compact_weights(), "body.0.weight", (8, 1, 3, 3), "images of 1 channels, not 3"),
        (compact_weights(), "body.6.weight", (36, 8, 3, 3), "body.6.weight has 36 rows"),
        (compact_weights(), "body.3.weight", (9,), "body.3.weight: the file has 9"),
        (compact_weights(), "body.9.bias", (9,), "it has 8 layers"),
        (swinir_weights(), "conv_first.weight", (12, 1, 3, 3), "for images with 1 channels, such as gray"),
        (swinir_weights(), "conv_first.weight", (13, 3, 3, 3), "do not go together"),
        (swinir_weights(), "norm.weight", None, "missing: norm.weight"),
        (swinir_weights(), TABLE, (48, 3), "48 distances do not go together"),
        (swinir_weights(), OVERLAP, (4, 4), "looks like a HAT upscaler, which is not supported"),
        ({}, "layers.0.residual_group.blocks.0.attn.logit_scale", (4,), "looks like a Swin2SR upscaler"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    tmp_path: Path, weights: dict[str, Tensor], name: str, shape: tuple[int, ...] | None, words: str
) -> None:
    changed = {each: weight for each, weight in weights.items() if each != name}
    if shape is not None:
        changed[name] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=words):
        check_file(write(tmp_path / "x.pth", changed))


def test_another_model_is_named(tmp_path: Path) -> None:
    path = write_hollow(tmp_path / "x.safetensors", tensor_list("raft-things"))
    with pytest.raises(CheckpointError, match=r"is not an upscaler; it looks like RAFT(.|\n)*--model"):
        check_file(path)
