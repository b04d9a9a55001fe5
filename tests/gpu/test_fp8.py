"""fp8 products of real widths against float64, and weights in 8 bits multiplied out, on a device.

What is tolerated: rounding a factor to e4m3 costs 2.7 % root mean square, whatever its size; a product's own
error is that of rounding to bf16, 2^-9 at most, and with fast sums on Hopper that of partial sums of 14 bits.
On a CPU torch multiplies in fp8 by a slow kernel of its own, here with small sizes.
"""

import pytest
import torch
from torch import Tensor, nn

from modules.errors import OptionError
from modules.fp8.products import (
    EXACT_SUMS,
    FAST_SUMS,
    LEAST_CAPABILITY,
    Product,
    add_product,
    choose_product,
    fp8_linear,
    quantise_rows,
    row_scaled_product,
    supports_fp8,
    tensor_scaled_product,
)
from modules.fp8.weights import attach, dequantise, quantise
from modules.speed_options import Quantisation
from tests.gpu.measuring import equal_bits, relative_error

E4M3 = torch.float8_e4m3fn
PRODUCTS = (row_scaled_product, tensor_scaled_product)
ROUNDING = (0.02, 0.035)  # relative error of a product one of whose factors was rounded to e4m3
SUMMING = {EXACT_SUMS: 0.004, FAST_SUMS: 0.02}  # relative error of a product itself
# rows, inputs, outputs of Wan 14B: attention, both halves of the feed-forward; few and odd numbers of rows
SIZES = [(4096, 5120, 5120), (4099, 5120, 13824), (1025, 13824, 5120), (77, 5120, 5120), (17, 5120, 13824)]
SMALL = [(96, 256, 128), (67, 128, 256), (33, 256, 96), (16, 64, 48), (17, 128, 64)]
KINDS = ("cast", "tensor", "rows")


def require_fp8(device: torch.device) -> None:
    if device.type == "cuda" and not supports_fp8(device):
        pytest.skip("this GPU has no fp8 units")


def size_of(device: torch.device, number: int) -> tuple[int, int, int]:
    return (SIZES if device.type == "cuda" else SMALL)[number]


