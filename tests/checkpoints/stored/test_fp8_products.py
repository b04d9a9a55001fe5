"""Products in fp8 against exact sums. The device's own calls run here too, as torch has a slow CPU kernel for
them.

Error bounds. e4m3 has three digits after the point: a number is rounded by at most 2^-4 of itself, below 2^-6
by at most 2^-10. A row x is divided by its scale a first, so |x^ - x| <= 2^-4 |x| + 2^-10 a, and an output,
summed exactly and rounded to bf16 (2^-9 of itself), is off by at most

    sum_k (2^-4 |x_k| + 2^-10 a) |w_k| + 2^-8 |y|

with the fp8 weight w taken as exact; the last term is doubled for the product that rounds twice. For the
input gradient x is dy times the scales of the weight's rows, and w the fp8 numbers without their scales.
Rounding is unbiased: over numbers spread evenly in the logarithm its mean square is 2^-3 sqrt(0.54 / 12) =
2.7 % of the value, and so is that of a sum of products.
"""

import itertools
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoints.stored.forms import attach
from checkpoints.stored.fp8 import Fp8
from checkpoints.stored.fp8_products import (
    MAX_TOKENS_WITHOUT_ROW_SCALES,
    MIN_ROWS,
    Product,
    fp8_linear,
    quantize_rows,
    row_scaled_product,
    select_product,
    suits_fp8,
    tensor_scaled_product,
)
from modules.errors import OptionError
from modules.speed_options import Quantization
from tests.fp8_reference import emulated_product

CPU = torch.device("cpu")
PRODUCTS = (row_scaled_product, tensor_scaled_product, emulated_product)
SCALES = ("none", "tensor", "rows")
E4M3 = torch.float8_e4m3fn
M, K, N = MAX_TOKENS_WITHOUT_ROW_SCALES + 32, 64, 48  # tokens of which torch itself scales the rows


def random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fp8_weight(scales: str, rows: int = N, columns: int = K) -> tuple[Tensor, Tensor | None]:
    """A weight whose rows differ in size by up to 50, in fp8, and its scale."""
    weight = random(rows, columns, seed=2, dtype=torch.float32) * torch.logspace(-1.7, 0, rows)[:, None]
    if scales == "none":
        return weight.to(E4M3), None
    largest = weight.abs().amax().reshape(1) if scales == "tensor" else weight.abs().amax(1, keepdim=True)
    return (weight / (largest / 448)).to(E4M3), largest / 448


def row_scales(weight: Tensor, scale: Tensor | None) -> Tensor:
    """N 1 float64."""
    each = torch.ones(1) if scale is None else scale
    return each.double().expand(len(weight), 1)


def bound(x: Tensor, weight: Tensor, exact: Tensor) -> Tensor:
    """The largest error of x W^T as derived above. x: M K, weight: N K, both float64."""
    spacing = 2**-10 * x.abs().amax(1, keepdim=True) / 448
    return 1.001 * ((2**-4 * x.abs() + spacing) @ weight.abs().T + 2**-8 * exact.abs())


def input_gradient(product: Product, weight: Tensor, scale: Tensor | None, gradient: Tensor) -> Tensor:
    x = torch.zeros(len(gradient), weight.shape[1], dtype=gradient.dtype, requires_grad=True)
    return torch.autograd.grad(fp8_linear(x, weight, scale, None, product), x, gradient)[0]


@pytest.mark.parametrize(("scales", "product"), itertools.product(SCALES, PRODUCTS))
def test_output_and_input_gradient_are_within_the_bound_of_rounding(scales: str, product: Product) -> None:
    x, bias, (weight, scale) = random(M, K), random(N, seed=3), fp8_weight(scales)
    plain = weight.double() * row_scales(weight, scale)
    exact = x.double() @ plain.T + bias.double()
    gradient = random(M, N, seed=4) * 1e-5  # as small as gradients are
    folded = gradient.double() * row_scales(weight, scale).T
    exact_gradient = folded @ weight.double()

    out, back = fp8_linear(x, weight, scale, bias, product), input_gradient(product, weight, scale, gradient)

    assert out.dtype == back.dtype == torch.bfloat16
    allowed = bound(x.double(), plain, exact) + 2**-8 * bias.double().abs()
    assert ((out.double() - exact).abs() <= allowed).all()
    assert ((back.double() - exact_gradient).abs() <= bound(folded, weight.double().T, exact_gradient)).all()


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_what_is_no_number_is_not_hidden(value: float, product: Product) -> None:
    x, gradient, (weight, scale) = random(M, K), random(M, N), fp8_weight("rows")
    x[7, 3] = gradient[9, 2] = value

    out, back = fp8_linear(x, weight, scale, None, product), input_gradient(product, weight, scale, gradient)

    for found, row in ((out, 7), (back, 9)):
        assert found[row].isnan().all()
        assert found.isnan().any(1).sum() == 1


