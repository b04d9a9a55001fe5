"""Weights in int8 and nf4: worked numbers, products and gradients, and what other libraries make of them."""

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from checkpoints.stored.forms import QuantizationFormat, attach, get_dequantized_weight, get_quantized_weight
from checkpoints.stored.int8 import Int8, rotate
from checkpoints.stored.nf4 import LEVELS, Nf4, make_quantization_format, rehearsed
from checkpoints.stored.packed import four_bits
from modules.speed_options import Quantization
from runtime.planning.dry_run import ACCELERATOR, TEMPORARY, dry_run

# the numbers come from comfy-kitchen 0.2.40 and bitsandbytes 0.50.2 on a CPU
ROWS, COLUMNS = torch.arange(4)[:, None], torch.arange(256)
WEIGHT = ((7 * ROWS + 13 * COLUMNS) % 29 - 14) / 16
WEIGHT[0, 5] = 8  # an outlier
X = ((5 * ROWS[:2] + 11 * COLUMNS) % 23 - 11) / 8
FORMS: dict[str, QuantizationFormat] = {
    "rows": Int8(0),
    "rotated": Int8(),
    "both ways": Int8(rounds_gradients=True),
    "nf4": Nf4(),
}


def near(found: Any, expected: list[float], error: float = 1e-6) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=error)


def run(form: QuantizationFormat, x: Tensor, bias: Tensor | None = None) -> Tensor:
    stored = form.quantize(WEIGHT)
    return stored.format.multiply(x, stored.tensors, stored.shape, bias)


def many(tokens: Tensor) -> Tensor:
    """These and zeros, so that they are enough to be multiplied in int8."""
    return torch.cat([tokens, torch.zeros(18, tokens.shape[1])])


def test_a_plan_counts_the_value_of_nf4_alone_as_its_kernel_makes_no_copies() -> None:
    pytest.importorskip("bitsandbytes")
    shape = (512, 512)
    form = make_quantization_format(rehearsed(Quantization("nf4", form="nf4")))
    with dry_run() as ledger:
        tensors = tuple(
            torch.empty(each.shape, dtype=each.dtype, device=ACCELERATOR)
            for each in form.empty(shape).tensors
            if each is not None
        )
        ledger.begin_phase("value")
        value = form.dequantize(tensors, shape, torch.bfloat16)
        peak = ledger.peaks["value"][TEMPORARY]

    assert (value.shape, value.dtype) == (shape, torch.bfloat16)
    of_blocks = 4 * 512 * 512 // 64  # the maxima of blocks in float32, some of them at a time
    assert value.nbytes <= peak <= value.nbytes + 4 * of_blocks


@pytest.mark.parametrize(
    ("group", "scales", "codes", "value"),
    [
        (0, [0.062992126, 0.006889764], [-14, -1, 12, -4, 9, 127, 6, -10], [-0.881890, -0.062992]),
        (256, [0.01590182, 0.01359498], [7, 72, 0, 17, 54, 6, -38, 8], [-0.880563, -0.067583]),
        (64, [0.01685531, 0.01045768], [105, 19, -32, 34, 29, 50], None),
    ],
)
def test_int8_rows_have_the_worked_numbers(
    group: int, scales: list[float], codes: list[int], value: list[float] | None
) -> None:
    stored: Any = Int8(group).quantize(WEIGHT)

    near(stored.tensors[1][:2, 0], scales, 1e-8)
    assert stored.weight[0, : len(codes)].tolist() == codes
    if value is not None:
        near(stored.dequantize()[0, :2], value)
    if group == 0:
        assert stored.weight[1, :8].tolist() == [-64, 54, -91, 27, -118, 0, 118, -27]


def test_the_rotation_is_the_regular_hadamard_matrix() -> None:
    for group in (16, 64, 256):
        matrix = rotate(torch.eye(group), group)
        assert torch.equal(matrix, matrix.T)
        assert torch.equal(matrix @ matrix, torch.eye(group))
        assert torch.equal(matrix.sum(0), torch.ones(group))
        assert (matrix[0, :8] * group**0.5).tolist() == [1, 1, 1, -1, 1, 1, 1, -1]
    near(rotate(X, 256)[0, :6], [0.0625, -0.359375, 0.296875, -0.84375, 0.171875, -0.96875])


@pytest.mark.recorded
def test_products_in_int8_have_the_worked_numbers() -> None:
    near(run(Int8(0), many(X))[0], [-2.261517, -1.515897, 1.425937, -1.512466])
    near(run(Int8(256), many(X))[0], [-2.319193, -1.552082, 1.386709, -1.481578])
    # Few tokens are not rounded: 256 products in float32, whose magnitudes sum to 85. Processors add them in
    # other orders, and float32 rounds sums of that size by 5e-6. The numbers are those of float64.
    near(run(Int8(256), X)[0], [-2.295328, -1.557475, 1.416200, -1.457999], 2e-5)


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        (False, [0.106858, -0.549967, 1.961730, -0.491910, 2.010818, 8.437958]),
        (True, [0.109001, -0.544655, 1.957516, -0.486288]),
    ],
)
def test_gradients_in_int8_have_the_worked_numbers(rounds: bool, expected: list[float]) -> None:
    x, gradient = many(X).requires_grad_(), torch.zeros(20, 4)
    gradient[:2] = torch.tensor([[1, -2, 0.5, 0.25], [0, 1, 1, -1]])

    run(Int8(256, rounds), x).backward(gradient)

    assert x.grad is not None
    near(x.grad[0, : len(expected)], expected)


