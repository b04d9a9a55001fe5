"""Attention of every back end that a machine has, and fp8 products of real widths, against float64 on the
CPU, forward and backward.

Tolerances are relative errors of a whole tensor. Rounding to bf16 is 2^-9 of a value, at most; inputs are
exact here, the weights of the softmax and the result are rounded, in the backward pass some products more.
Rounding a factor to e4m3 costs 2.7 % root mean square, whatever its size; a product's own error is that of
rounding to bf16, and with fast sums on Hopper that of partial sums of 14 bits.
"""

import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from checkpoints.stored.fp8 import dequantize, quantize
from checkpoints.stored.fp8_products import (
    MIN_CAPABILITY,
    Product,
    fp8_linear,
    row_scaled_product,
    select_product,
    supports_fp8,
    tensor_scaled_product,
)
from modules.attention.attend import BACKENDS, attend, check_backend, make_lengths
from modules.attention.sdpa import attend_with_bias, list_kernels
from modules.errors import OptionError
from modules.speed_options import SDPA, AttentionChoice, Quantization
from tests.gpu.measuring import equal_bits, relative_error

pytestmark = pytest.mark.gpu

FORWARD = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
BACKWARD = {torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
EIGHT_BITS = 0.06  # of SageAttention, which rounds queries and keys to 8 bits
SIZES = [  # batch, queries, keys, heads, width
    pytest.param((2, 128, 128, 2, 128), id="128"),
    pytest.param((1, 333, 333, 3, 128), id="odd"),
    pytest.param((2, 257, 77, 2, 64), id="cross 64"),
    pytest.param((2, 754, 754, 2, 64), id="two odd"),
    pytest.param((2, 8, 8, 2, 64), id="two short"),
    pytest.param((1, 1, 129, 2, 64), id="one query"),
]
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:]
)
Size = tuple[int, int, int, int, int]


