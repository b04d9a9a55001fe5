"""Attention of every back end that a machine has, against float64 on the CPU, forward and backward.

Tolerances are relative errors of a whole tensor. Rounding to bf16 is 2^-9 of a value, at most; inputs are
exact here, the weights of the softmax and the result are rounded, in the backward pass some products more.
"""

import importlib.util
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from modules.attention.attend import BACKENDS, attend, check_backend, lengths_on
from modules.attention.sdpa import attend_with_bias, kernels
from modules.speed_options import SDPA, AttentionChoice
from tests.gpu.measuring import relative_error

pytestmark = pytest.mark.gpu

FORWARD = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
BACKWARD = {torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
EIGHT_BITS = 0.06  # of SageAttention, which rounds queries and keys to 8 bits
SIZES = [  # batch, queries, keys, heads, width
    pytest.param((2, 128, 128, 2, 128), id="128"),
    pytest.param((1, 333, 333, 3, 128), id="odd"),
    pytest.param((2, 257, 77, 2, 64), id="cross 64"),
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
    lengths = None if counts is None else lengths_on(counts, device)
    result = attend(*sources, choice, lengths, None if repeats is None else repeats.to(device))
    return [result.detach(), *(torch.autograd.grad(result, sources, gradient) if learns else ())]


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    for ours, theirs, tolerance in zip(
        found, expected, [FORWARD[dtype], *[BACKWARD[dtype]] * 3], strict=False
    ):
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
    assert_near(attend_on(inputs, SDPA, cuda, repeats=repeats), expected, dtype)


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
    learns = require(name, cuda)
    inputs = draw(size, dtype)
    found = attend_on(inputs, AttentionChoice(name), cuda, learns=learns)
    if learns:
        assert_near(found, exact_with_gradients(inputs), dtype)
    else:
        assert relative_error(found[0], exact_with_gradients(inputs)[0]) <= EIGHT_BITS


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("split", [False, True])
def test_packages_on_samples_of_different_lengths(cuda: torch.device, name: str, split: bool) -> None:
    learns = require(name, cuda)
    counts, inputs = (201, 77, 1), draw((3, 201, 201, 2, 128), torch.bfloat16)
    expected = exact_with_gradients(inputs, counts)
    found = attend_on(inputs, AttentionChoice(name, split), cuda, counts, learns=learns)
    if learns:
        assert_near(found, expected, torch.bfloat16)
    else:
        assert relative_error(found[0], expected[0]) <= EIGHT_BITS
    assert not found[0][1, 77:].any()


def require(name: str, device: torch.device) -> bool:
    """Skip if the package is missing or is for other GPUs; return whether it has gradients.

    A package that is there and for this GPU has to pass what a run checks.
    """
    package = BACKENDS[name].package
    assert package is not None
    if importlib.util.find_spec(package.module.partition(".")[0]) is None:
        pytest.skip(f"{package.name} is not installed")
    capability = torch.cuda.get_device_capability(device)
    if package.only is not None and capability != package.capability:
        pytest.skip(f"{package.name} runs on {package.only}")
    check_backend(AttentionChoice(name), device, lambda: torch.bfloat16, training=package.learns)
    return package.learns


@pytest.mark.parametrize("length", [512, 1023])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_the_first_kernel_of_the_order_is_taken(
    cuda: torch.device, dtype: torch.dtype, width: int, length: int
) -> None:
    """Also in the backward pass. With a mask it is not the one of cuDNN."""
    order = kernels(torch.cuda.get_device_capability(), dtype, width, False, torch.backends.cudnn.version())
    first = order[0].name.removesuffix("_ATTENTION").lower()
    inputs = draw((1, length, length, 2, width), dtype)
    names = operators_in(lambda: attend_on(inputs, SDPA, cuda))
    assert [name for name in names if f"{first}_attention" in name and "backward" not in name]
    assert [name for name in names if f"{first}_attention_backward" in name]
    names = operators_in(lambda: attend_on(inputs, SDPA, cuda, repeats=torch.ones(length)))
    assert not [name for name in names if "cudnn_attention" in name]


def operators_in(call: Callable[[], object]) -> set[str]:
    """The names of all operators, also of compiled code."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.key for event in profile.key_averages()}


def test_compiled_attention_takes_the_kernel_that_uncompiled_attention_takes(cuda: torch.device) -> None:
    inputs = draw((1, 1000, 1000, 2, 128), torch.bfloat16)
    query, key, value = (each.to(cuda).requires_grad_() for each in inputs[:3])
    gradient = inputs[3].to(cuda)
    capability, cudnn = torch.cuda.get_device_capability(), torch.backends.cudnn.version()
    first = kernels(capability, torch.bfloat16, 128, False, cudnn)[0].name.removesuffix("_ATTENTION").lower()
    compiled = torch.compile(attend, fullgraph=True)
    compiled(query, key, value).backward(gradient)
    names = operators_in(lambda: compiled(query, key, value).backward(gradient))
    assert any(f"{first}_attention" in name and "backward" not in name for name in names), names
    assert any(f"{first}_attention_backward" in name for name in names), names


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
        order = kernels((9, 0), torch.bfloat16, 128, False, version)
        assert order[0].name == "CUDNN_ATTENTION", f"cuDNN {version} is too old"