def test_nf4_has_the_worked_numbers() -> None:
    stored = Nf4().quantize(WEIGHT)
    packed, peaks, nested, _, offset = cast(tuple[Tensor, ...], stored.tensors)

    assert packed[0, :8].tolist() == [103, 135, 143, 134, 118, 120, 120, 104]
    assert peaks[:4].tolist() == [255, 75, 75, 75]
    near(nested, [6.6796875])
    near(offset, [1.3203125])
    near(stored.dequantize()[1, :4], [-0.455968, 0.382708, -0.604567, 0.213721])
    # with exact maxima, as files without nested statistics have them
    value = four_bits(LEVELS)(packed, torch.tensor([8, *[0.875] * 15]).view(4, 4))
    near((X @ value.T)[0], [-2.758321, -1.346753, 1.319600, -1.421595], 3e-6)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_nearly_as_in_16_bits(form: QuantizationFormat, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    plain = nn.Linear(256, 48).to(dtype).requires_grad_(False)
    layer = copy.deepcopy(plain)
    attach(layer, form.quantize(plain.weight))
    size_bytes = layer.weight.nbytes + sum(buffer.nbytes for buffer in layer.buffers())
    # beside it 1 KB of 256 values in each layer in nf4
    assert size_bytes < (0.29 if form.name == "nf4" else 0.52) * 2 * plain.weight.numel() + 1100
    results = []
    for each in (plain, layer):
        torch.manual_seed(2)
        x = torch.randn(2, 40, 256, dtype=dtype, requires_grad=True)
        out = each(x)
        out.backward(torch.randn_like(out))
        assert out.dtype == dtype
        assert x.grad is not None
        results.append((out.detach().float(), x.grad.float()))

    limit = 0.12 if form.name == "nf4" else 0.02
    for one, other in zip(*results, strict=True):
        assert 1e-4 < (one - other).norm() / one.norm() < limit
    stored = get_quantized_weight(layer)
    assert stored is not None
    assert torch.equal(get_dequantized_weight(layer, layer.weight), stored.dequantize())


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_large_input_is_computed_in_parts_with_equal_numbers(
    form: QuantizationFormat, monkeypatch: Any
) -> None:
    x, bias = torch.randn(100, 256), torch.randn(4)
    full, value = run(form, x, bias), form.quantize(WEIGHT).dequantize()
    for name in ("int8", "nf4"):
        monkeypatch.setattr(f"checkpoints.stored.{name}.PIECE", 256 * 2)
    assert torch.equal(run(form, x, bias), full)
    assert torch.equal(form.quantize(WEIGHT).dequantize(), value)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("shape", [(12, 100), (5, 33), (3, 48), (1, 1)])
def test_every_shape_has_a_value_and_the_form_that_is_planned(
    form: QuantizationFormat, shape: tuple[int, int]
) -> None:
    stored, planned = form.quantize(torch.randn(shape)), form.empty(shape)

    assert stored.dequantize().shape == shape
    assert stored.format == planned.format
    for one, other in zip(stored.tensors, planned.tensors, strict=True):
        assert one is not None
        assert other is not None
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


def test_joined_rows_of_int8_are_those_of_the_parts() -> None:
    full = Int8().quantize(WEIGHT)
    parts: Any = [full.format.cut(full, 0, 3), full.format.cut(full, 3, 1)]
    joined: Any = full.format.join(parts)
    assert torch.equal(joined.dequantize(), full.dequantize())
    assert torch.equal(parts[1].dequantize(), full.dequantize()[3:])


def test_int8_is_what_comfy_kitchen_makes() -> None:
    kitchen = pytest.importorskip("comfy_kitchen")
    codes, scale = kitchen.quantize_int8_rowwise(WEIGHT)
    stored = Int8(0).quantize(WEIGHT)
    assert torch.equal(codes, stored.weight)
    torch.testing.assert_close(scale.view(-1, 1), stored.tensors[1])


@pytest.mark.parametrize("shape", [(64, 128), (33, 65)])
def test_nf4_is_what_bitsandbytes_makes(shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    weight = torch.randn(shape) * 0.02
    with torch.compiler.set_stance("force_eager"):  # it compiles sizes like 33 x 65, for 17 s
        packed, state = functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        dequantized = functional.dequantize_4bit(packed, state)

    stored: Any = Nf4().quantize(weight)

    assert torch.equal(packed.view(-1), stored.weight.view(-1))
    assert torch.equal(state.absmax, stored.tensors[1])
    assert torch.equal(state.state2.code, stored.tensors[3])
    torch.testing.assert_close(state.state2.absmax, stored.tensors[2])
    torch.testing.assert_close(dequantized, stored.dequantize())
    expand = torch.ops.bitsandbytes.dequantize_4bit  # as on a GPU
    again = Nf4(expand).dequantize(stored.tensors, stored.shape, torch.bfloat16)
    assert torch.equal(again, stored.dequantize(torch.bfloat16))
    assert len(set(LEVELS)) == 16