def drawn(device: torch.device, *shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def weight_of(device: torch.device, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """A weight in fp8 with a scale for each row, of rows that differ in size by up to 30."""
    sizes = torch.logspace(-1.5, 0, outputs)[:, None].to(device)
    plain = drawn(device, outputs, inputs, seed=1, dtype=torch.float32) * sizes * inputs**-0.5
    weight, scale = quantise(plain, Quantisation("rows"))
    assert scale is not None
    return weight, scale


@pytest.mark.parametrize("number", range(len(SIZES)))
@pytest.mark.parametrize("product", PRODUCTS)
def test_output_and_gradient_are_as_near_as_rounding_allows(
    device: torch.device, product: Product, number: int
) -> None:
    require_fp8(device)
    rows, inputs, outputs = size_of(device, number)
    x = drawn(device, rows, inputs).requires_grad_()
    bias, gradient = drawn(device, outputs, seed=2), drawn(device, rows, outputs, seed=3) * 1e-5
    weight, scale = weight_of(device, outputs, inputs)
    plain = weight.double() * scale.double()

    found = fp8_linear(x, weight, scale, bias, product)
    found.backward(gradient)

    expected = x.detach().double() @ plain.T
    assert ROUNDING[0] < relative_error(found.double() - bias.double(), expected) < ROUNDING[1]
    assert x.grad is not None
    assert ROUNDING[0] < relative_error(x.grad, gradient.double() @ plain) < ROUNDING[1]
    direction = ((found.double() - bias.double()) * expected).sum() / expected.square().sum()
    # rounding is unbiased: nothing is lost on average; few rows share few errors
    assert direction.item() == pytest.approx(1, abs=max(0.01, 0.05 / rows**0.5))


@pytest.mark.parametrize("fast_sums", [FAST_SUMS, EXACT_SUMS])
@pytest.mark.parametrize("number", range(len(SIZES)))
@pytest.mark.parametrize("product", PRODUCTS)
def test_the_sums_themselves_are_near_those_of_float64(
    device: torch.device, product: Product, number: int, fast_sums: bool
) -> None:
    require_fp8(device)
    rows, inputs, outputs = size_of(device, number)
    a, row_scales = quantise_rows(drawn(device, rows, inputs))
    weight, scale = weight_of(device, outputs, inputs)
    bias = drawn(device, outputs, seed=2)
    expected = (a.double() * row_scales.double()) @ (weight.double() * scale.double()).T + bias.double()

    columns = scale.reshape(1, -1).contiguous()
    found = product(a, weight.t(), row_scales, columns, bias, torch.bfloat16, fast_sums)

    assert relative_error(found, expected) < SUMMING[fast_sums]


@pytest.mark.parametrize("product", PRODUCTS)
def test_an_outlier_costs_other_tokens_nothing(device: torch.device, product: Product) -> None:
    require_fp8(device)
    rows, inputs, outputs = size_of(device, 0)
    x, (weight, scale) = drawn(device, rows, inputs), weight_of(device, outputs, inputs)
    with_outlier = x.clone()
    with_outlier[3, 5] = 30000.0

    plain, found = (fp8_linear(each, weight, scale, None, product) for each in (x, with_outlier))

    assert equal_bits(found[:3], plain[:3])
    assert equal_bits(found[4:], plain[4:])
    exact = with_outlier[3:4].double() @ (weight.double() * scale.double()).T
    assert relative_error(found[3:4], exact) < ROUNDING[1] * 2


@pytest.mark.parametrize("product", PRODUCTS)
def test_channels_that_are_always_large_cost_little(device: torch.device, product: Product) -> None:
    """As in real transformers: a few input features are a hundred times as large as the others."""
    require_fp8(device)
    rows, inputs, outputs = size_of(device, 0)
    x, (weight, scale) = drawn(device, rows, inputs), weight_of(device, outputs, inputs)
    x[:, :: inputs // 8] *= 100
    found = fp8_linear(x, weight, scale, None, product)
    assert relative_error(found, x.double() @ (weight.double() * scale.double()).T) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_near_the_one_multiplied_in_16_bits(device: torch.device, kind: str) -> None:
    require_fp8(device)
    rows, inputs, outputs = size_of(device, 0)
    plain = drawn(device, outputs, inputs, seed=1) * (0.5 if kind == "cast" else inputs**-0.5)
    x, results = drawn(device, rows, inputs), []
    for product in (None, *PRODUCTS):
        layer = nn.Linear(inputs, outputs, bias=False, device=device, dtype=torch.bfloat16)
        quantisation = Quantisation(kind, product=product)  # type: ignore[arg-type]
        attach(layer, *quantise(plain, quantisation), quantisation)
        with torch.no_grad():
            results.append(layer(x))
    for found in results[1:]:
        assert found.dtype == torch.bfloat16
        assert relative_error(found, results[0]) < ROUNDING[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [None, (1,), (96, 1), (96, 4, 1)], ids=str)
def test_a_weight_multiplied_out_has_the_bits_of_the_definition(
    device: torch.device, shape: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    """fp8 numbers are exact in all these dtypes; the product is made in float32 and rounded once."""
    weight = drawn(device, 96, 64, dtype=torch.float32).to(E4M3)
    scale = None if shape is None else drawn(device, *shape, seed=1, dtype=torch.float32).abs()
    here, factor = weight.cpu().float(), None if scale is None else scale.cpu()
    if factor is not None:
        blocks = factor.shape[1] if factor.ndim == 3 else 1
        here = (here.unflatten(1, (blocks, -1)) * factor.reshape(-1, blocks, 1)).flatten(1)

    assert equal_bits(dequantise(weight, scale, dtype), here.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_device_rounds_weights_as_the_cpu_does(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    """A GPU divides the peak by 448 as a product with 1 / 448, so that the scale's last bit may differ; then
    a weight between two fp8 numbers may fall to the other side.
    """
    plain = drawn(torch.device("cpu"), 512, 640, dtype=torch.float32).to(dtype)
    quantisation = Quantisation(kind)  # type: ignore[arg-type]
    weight, scale = quantise(plain, quantisation)
    found, found_scale = quantise(plain.to(device), quantisation)

    assert (scale is None) == (found_scale is None) == (kind == "cast")
    if scale is None or found_scale is None:
        assert equal_bits(found, weight)
        return
    assert relative_error(found_scale, scale) < (2**-8 if dtype == torch.bfloat16 else 2**-22)
    ours, theirs = dequantise(found, found_scale), dequantise(weight, scale)
    assert relative_error(ours, plain) == pytest.approx(relative_error(theirs, plain), rel=0.05)
    if dtype != torch.bfloat16:
        assert (found.cpu().float() != weight.float()).double().mean() < 1e-3


def test_whether_the_device_has_fp8_units_is_found(device: torch.device) -> None:
    if device.type == "cpu":
        assert not supports_fp8(device)
        with pytest.raises(OptionError, match="the device cpu has no fp8 units"):
            choose_product(device)
        return
    assert supports_fp8(device) == (torch.cuda.get_device_capability() >= LEAST_CAPABILITY)
    if not supports_fp8(device):
        with pytest.raises(OptionError, match="has no fp8 units"):
            choose_product(device)
        return
    assert choose_product(device) in PRODUCTS
    asked = add_product(Quantisation("rows", fp8_matmul=True), device)
    assert asked is not None
    assert asked.product in PRODUCTS
