"""fp8 products with numbers of tokens and dtypes that are no hardware tile's.

On a CPU torch computes them with a slow kernel of its own.
"""

import pytest
import torch

from modules.fp8.products import (
    Product,
    choose_product,
    fp8_linear,
    row_scaled_product,
    tensor_scaled_product,
)
from tests.fp8_reference import emulated_product
from tests.gpu.measuring import relative_error

E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize("product", [row_scaled_product, tensor_scaled_product])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [16, 17, 33, 1000])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_and_gradients_are_those_of_the_emulation(
    device: torch.device, product: Product, dtype: torch.dtype, tokens: int, has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns = 1536, 48  # of the thinnest layer that suits, and of Wan 1.3B
    weight = torch.randn(rows, columns, generator=generator).to(device, E4M3)
    scale = (torch.rand(rows, 1, generator=generator) + 0.1).to(device)
    bias = torch.randn(rows, generator=generator).to(device, dtype) if has_bias else None
    x = torch.randn(1, tokens, columns, generator=generator).to(device, dtype)
    gradient = torch.randn(1, tokens, rows, generator=generator).to(device, dtype)

    found = []
    for each in (product, emulated_product):
        given = x.clone().requires_grad_()
        out = fp8_linear(given, weight, scale, bias, each)
        found.append((out, *torch.autograd.grad(out, given, gradient)))

    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == dtype
        # bfloat16's rounding, twice; sums in 14 bits (`FAST_SUMS`)
        assert relative_error(ours, theirs) < 0.01


# of Wan 14B, HunyuanVideo, FLUX.1, Lumina, HunyuanImage: features of block layers, in and out
LAYERS = (
    *((5120, 5120), (5120, 13824), (13824, 5120), (3072, 9216), (3072, 12288), (12288, 3072)),
    *((3072, 21504), (15360, 3072), (2304, 3840), (9216, 2304), (3584, 14336), (14336, 3584)),
)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [16, 127, 256, 257, 300, 512, 4080])
@pytest.mark.parametrize(("columns", "rows"), LAYERS)
def test_the_gpu_has_a_kernel_for_every_layer(
    cuda: torch.device, columns: int, rows: int, tokens: int
) -> None:
    product = choose_product(cuda)
    weight = torch.ones(rows, columns, device=cuda).to(E4M3)
    x = torch.ones(1, tokens, columns, device=cuda, dtype=torch.bfloat16, requires_grad=True)

    out = fp8_linear(x, weight, None, None, product)
    (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))

    assert bool(((out / columns - 1).abs() < 0.01).all())
    assert bool(((gradient / rows - 1).abs() < 0.01).all())


@pytest.mark.gpu
def test_products_are_compiled_without_a_break(cuda: torch.device) -> None:
    product = choose_product(cuda)
    weight = torch.randn(96, 64, device=cuda).to(E4M3)
    torch._dynamo.reset()
    compiled = torch.compile(fp8_linear, fullgraph=True, dynamic=True)
    for tokens in (40, 400, 600):
        x = torch.randn(1, tokens, 64, device=cuda, dtype=torch.bfloat16)
        expected = fp8_linear(x, weight, None, None, product)
        assert relative_error(compiled(x, weight, None, None, product), expected) < 0.01
    torch._dynamo.reset()


@pytest.mark.gpu
def test_a_product_is_found_for_this_gpu(cuda: torch.device) -> None:
    assert choose_product(cuda) in (row_scaled_product, tensor_scaled_product)
