"""Stand-ins for CUDA's fused kernels in a dry run: they allocate the same memory, and compute nothing.

A dry run has no device, and on fake tensors PyTorch would decompose attention and RMSNorm into steps
that a GPU never runs (a full matrix of scores, float32 copies).
"""
# Letters: B batch, L query tokens, S key tokens, N heads, D head width

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from modules.attention.sdpa import list_kernels

Operator = Callable[..., Any]


def planned(function: Operator) -> Operator:
    """Register a function that only allocates tensors as the operator `planned::<name>`.

    It is a single operator, like the kernel that it replaces, so that selective checkpointing may keep its
    results and the ledger of a dry run recognizes it by name.
    """
    operator = torch.library.custom_op(f"planned::{function.__name__}", function, mutates_args=())
    operator.register_fake(function)
    return operator


class _Attention(torch.autograd.Function):
    """Flash attention that only allocates its buffers: the result and the float32 log-sum-exp of each row.

    The backward pass needs the three gradients, the dot product of gradient and result of each row in
    float32, and another float32 gradient of the queries, which accumulates over blocks of keys. Source: Dao
    2023, arXiv 2307.08691, and the buffers of its released code; the cuDNN kernel's workspace has the same
    size.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result, sums = attention(query, key, value)
        ctx.save_for_backward(query, key, value, result, sums)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        query, *saved = ctx.saved_tensors
        workspace = attention_workspace(query)
        gradients = attention_backward(gradient, query, *saved)
        del workspace
        return gradients


@planned
def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate the output of a fused attention and its log-sum-exp for the backward pass."""
    return query.new_empty(query.shape), _make_row_numbers(query)


@planned
def attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, result: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three gradients. It takes all inputs of the kernel, so that its work can be counted."""
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


@planned
def attention_workspace(query: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate what the backward pass of attention needs: a float32 gradient and a number for each row."""
    return query.new_empty(query.shape, dtype=torch.float32), _make_row_numbers(query)


ATTENTION_WORKSPACE = "planned::attention_workspace"


def _make_row_numbers(query: Tensor) -> Tensor:
    batch, length, heads, _ = query.shape
    return query.new_empty((batch, heads, length), dtype=torch.float32)


def _rms_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Stand in for `torch.nn.functional.rms_norm` on CUDA: a single kernel, in float32 under autocast."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.float()
        weight = None if weight is None else weight.float()
    return _RmsNorm.apply(x, weight, len(shape))


class _RmsNorm(torch.autograd.Function):
    """RMS norm that saves only its inputs and one float32 number per row, as CUDA's kernel does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, axes: int) -> Tensor:
        result, factors = rms_norm(x, weight, axes)
        ctx.save_for_backward(x, weight, factors)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factors = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        for_x, for_weight = rms_norm_backward(gradient, x, weight, factors, needs_x, needs_weight)
        return for_x if needs_x else None, for_weight if needs_weight else None, None


@planned
def rms_norm(x: Tensor, weight: Tensor | None, axes: int) -> tuple[Tensor, Tensor]:
    """Allocate the outputs of a fused RMS norm: the result, and the reciprocal RMS of each row."""
    return torch.empty_like(x), x.new_empty(x.shape[: x.ndim - axes], dtype=torch.float32)


@planned
def rms_norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor | None, factors: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight; a gradient that is not needed has no elements."""
    needed = torch.empty_like(weight) if needs_weight and weight is not None else x.new_empty(0)
    return torch.empty_like(x) if needs_x else x.new_empty(0), needed


def _scaled_dot_product(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any
) -> Tensor:
    """Stand-in for torch's function: B N L D in and out, but results have the kernels' layout B L N D."""
    by_tokens = [_autocast(tensor).transpose(1, 2) for tensor in (query, key, value)]
    result: Tensor = _Attention.apply(*by_tokens)
    if result.requires_grad and len(query) > 1 and _prefers_cudnn(by_tokens[0], attn_mask is not None):
        # as `sdpa` does: the backward pass keeps each sample's result, and the next layer their concatenation
        result = torch.cat([result])
    return result.transpose(1, 2)


def _prefers_cudnn(query: Tensor, has_mask: bool) -> bool:
    """Return whether torch prefers cuDNN's attention kernel on this machine's GPU; False without one."""
    if not torch.cuda.is_available() or torch.are_deterministic_algorithms_enabled():
        return False
    order = list_kernels(
        torch.cuda.get_device_capability(),
        query.dtype,
        width=query.shape[-1],
        has_mask=has_mask,
        cudnn=torch.backends.cudnn.version(),
    )
    return order[0] == SDPBackend.CUDNN_ATTENTION


def _in_float32(function: Operator) -> Operator:
    """Wrap a function so that a dry run on the CPU computes it in float32, as autocast does on CUDA."""

    def run(x: Tensor, *inputs: Any, **named: Any) -> Tensor:
        if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
            x = x.float()
            inputs = tuple(_widen(value) for value in inputs)
            named = {name: _widen(value) for name, value in named.items()}
        result: Tensor = function(x, *inputs, **named)
        return result

    return run


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


def _addcmul(
    x: Tensor, first: Tensor, second: Tensor, *, value: float = 1, out: Tensor | None = None
) -> Tensor:
    """Stand in for `torch.addcmul`. Without `out`, CUDA's autocast casts the operands to the widest dtype."""
    if out is not None:
        return torch.addcmul(x, first, second, value=value, out=out)
    if torch.is_autocast_enabled(x.device.type):
        dtype = max((x.dtype, first.dtype, second.dtype), key=lambda dtype: dtype.itemsize)
        x, first, second = x.to(dtype), first.to(dtype), second.to(dtype)
    return torch.addcmul(x, first, second, value=value)


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Any, stride: Any, dilation: Any, groups: int
) -> Tensor:
    """Stand in for oneDNN's convolution, which a dry run cannot execute; the result has the same size."""
    return functional.conv3d(
        x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups
    )


def _autocast(tensor: Tensor) -> Tensor:
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


KERNELS: Mapping[Callable[..., Any], Callable[..., Tensor]] = {
    functional.rms_norm: _rms_norm,
    functional.layer_norm: _in_float32(functional.layer_norm),
    functional.group_norm: _in_float32(functional.group_norm),
    functional.interpolate: _in_float32(functional.interpolate),
    functional.scaled_dot_product_attention: _scaled_dot_product,
    torch.addcmul: _addcmul,
    torch.mkldnn_convolution: _convolution,
}


class PlannedKernels(TorchFunctionMode):
    """While active, replace torch functions that CUDA computes in one kernel by stand-ins.

    Torch disables such modes inside tensor methods such as `backward`; code that recomputes there has to
    activate this one again.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return KERNELS.get(func, func)(*args, **(kwargs or {}))
