"""The order of torch's kernels.

None of those for GPUs runs here: what is tested is the order, and that torch obeys it.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from modules.attention import sdpa as attention_sdpa
from modules.attention.sdpa import attend_in_order, attend_with_bias, cudnn_note, key_bias, list_kernels
from tests.commands import ROOT, run_python

CUDNN, FLASH, EFFICIENT, MATH = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
GOOD = 91501


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "has_mask", "cudnn", "is_first"),
    [
        ((9, 0), torch.bfloat16, 128, False, GOOD, True),
        ((9, 0), torch.float16, 64, False, 92200, True),
        ((10, 0), torch.bfloat16, 128, False, GOOD, True),
        ((10, 3), torch.bfloat16, 128, False, GOOD, True),
        ((10, 7), torch.bfloat16, 128, False, 92400, False),  # no plans for it in this version
        ((12, 0), torch.bfloat16, 128, False, GOOD, False),
        ((8, 0), torch.bfloat16, 128, False, GOOD, False),
        ((8, 9), torch.bfloat16, 128, False, GOOD, False),
        ((9, 0), torch.float32, 128, False, GOOD, False),
        ((9, 0), torch.bfloat16, 100, False, GOOD, False),
        ((9, 0), torch.bfloat16, 256, False, GOOD, False),
        ((9, 0), torch.bfloat16, 512, False, GOOD, False),  # the VAE's
        ((9, 0), torch.bfloat16, 128, True, GOOD, False),
        ((9, 0), torch.bfloat16, 128, False, 91500, False),
        ((9, 0), torch.bfloat16, 128, False, None, False),
    ],
)
def test_cudnn_comes_first_where_it_is_the_fastest_and_known_to_be_right(
    capability: tuple[int, int],
    dtype: torch.dtype,
    width: int,
    has_mask: bool,
    cudnn: int | None,
    is_first: bool,
) -> None:
    expected = [CUDNN, FLASH, EFFICIENT, MATH] if is_first else [FLASH, EFFICIENT, MATH]
    assert list_kernels(capability, dtype, width, has_mask, cudnn) == expected


@pytest.mark.parametrize(
    ("capability", "cudnn", "speaks"),
    [((9, 0), GOOD, False), ((9, 0), 91002, True), ((10, 0), None, True), ((8, 9), 91002, False)],
)
def test_a_gpu_whose_fastest_kernel_is_left_out_is_told_of(
    capability: tuple[int, int], cudnn: int | None, speaks: bool
) -> None:
    note = cudnn_note(capability, cudnn)
    assert (note is not None) is speaks
    if note is not None:
        assert "9.15.1" in note
        assert "Install torch for CUDA 13" in note


@pytest.mark.slow
def test_neither_attention_nor_networks_that_are_made_import_the_compiler() -> None:
    """That takes longer than all else at the start of a program."""
    code = """
import sys
from torch import nn
import modules.attention.attend
from checkpoints.filling import on_meta_device
from tests.tiny.wan_dit import CONFIGS
from wan.model import WanModel

with on_meta_device():
    nn.Embedding(4, 4), nn.LayerNorm(4), nn.Conv3d(4, 4, 1), WanModel(CONFIGS["t2v"])
assert 'torch._dynamo' not in sys.modules
"""
    run_python("-c", code, folder=ROOT)


def test_a_bias_of_keys_has_the_queries_dtype_and_one_row() -> None:
    """CUDA's kernel for a bias takes it in no other dtype, and a row for each query would take gigabytes."""
    repeats = torch.tensor([1.0, 2.0, 505.0])
    bias = key_bias(repeats, 1000, torch.bfloat16)

    assert (bias.dtype, tuple(bias.shape)) == (torch.bfloat16, (1, 1, 1000, 3))
    assert bias.untyped_storage().nbytes() == 3 * 2
    torch.testing.assert_close(bias[0, 0, -1].exp().float(), repeats, rtol=0.02, atol=0)


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def _heads() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 30, 16, generator=generator, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("order", [[EFFICIENT, MATH], [FLASH, MATH]])
def test_scores_are_scaled_as_asked(order: list[SDPBackend]) -> None:
    q, k, v = _heads()
    bias = torch.linspace(-1, 1, 900).view(1, 1, 30, 30)
    expected = (q @ k.transpose(2, 3) + bias).softmax(-1) @ v

    torch.testing.assert_close(attend_in_order(q, k, v, bias, order, 1.0), expected)
    torch.testing.assert_close(attend_with_bias(q, k, v, bias, 1.0), expected)


# a CPU has two of the kernels, and obeys which of them are allowed
@pytest.mark.parametrize(
    ("order", "is_flash"), [([CUDNN, FLASH, EFFICIENT, MATH], True), ([CUDNN, MATH], False)]
)
def test_only_the_kernels_given_are_used_and_the_backward_pass_takes_the_forward_ones(
    order: list[SDPBackend], is_flash: bool
) -> None:
    inputs = _heads()
    before = torch._C._get_sdp_priority_order()

    with _Names() as forward:
        result = attend_in_order(*inputs, None, order)
    with _Names() as backward:  # outside the order
        result.sum().backward()

    assert any("flash_attention" in name for name in forward.names) is is_flash
    assert any("flash_attention_for_cpu_backward" in name for name in backward.names) is is_flash
    torch.testing.assert_close(result, functional.scaled_dot_product_attention(*inputs), atol=1e-6, rtol=1e-6)
    assert torch._C._get_sdp_priority_order() == before
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.math_sdp_enabled()


@pytest.mark.parametrize(
    ("batch", "learns", "calls"), [(3, True, 3), (3, False, 1), (1, True, 1)], ids=["learns", "makes", "one"]
)
def test_cudnn_gets_one_sample_at_a_time_where_there_are_gradients(
    monkeypatch: pytest.MonkeyPatch, batch: int, learns: bool, calls: int
) -> None:
    """As on a GPU whose kernel is cuDNN's: the samples of a batch are those of separate calls."""
    seen: list[int] = []

    def attend_plainly(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, order: Any) -> Tensor:
        seen.append(len(q))
        return functional.scaled_dot_product_attention(q, k, v)

    inputs = [torch.randn(batch, 7, 2, 8).requires_grad_(learns) for _ in range(3)]
    expected = attention_sdpa.sdpa(*inputs)
    monkeypatch.setattr(attention_sdpa, "attend_in_order", attend_plainly)
    monkeypatch.setattr(attention_sdpa, "list_kernels", lambda *facts, **of_call: [CUDNN, MATH])
    monkeypatch.setattr(attention_sdpa, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention_sdpa, "is_on_cuda", lambda tensor: True)

    found = attention_sdpa.sdpa(*inputs)

    torch.testing.assert_close(found, expected)
    assert found.is_contiguous()
    assert seen == [batch // calls] * calls


@pytest.mark.usefixtures("nothing_compiled")
def test_the_order_is_the_gpus_under_compile_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the GPU is a constant of the graph."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: GOOD)

    def order(x: Tensor) -> Tensor:
        capability, version = attention_sdpa._capability(x.device), attention_sdpa._cudnn_version()
        first = list_kernels(capability, torch.bfloat16, x.shape[-1], False, version)[0]
        return x + (1 if first == CUDNN else 2)

    result = torch.compile(order, fullgraph=True, backend="eager")(torch.zeros(2, 128))

    assert result.unique().tolist() == [1]