def draw(size: Size, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Query, key, value and a gradient of the result, on the CPU."""
    batch, queries, keys, heads, width = size
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, heads, width) for length in (queries, keys, keys, queries)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Sequence[int] | None = None,
    repeats: Tensor | None = None,
) -> Tensor:
    """The definition, in float64; rows beyond the counts are zeros."""
    scores = torch.einsum("blnd,bsnd->bnls", query, key) * query.shape[-1] ** -0.5
    if repeats is not None:
        scores = scores + repeats.double().log()
    real = None
    if counts is not None:
        real = torch.arange(key.shape[1])[None] < torch.tensor(counts)[:, None]
        scores = scores.masked_fill(~real[:, None, None], -torch.inf)
    result = torch.einsum("bnls,bsnd->blnd", scores.softmax(-1), value)
    return result if real is None else result * real[..., None, None]


def exact_with_gradients(
    inputs: Sequence[Tensor], counts: Sequence[int] | None = None, repeats: Tensor | None = None
) -> list[Tensor]:
    *sources, gradient = (tensor.double() for tensor in inputs)
    for source in sources:
        source.requires_grad_()
    result = exact(*sources, counts, repeats)
    return [result.detach(), *torch.autograd.grad(result, sources, gradient)]


def attend_on(
    inputs: Sequence[Tensor],
    choice: AttentionChoice,
    device: torch.device,
    counts: Sequence[int] | None = None,
    repeats: Tensor | None = None,
    learns: bool = True,
) -> list[Tensor]:
    """What the back end returns, and with `learns` the gradients."""
    *sources, gradient = (tensor.to(device).detach() for tensor in inputs)
    for source in sources:
        source.requires_grad_(learns)
    lengths = None if counts is None else make_lengths(counts, device)
    result = attend(*sources, choice, lengths, None if repeats is None else repeats.to(device))
    return [result.detach(), *(torch.autograd.grad(result, sources, gradient) if learns else ())]


def assert_near(
    found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype, cancels: float = 1.0
) -> None:
    """cancels: how many times as large as usual errors of gradients may be."""
    tolerances = [FORWARD[dtype], *[cancels * BACKWARD[dtype]] * 3]
    for ours, theirs, tolerance in zip(found, expected, tolerances, strict=False):
        assert ours.dtype == dtype
        assert relative_error(ours, theirs) <= tolerance


@DTYPES
@pytest.mark.parametrize("size", SIZES)
def test_sdpa_and_its_gradients(cuda: torch.device, size: Size, dtype: torch.dtype) -> None:
    inputs = draw(size, dtype)
    assert_near(attend_on(inputs, SDPA, cuda), exact_with_gradients(inputs), dtype)


@DTYPES
def test_sdpa_of_samples_of_different_lengths(cuda: torch.device, dtype: torch.dtype) -> None:
    counts, inputs = (201, 77, 1), draw((3, 201, 201, 2, 128), dtype)
    for tensor in inputs[:3]:
        for sample, count in enumerate(counts):
            tensor[sample, count:] = torch.nan  # padding is not even looked at
    clean = [tensor.nan_to_num() for tensor in inputs]
    found = attend_on(inputs, SDPA, cuda, counts)

    assert_near(found, exact_with_gradients(clean, counts), dtype)
    for tensor in found:
        assert not any(tensor[sample, count:].any() for sample, count in enumerate(counts))


@DTYPES
@pytest.mark.parametrize("keys", [7, 64, 41])  # with and without whole groups of 8 and 16
def test_keys_that_stand_for_several(cuda: torch.device, dtype: torch.dtype, keys: int) -> None:
    """As the padding of texts, computed once: gradients too."""
    repeats, inputs = torch.tensor([1.0] * (keys - 1) + [473.0]), draw((2, 130, keys, 2, 128), dtype)
    expected = exact_with_gradients(inputs, repeats=repeats)
    # one key has up to 98.7 % of a query's weight: gradients are what is left of the weighted
    # mean without this key's share, and 16 bits round both (2.7 % with 7 keys on an H200)
    assert_near(attend_on(inputs, SDPA, cuda, repeats=repeats), expected, dtype, cancels=2)


def test_gradients_with_a_bias_are_numbers_for_every_length(cuda: torch.device) -> None:
    """cuDNN's kernel makes NaN of such scores if 64 keys are left over (pytorch/pytorch#196678)."""
    for length in (64, 704, 640):
        inputs = [torch.randn(1, 2, length, 64, device=cuda, dtype=torch.bfloat16) * 0.1 for _ in range(3)]
        inputs[0][..., 0], inputs[1][..., 0] = 1.0, -120 * math.sqrt(64)
        q, k, v = (each.requires_grad_() for each in inputs)
        bias = torch.zeros(1, 1, length, length, dtype=torch.bfloat16, device=cuda)

        out = attend_with_bias(q, k, v, bias, 0.125)
        gradients = torch.autograd.grad(out.float().square().sum(), (q, k, v))

        assert all(bool(each.isfinite().all()) for each in (out, *gradients)), length


def test_long_sequences_are_summed_as_exactly(cuda: torch.device) -> None:
    inputs = draw((1, 8200, 8200, 1, 128), torch.bfloat16)
    assert_near(attend_on(inputs, SDPA, cuda), exact_with_gradients(inputs), torch.bfloat16)


OTHERS = [name for name in BACKENDS if name != "sdpa"]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_packages_and_their_gradients(cuda: torch.device, name: str, size: Size, dtype: torch.dtype) -> None:
    attend_by_package(AttentionChoice(name), draw(size, dtype), cuda)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("split", [False, True])
def test_packages_on_samples_of_different_lengths(cuda: torch.device, name: str, split: bool) -> None:
    inputs = draw((3, 201, 201, 2, 128), torch.bfloat16)
    found = attend_by_package(AttentionChoice(name, split), inputs, cuda, (201, 77, 1))
    assert not found[1, 77:].any()


def attend_by_package(
    choice: AttentionChoice,
    inputs: Sequence[Tensor],
    device: torch.device,
    counts: Sequence[int] | None = None,
) -> Tensor:
    """Return what a package makes, which is near the definition, and so are its gradients if it has some."""
    learns = require(choice.mode, device)
    found, expected = (
        attend_on(inputs, choice, device, counts, learns=learns),
        exact_with_gradients(inputs, counts),
    )
    if learns:
        assert_near(found, expected, inputs[0].dtype)
    else:
        assert relative_error(found[0], expected[0]) <= EIGHT_BITS
    return found[0]


def require(name: str, device: torch.device) -> bool:
    """Skip if the package is missing or is for other GPUs; return whether it has gradients.

    A package that is there and for this GPU has to pass what a run checks. SageAttention 1 does not, and
    every run refuses it.
    """
    package = BACKENDS[name]
    if importlib.util.find_spec(package.module.partition(".")[0]) is None:
        pytest.skip(f"{package.name} is not installed")
    if name == "sage" and importlib.metadata.version("sageattention").startswith("1."):
        pytest.skip("SageAttention 1 attends to padding")
    capability = torch.cuda.get_device_capability(device)
    if package.only is not None and capability != package.capability:
        pytest.skip(f"{package.name} runs on {package.only}")
    check_backend(AttentionChoice(name), device, lambda: torch.bfloat16, training=package.has_backward)
    return package.has_backward


@pytest.mark.parametrize("length", [512, 1023])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_the_first_kernel_of_the_order_is_taken(
    cuda: torch.device, dtype: torch.dtype, width: int, length: int
) -> None:
    """Also in the backward pass. With a mask it is not the one of cuDNN."""
    inputs = draw((1, length, length, 2, width), dtype)
    assert_first_kernel(operators_in(lambda: attend_on(inputs, SDPA, cuda)), dtype, width)
    names = operators_in(lambda: attend_on(inputs, SDPA, cuda, repeats=torch.ones(length)))
    assert not [name for name in names if "cudnn_attention" in name]


def assert_first_kernel(names: set[str], dtype: torch.dtype, width: int) -> None:
    """Among these operators are both passes of the fastest kernel."""
    order = list_kernels(
        torch.cuda.get_device_capability(), dtype, width, False, torch.backends.cudnn.version()
    )
    first = order[0].name.removesuffix("_ATTENTION").lower()
    assert any(f"{first}_attention" in name and "backward" not in name for name in names), names
    assert any(f"{first}_attention_backward" in name for name in names), names


def operators_in(call: Callable[[], object]) -> set[str]:
    """The names of all operators, also of compiled code."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.key for event in profile.key_averages()}


def test_compiled_attention_takes_the_kernel_that_uncompiled_attention_takes(cuda: torch.device) -> None:
    inputs = draw((1, 1000, 1000, 2, 128), torch.bfloat16)
    query, key, value = (each.to(cuda).requires_grad_() for each in inputs[:3])
    gradient = inputs[3].to(cuda)
    compiled = torch.compile(attend, fullgraph=True)
    compiled(query, key, value).backward(gradient)
    names = operators_in(lambda: compiled(query, key, value).backward(gradient))
    assert_first_kernel(names, torch.bfloat16, 128)


def test_deterministic_attention_gives_equal_bits(cuda: torch.device, deterministic: None) -> None:
    inputs = draw((1, 1500, 1500, 4, 128), torch.bfloat16)
    first, *others = [attend_on(inputs, SDPA, cuda) for _ in range(4)]
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_the_fastest_kernel_is_there_for_training(cuda: torch.device) -> None:
    """What the log says when it is not: an old cuDNN on a Hopper GPU would cost a third of the speed."""
    check_backend(SDPA, cuda, lambda: torch.bfloat16, training=True)
    if torch.cuda.get_device_capability() == (9, 0):
        version = torch.backends.cudnn.version()
        assert version is not None
        order = list_kernels((9, 0), torch.bfloat16, 128, False, version)
        assert order[0].name == "CUDNN_ATTENTION", f"cuDNN {version} is too old"


E4M3 = torch.float8_e4m3fn
PRODUCTS = (row_scaled_product, tensor_scaled_product)
ROUNDING = (0.02, 0.035)  # relative error of a product one of whose factors was rounded to e4m3
# rows, inputs, outputs of Wan 14B and Wan 1.3B; few and odd numbers of rows
PRODUCT_SIZES = [(4099, 5120, 13824), (1025, 13824, 5120), (77, 5120, 5120), (17, 48, 1536)]
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
@pytest.mark.parametrize("size", PRODUCT_SIZES, ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
def test_output_and_gradient_are_as_near_as_rounding_allows(
    fp8: torch.device, product: Product, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    rows, inputs, outputs = size
    x = drawn(fp8, rows, inputs, dtype=dtype).requires_grad_()
    bias, gradient = drawn(fp8, outputs, seed=2, dtype=dtype), drawn(fp8, rows, outputs, seed=3, dtype=dtype)
    sizes = torch.logspace(-1.5, 0, outputs)[:, None].to(fp8)  # rows that differ by up to 30
    weight, scale = quantize(
        drawn(fp8, outputs, inputs, seed=1, dtype=torch.float32) * sizes * inputs**-0.5, Quantization("rows")
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
    # Signs are random, as fast sums of Hopper lose what is far below the sum so far: of 14,336 ones,
    # measured on an H100, 9,344 are left. Sums of either sign stay small, and exact until the last rounding.
    signs = torch.randint(0, 2, (rows, columns), generator=torch.Generator().manual_seed(0)) * 2 - 1
    weight = signs.to(fp8, torch.float32).to(E4M3)
    x = torch.ones(1, tokens, columns, device=fp8, dtype=torch.bfloat16, requires_grad=True)

    out = fp8_linear(x, weight, None, None, select_product(fp8))
    (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))

    assert relative_error(out, signs.sum(dim=1).expand(out.shape)) < 0.01
    assert relative_error(gradient, signs.sum(dim=0).expand(gradient.shape)) < 0.01


def test_products_are_compiled_without_a_break(fp8: torch.device) -> None:
    product, weight = select_product(fp8), torch.randn(96, 64, device=fp8).to(E4M3)
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
    weight, scale = quantize(plain, Quantization("rows"))
    found, found_scale = quantize(plain.to(cuda), Quantization("rows"))

    assert scale is not None
    assert found_scale is not None
    assert relative_error(found_scale, scale) < (2**-8 if dtype == torch.bfloat16 else 2**-22)
    ours, theirs = dequantize(found, found_scale), dequantize(weight, scale)
    assert relative_error(ours, plain) == pytest.approx(relative_error(theirs, plain), rel=0.05)
    there = weight.to(cuda), scale.to(cuda)
    assert equal_bits(dequantize(*there, dtype), dequantize(weight, scale, dtype))


def test_whether_the_device_has_fp8_units_is_found(cuda: torch.device) -> None:
    assert supports_fp8(cuda) == (torch.cuda.get_device_capability() >= MIN_CAPABILITY)
    if supports_fp8(cuda):
        assert select_product(cuda) in PRODUCTS
    else:
        with pytest.raises(OptionError, match="has no fp8 units"):
            select_product(cuda)
