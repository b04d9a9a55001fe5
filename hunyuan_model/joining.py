"""Concatenate video and text tokens by writing each part directly into the result.

Without compilation, an operator that makes part of a tensor and the `torch.cat` after it are two passes over
that part, and gradients of slices are full-size tensors, filled with zeros and added. Here parts are written
into the full tensor, forward and backward, with bit-equal results. Compiled code uses plain operators, which
the compiler merges.
"""
# Letters: B batch, L video tokens, T text tokens, N heads, D head width, C = N * D, F width of a feed-forward

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.autograd.function import once_differentiable

from modules.layers.rope import rotate


def gelu(x: Tensor) -> Tensor:
    """Apply GELU in its tanh approximation, as the model was trained."""
    return functional.gelu(x, approximate="tanh")


def join_gelu(attended: Tensor, hidden: Tensor) -> Tensor:
    """Return (attended, gelu(hidden)), B L C+F, for attended B L C and hidden B L F."""
    if torch.compiler.is_compiling() or attended.dtype != hidden.dtype:
        return torch.cat([attended, gelu(hidden)], dim=-1)
    joined: Tensor = _JoinGelu.apply(attended, hidden)
    return joined


class _JoinGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attended: Tensor, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        width = attended.shape[-1]
        joined = hidden.new_empty(*hidden.shape[:-1], width + hidden.shape[-1])
        joined[..., :width] = attended
        torch.ops.aten.gelu.out(hidden, approximate="tanh", out=joined[..., width:])
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (hidden,) = ctx.saved_tensors
        widths = (gradient.shape[-1] - hidden.shape[-1], hidden.shape[-1])
        of_attended, of_gelu = gradient.split(widths, dim=-1)
        return of_attended, torch.ops.aten.gelu_backward(of_gelu, hidden, approximate="tanh")


def rotate_first(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the first L tokens of x, B L+T N D, by `table`, the cosines and sines of L positions."""
    length = table.shape[-4]
    if _is_plain(x, table):
        return torch.cat([rotate(x[:, :length], table), x[:, length:]], dim=1)
    rotated: Tensor = _RotateAndJoin.apply(x, None, table)
    return rotated


def rotate_and_join(video: Tensor, text: Tensor, table: Tensor) -> Tensor:
    """Rotate video tokens, B L N D, by their positions, and append text tokens, B T N D."""
    if _is_plain(video, table) or video.dtype != text.dtype:
        return torch.cat([rotate(video, table), text], dim=1)
    joined: Tensor = _RotateAndJoin.apply(video, text, table)
    return joined


def _is_plain(x: Tensor, table: Tensor) -> bool:
    return torch.compiler.is_compiling() or table.dtype != torch.float32 or x.dtype.itemsize > 4


class _RotateAndJoin(torch.autograd.Function):
    """Rotate the first tokens of x by a rotary table and append the text tokens, or the rest of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, text: Tensor | None, table: Tensor) -> Tensor:
        """Return the joined tokens, B L+T N D, for x B L N D with a text B T N D, or x B L+T N D without."""
        # an attribute instead of a saved tensor: the table outlives the step (`modules.layers.modulation`)
        ctx.table = table
        ctx.has_text = text is not None
        length = table.shape[-4]
        unrotated = x[:, length:] if text is None else text
        joined = x.new_empty(len(x), length + unrotated.shape[1], *x.shape[2:])
        _rotate(x[:, :length], torch.view_as_complex(table), joined[:, :length])
        joined[:, length:] = unrotated
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the text; rotated tokens are rotated back."""
        length = ctx.table.shape[-4]
        grad_rotated = gradient[:, :length]
        grad_unrotated = gradient[:, length:]
        grad_x = gradient.new_empty(grad_rotated.shape if ctx.has_text else gradient.shape)
        _rotate(grad_rotated, torch.view_as_complex(ctx.table).conj(), grad_x[:, :length])
        if ctx.has_text:
            return grad_x, grad_unrotated, None
        grad_x[:, length:] = grad_unrotated
        return grad_x, None, None


def _rotate(x: Tensor, table: Tensor, out: Tensor) -> None:
    """Write x, B L N D, rotated by a complex table, L 1 D/2, into `out`."""
    if x.dtype == torch.float32:
        x = x if x.stride(-1) == 1 else x.contiguous()
        torch.mul(_as_complex(x), table, out=_as_complex(out))
    else:
        wide = x.to(torch.float32, memory_format=torch.contiguous_format)
        _as_complex(wide).mul_(table)
        out.copy_(wide)


def _as_complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