@pytest.mark.parametrize("product", PRODUCTS[:2])
def test_torch_is_asked_for_bfloat16_alone(product: Product, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for Hopper, GPUs have no other result of row-wise scales."""
    x, bias, (weight, scale) = random(M, K, dtype=torch.float16), random(N, seed=3), fp8_weight("rows")
    expected = fp8_linear(x, weight, scale, bias, emulated_product)
    multiply = torch._scaled_mm

    def as_on_ada(*args: Any, out_dtype: torch.dtype, bias: Tensor | None = None, **others: Any) -> Tensor:
        if out_dtype != torch.bfloat16 or (bias is not None and bias.dtype != torch.bfloat16):
            raise ValueError("Only bf16 high precision output types are supported for row-wise scaling.")
        return multiply(*args, out_dtype=out_dtype, bias=bias, **others)

    monkeypatch.setattr(torch, "_scaled_mm", as_on_ada)
    out = fp8_linear(x, weight, scale, bias.half(), product)

    assert out.dtype == torch.float16
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_scaled_in_pieces_as_in_one(dtype: torch.dtype) -> None:
    """The float32 copies of a long clip would take gigabytes."""
    x, bias, (weight, scale) = random(M, K), random(N, seed=3), fp8_weight("rows")
    assert scale is not None
    a, scale_a = quantize_rows(x)
    inputs = a, weight.t(), scale_a, scale.t().contiguous(), bias, dtype, False
    full = tensor_scaled_product(*inputs)

    with _LargestFloat32() as largest:
        pieces = tensor_scaled_product(*inputs, max_float32_elements=10 * N)

    assert torch.equal(pieces, full)
    assert largest.values == 10 * N


class _LargestFloat32(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            self.values = max(self.values, out.numel())
        return out


def test_the_backward_pass_keeps_weight_and_scale_alone() -> None:
    x, (weight, scale) = random(2, M, K).requires_grad_(), fp8_weight("rows")
    assert scale is not None
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fp8_linear(x, weight, scale, random(N).requires_grad_(False), emulated_product)

    assert [tensor.data_ptr() for tensor in kept] == [weight.data_ptr(), scale.data_ptr()]


def test_leading_axes_stay_and_autocast_chooses_the_dtype() -> None:
    x, (weight, scale) = random(2, 3, 16, K, dtype=torch.float32).requires_grad_(), fp8_weight("tensor")

    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fp8_linear(x, weight, scale, random(N, dtype=torch.float32), emulated_product)
    (gradient,) = torch.autograd.grad(out.sum(), x)

    assert (out.shape, out.dtype) == ((2, 3, 16, N), torch.bfloat16)
    assert (gradient.shape, gradient.dtype) == (x.shape, torch.float32)
    assert fp8_linear(x, weight, scale, None, emulated_product).dtype == torch.float32


@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "scale", "dtype", "suits"),
    [
        (48, 64, 16, None, E4M3, True),
        (48, 64, 16, torch.ones(()), E4M3, True),
        (48, 64, 16, torch.ones(48, 1), E4M3, True),
        (40, 64, 16, None, E4M3, False),
        (48, 60, 16, None, E4M3, False),
        (48, 64, 15, None, E4M3, False),
        (48, 128, 16, torch.ones(48, 2, 1), E4M3, False),
        (48, 64, 16, torch.ones(48, 1, 1), E4M3, False),
        (48, 64, 16, None, torch.float8_e5m2, False),
    ],
)
def test_what_does_not_suit_is_told_from_shapes(
    rows: int, columns: int, tokens: int, scale: Tensor | None, dtype: torch.dtype, suits: bool
) -> None:
    assert suits_fp8(torch.empty(1, tokens, columns), torch.empty(rows, columns, dtype=dtype), scale) == suits


@pytest.mark.parametrize(
    "tokens", [MIN_ROWS, MAX_TOKENS_WITHOUT_ROW_SCALES, MAX_TOKENS_WITHOUT_ROW_SCALES + 1]
)
def test_torch_scales_no_rows_of_few_tokens(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper cuBLAS cannot, for many features: the second linear layer of HunyuanVideo's texts."""
    x, (weight, scale) = random(tokens, K), fp8_weight("rows")
    expected = fp8_linear(x, weight, scale, None, emulated_product)
    multiply, asked = torch._scaled_mm, []

    def noted(a: Tensor, b: Tensor, scale_a: Tensor, *args: Any, **others: Any) -> Tensor:
        asked.append(scale_a.numel())
        return multiply(a, b, scale_a, *args, **others)

    monkeypatch.setattr(torch, "_scaled_mm", noted)
    out = fp8_linear(x, weight, scale, None, row_scaled_product)

    assert asked == [1 if tokens <= MAX_TOKENS_WITHOUT_ROW_SCALES else tokens]
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=2**-7)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("product", PRODUCTS[:2])
def test_what_torch_computes_is_compiled(product: Product) -> None:
    """For few and for more tokens; `functional.scaled_mm` is not in torch 2.10 and 2.11."""
    weight, scale = fp8_weight("rows")
    compiled = torch.compile(fp8_linear, backend="eager", fullgraph=True, dynamic=True)
    for tokens in (MIN_ROWS, 40, MAX_TOKENS_WITHOUT_ROW_SCALES + 1):
        x = random(1, tokens, K)
        expected = fp8_linear(x, weight, scale, None, product)
        assert torch.equal(compiled(x, weight, scale, None, product), expected)


