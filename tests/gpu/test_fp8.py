"""fp8 products of real widths against float64, and weights in 8 bits multiplied out, on a GPU.

What is tolerated: rounding a factor to e4m3 costs 2.7 % root mean square, whatever its size; a product's own
error is that of rounding to bf16, 2^-9 at most, and with fast sums on Hopper that of partial sums of 14 bits.
"""

import pytest
import torch
from torch import Tensor

from modules.errors import OptionError
from modules.fp8.products import (
    LEAST_CAPABILITY,
    Product,
    choose_product,
    fp8_linear,
    row_scaled_product,
    supports_fp8,
    tensor_scaled_product,
)
from modules.fp8.weights import dequantise, quantise
from modules.speed_options import Quantisation
from tests.gpu.measuring import equal_bits, relative_error

pytestmark = pytest.mark.gpu

E4M3 = torch.float8_e4m3fn
PRODUCTS = (row_scaled_product, tensor_scaled_product)
ROUNDING = (0.02, 0.035)  # relative error of a product one of whose factors was rounded to e4m3
# rows, inputs, outputs of Wan 14B and Wan 1.3B; few and odd numbers of rows
SIZES = [(4099, 5120, 13824), (1025, 13824, 5120), (77, 5120, 5120), (17, 48, 1536)]
# of Wan 14B, HunyuanVideo, FLUX.1, Lumina, HunyuanImage: features of block layers, in and out
LAYERS = (
    *((5120, 5120), (5120, 13824), (13824, 5120), (3072, 9216), (3072, 12288), (12288, 3072)),
    *((3072, 21504), (15360, 3072), (2304, 3840), (9216, 2304), (3584, 14336), (14336, 3584)),
)


@pytest.fixture
def fp8(cuda: torch.device) -> torch.device:
    if not supports_fp8(cuda):
        pytest.skip("this GPU has no fp8 units")
    return cuda


def drawn(device: torch.device, *shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
def test_output_and_gradient_are_as_near_as_rounding_allows(
    fp8: torch.device, product: Product, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    rows, inputs, outputs = size
    x = drawn(fp8, rows, inputs, dtype=dtype).requires_grad_()
    bias, gradient = drawn(fp8, outputs, seed=2, dtype=dtype), drawn(fp8, rows, outputs, seed=3, dtype=dtype)
    sizes = torch.logspace(-1.5, 0, outputs)[:, None].to(fp8)  # rows that differ by up to 30
    weight, scale = quantise(
        drawn(fp8, outputs, inputs, seed=1, dtype=torch.float32) * sizes * inputs**-0.5, Quantisation("rows")
    )
    assert scale is not None
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


@pytest.mark.parametrize("tokens", [16, 127, 256, 257, 300, 512, 4080])
@pytest.mark.parametrize(("columns", "rows"), LAYERS)
def test_the_gpu_has_a_kernel_for_every_layer(
    fp8: torch.device, columns: int, rows: int, tokens: int
) -> None:
    weight = torch.ones(rows, columns, device=fp8).to(E4M3)
    x = torch.ones(1, tokens, columns, device=fp8, dtype=torch.bfloat16, requires_grad=True)

    out = fp8_linear(x, weight, None, None, choose_product(fp8))
    (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))

    assert bool(((out / columns - 1).abs() < 0.01).all())
    assert bool(((gradient / rows - 1).abs() < 0.01).all())


def test_products_are_compiled_without_a_break(fp8: torch.device) -> None:
    product, weight = choose_product(fp8), torch.randn(96, 64, device=fp8).to(E4M3)
    torch._dynamo.reset()
    compiled = torch.compile(fp8_linear, fullgraph=True, dynamic=True)
    for tokens in (40, 400, 600):
        x = torch.randn(1, tokens, 64, device=fp8, dtype=torch.bfloat16)
        expected = fp8_linear(x, weight, None, None, product)
        assert relative_error(compiled(x, weight, None, None, product), expected) < 0.01
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_device_rounds_weights_as_the_cpu_does(cuda: torch.device, dtype: torch.dtype) -> None:
    """A GPU divides the peak by 448 as a product with 1 / 448, so that the scale's last bit may differ; then
    a weight between two fp8 numbers may fall to the other side. Multiplied out, both have the same bits.
    """
    plain = drawn(torch.device("cpu"), 512, 640, dtype=torch.float32).to(dtype)
    weight, scale = quantise(plain, Quantisation("rows"))
    found, found_scale = quantise(plain.to(cuda), Quantisation("rows"))

    assert scale is not None
    assert found_scale is not None
    assert relative_error(found_scale, scale) < (2**-8 if dtype == torch.bfloat16 else 2**-22)
    ours, theirs = dequantise(found, found_scale), dequantise(weight, scale)
    assert relative_error(ours, plain) == pytest.approx(relative_error(theirs, plain), rel=0.05)
    there = weight.to(cuda), scale.to(cuda)
    assert equal_bits(dequantise(*there, dtype), dequantise(weight, scale, dtype))


def test_whether_the_device_has_fp8_units_is_found(cuda: torch.device) -> None:
    assert supports_fp8(cuda) == (torch.cuda.get_device_capability() >= LEAST_CAPABILITY)
    if supports_fp8(cuda):
        assert choose_product(cuda) in PRODUCTS
    else:
        with pytest.raises(OptionError, match="has no fp8 units"):
            choose_product(cuda)
