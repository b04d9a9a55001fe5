"""Linear layers whose weights are kept in 8 bits."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from checkpoints.stored.forms import attach, get_quantized_weight
from checkpoints.stored.fp8 import E4M3, Fp8, dequantize, quantize, store_scale
from modules.script_options import parse_options
from modules.speed_options import GenerationFp8Options, Quantization, TrainingFp8Options
from tests.golden_cases import read_case

CAST, TENSOR, ROWS = (Quantization(kind) for kind in ("cast", "tensor", "rows"))
GOLDEN = [f"{size}.{dtype}" for size in ("normal", "small", "wide") for dtype in ("float32", "bfloat16")]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized(layer: nn.Linear, quantization: Quantization) -> nn.Linear:
    """A copy of the layer with its weight in 8 bits."""
    layer = copy.deepcopy(layer).requires_grad_(False)
    attach(layer, Fp8(quantization).quantize(layer.weight))
    return layer


def multiplied_out(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    stored = get_quantized_weight(layer)
    assert stored is not None
    return stored.dequantize(dtype)


@pytest.mark.parametrize("case", GOLDEN)
def test_one_scale_per_weight_gives_the_golden_numbers(case: str) -> None:
    _, golden = read_case("fp8_scaled")
    weight = golden[f"{case}.weight"]
    rounded, scale = quantize(weight, TENSOR)
    assert scale is not None
    assert torch.equal(rounded.view(torch.uint8), golden[f"{case}.fp8_bytes"])
    assert scale.dtype == torch.float32
    assert torch.equal(scale, golden[f"{case}.scale_weight"].float())
    assert torch.equal(dequantize(rounded, scale, weight.dtype), golden[f"{case}.dequantised"])


def test_a_layer_gives_the_golden_output() -> None:
    _, golden = read_case("fp8_scaled")
    weight = golden["normal.float32.weight"]
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    attach(layer, Fp8(TENSOR).quantize(weight))
    # two sums of 40 products in another order
    torch.testing.assert_close(layer(golden["x"]), golden["linear_out_dequant_fp32"], rtol=1e-5, atol=1e-5)


def test_a_scale_per_row_is_that_of_the_row_alone() -> None:
    weight = drawn(6, 40, dtype=torch.bfloat16) * torch.logspace(-3, 2, 6)[:, None].bfloat16()
    rounded, scale = quantize(weight, ROWS)
    assert scale is not None
    assert scale.shape == (6, 1)
    for row in range(6):
        alone, own = quantize(weight[row : row + 1], TENSOR)
        assert own is not None
        assert torch.equal(alone.view(torch.uint8)[0], rounded.view(torch.uint8)[row])
        assert own.item() == scale[row].item()


def test_float32_scales_are_finer_than_those_of_bfloat16() -> None:
    weight = drawn(16, 40, dtype=torch.bfloat16)
    _, coarse = quantize(weight, ROWS)
    _, fine = quantize(weight, Quantization("rows", float32_scales=True))
    assert coarse is not None
    assert fine is not None
    assert torch.equal(fine, weight.float().abs().amax(1, keepdim=True) / 448)
    assert torch.equal(coarse, coarse.bfloat16().float())
    assert not torch.equal(coarse, fine)


@pytest.mark.parametrize("quantization", [TENSOR, ROWS], ids=["tensor", "rows"])
def test_zeros_stay_zeros(quantization: Quantization) -> None:
    rounded, scale = quantize(torch.zeros(4, 8), quantization)
    assert scale is not None
    assert (scale == 1).all()
    assert (dequantize(rounded, scale) == 0).all()


def test_a_plain_cast_saturates_rather_than_becoming_no_number() -> None:
    weight = torch.tensor([[1000.0, -1000.0, 448.0, 0.5, 500.0]])
    rounded, scale = quantize(weight, CAST)
    assert scale is None
    assert rounded.float().tolist() == [[448.0, -448.0, 448.0, 0.5, 448.0]]


def test_large_weights_are_rounded_in_pieces_to_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = drawn(37, 24)
    full, _ = quantize(weight, ROWS)
    monkeypatch.setattr("checkpoints.stored.fp8._BLOCK_ELEMENTS", 100)  # four rows
    pieces, _ = quantize(weight, ROWS)
    assert torch.equal(full.view(torch.uint8), pieces.view(torch.uint8))


@pytest.mark.parametrize(
    ("stored", "kept"),
    [((), (1,)), ((1,), (1,)), ((6,), (6, 1)), ((6, 1), (6, 1)), ((6, 4, 1), (6, 4, 1)), ((1, 1), (1,))],
)
def test_scales_of_every_shape_are_applied(stored: tuple[int, ...], kept: tuple[int, ...]) -> None:
    weight, scale = drawn(6, 8).to(E4M3), drawn(*stored, seed=1).abs().bfloat16()
    found = store_scale(scale)
    assert found.shape == kept
    assert found.dtype == torch.float32
    each = scale.float() if scale.ndim == 3 else scale.float().reshape(-1, 1, 1)
    expected = (weight.float().view(6, -1, 2) * each).view(6, 8)
    assert torch.equal(dequantize(weight, found), expected)
    assert torch.equal(dequantize(weight, scale), expected)
    # rounded once, not the scale before it
    assert torch.equal(dequantize(weight, found, torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("quantization", [CAST, TENSOR, ROWS], ids=["cast", "tensor", "rows"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_a_layer_and_its_gradient_are_those_of_the_weight_multiplied_out(
    quantization: Quantization, dtype: torch.dtype, close: float
) -> None:
    layer = quantized(nn.Linear(24, 16).to(dtype), quantization)
    plain = multiplied_out(layer, dtype)
    x, other = (drawn(2, 5, 24, dtype=dtype).requires_grad_() for _ in range(2))

    found, expected = layer(x), functional.linear(other, plain, layer.bias)
    for output in (found, expected):
        output.backward(drawn(2, 5, 16, seed=2, dtype=dtype))

    assert torch.equal(found, expected)
    # the same products; the plain layer's backward may add them up in another order
    torch.testing.assert_close(x.grad, other.grad, rtol=close, atol=close)


def test_the_backward_pass_keeps_no_copy_of_the_weight_in_16_bits() -> None:
    layer = quantized(nn.Linear(64, 48).bfloat16(), ROWS)
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(drawn(3, 64, dtype=torch.bfloat16).requires_grad_())
    assert any(tensor is layer.weight or tensor.data_ptr() == layer.weight.data_ptr() for tensor in saved)
    assert all(tensor.dtype == E4M3 for tensor in saved if tensor.numel() == layer.weight.numel())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("is_wide", [False, True])
def test_layers_compute_in_autocasts_dtype_and_float32_layers_outside_it(
    autocast: bool, is_wide: bool
) -> None:
    layer = quantized(nn.Linear(24, 16).bfloat16(), Quantization("rows", float32_linear=is_wide))
    dtype, x = torch.float32 if is_wide else torch.bfloat16, drawn(3, 24, dtype=torch.bfloat16)
    given = x.float() if autocast and not is_wide else x

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layer(given)

    expected = functional.linear(x.to(dtype), multiplied_out(layer, dtype), layer.bias.to(dtype))
    assert torch.equal(out, expected.bfloat16())


@pytest.mark.parametrize(
    ("options", "words", "quantization"),
    [
        (TrainingFp8Options, "", None),
        (TrainingFp8Options, "--fp8_base", Quantization("cast")),
        (TrainingFp8Options, "--fp8_base --fp8_fast", Quantization("cast", fp8_matmul=True)),
        (TrainingFp8Options, "--fp8_base --fp8_scaled --fp8_fast", Quantization("rows", fp8_matmul=True)),
        (
            TrainingFp8Options,
            "--fp8_base --fp8_scaled --upcast_quantization",
            Quantization("rows", float32_scales=True),
        ),
        (GenerationFp8Options, "", None),
        (GenerationFp8Options, "--fp8", Quantization("cast")),
        (GenerationFp8Options, "--fp8 --fp8_scaled --fp8_fast", Quantization("rows", fp8_matmul=True)),
        (GenerationFp8Options, "--fp8_scaled --upcast_linear", Quantization("rows", float32_linear=True)),
    ],
)
def test_what_options_mean(options: Any, words: str, quantization: Quantization | None) -> None:
    assert parse_options(None, words.split(), options)[0].quantization == quantization


def test_fast_generation_without_fp8_weights_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    assert parse_options(None, ["--fp8_fast"], GenerationFp8Options)[0].quantization is None
    assert "--fp8_fast is ignored" in caplog.text