def refusing(*_: Any) -> Tensor:
    raise RuntimeError("row-wise scaling is not built in\nat line 1")


def wrong(a: Tensor, b: Tensor, *_: Any) -> Tensor:
    return torch.zeros(a.shape[0], b.shape[1], dtype=torch.bfloat16)


def test_the_first_product_that_works_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    assert select_product(CPU, lambda _: True) is row_scaled_product
    with caplog.at_level(logging.INFO):
        assert select_product(CPU, lambda _: True, (refusing, tensor_scaled_product)) is tensor_scaled_product
    assert "row-wise scaling is not built in" in caplog.text
    with pytest.raises(OptionError, match="fp8 on the device cpu: the product of two tiles of ones is 0.0"):
        select_product(CPU, lambda _: True, (refusing, wrong))


def in_fp8(quantization: Quantization, rows: int = N) -> nn.Linear:
    layer = nn.Linear(K, rows, device="meta", dtype=torch.bfloat16).requires_grad_(False)
    layer.bias = nn.Parameter(random(rows, seed=3), requires_grad=False)
    attach(layer, Fp8(quantization).quantize(random(rows, K, seed=2)))
    return layer


@pytest.mark.parametrize("kind", ["cast", "tensor", "rows"])
def test_a_layer_multiplies_in_fp8_what_suits_it_and_all_else_in_16_bits(kind: str) -> None:
    calls: list[tuple[int, ...]] = []

    def counted(a: Tensor, *more: Any) -> Tensor:
        calls.append(tuple(a.shape))
        return emulated_product(a, *more)

    plain, fast = Quantization(kind), Quantization(kind, product=counted)
    for tokens, rows, in_8_bits in ((M, N, True), (M, N + 1, False), (MIN_ROWS - 1, N, False)):
        calls.clear()
        x = random(1, tokens, K).requires_grad_()
        expected, out = in_fp8(plain, rows)(x), in_fp8(fast, rows)(x)
        out.sum().backward()
        # forward and the gradient of the input
        assert calls == ([(tokens, K), (tokens, rows)] if in_8_bits else [])
        assert torch.equal(out, expected) != in_8_bits
        assert (out - expected).norm() < 0.04 * expected.norm()


def test_rounding_in_float32_layers_is_for_what_is_multiplied_in_16_bits() -> None:
    x = random(M, K)
    fast = Quantization("rows", product=emulated_product)
    wide = Quantization("rows", float32_linear=True, product=emulated_product)

    assert torch.equal(in_fp8(fast)(x), in_fp8(wide)(x))
    assert not torch.equal(in_fp8(fast)(x[:3]), in_fp8(wide)(x[:3]))
