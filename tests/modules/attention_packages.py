"""Stand-ins for the packages that compute attention: they take what the real ones take, and compute it with
torch.

Signatures and layouts after the packages' own: flash_attn 2.8 (flash_attn_interface.py), the hopper build of
FlashAttention 3, sageattention 2.2 (core.py), xformers (ops/fmha). Nothing here shows that the real kernels
run.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """A call as it came: the function, the shape of its query, and what the arguments behind the value
    were.
    """

    function: str
    shape: tuple[int, ...]
    more: tuple[Any, ...] = ()


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of B L N D."""
    assert q.dtype == k.dtype == v.dtype
    assert all(one.stride(-1) == 1 for one in (q, k, v))
    heads = (one.transpose(1, 2) for one in (q, k, v))
    return functional.scaled_dot_product_attention(*heads).transpose(1, 2)


def packed(q: Tensor, k: Tensor, v: Tensor, q_starts: Sequence[int], k_starts: Sequence[int]) -> Tensor:
    """Attention of T N D, sample by sample."""
    assert q_starts[-1] == len(q)
    assert k_starts[-1] == len(k) == len(v)
    ends = zip(q_starts, q_starts[1:], k_starts, k_starts[1:], strict=False)
    return torch.cat([dense(q[None, a:b], k[None, c:d], v[None, c:d])[0] for a, b, c, d in ends])


def put_in(monkeypatch: pytest.MonkeyPatch, mode: str) -> list[Call]:
    """Have the package of this back end be importable. Returns the calls it gets."""
    calls: list[Call] = []
    for name, members in PACKAGES[mode](calls).items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


Members = dict[str, dict[str, Any]]  # module -> what is in it


def _flash(calls: list[Call], wrap: Callable[[Tensor], Any] = lambda out: out) -> dict[str, Any]:
    # both packages go on after these arguments in orders of their own (FlashAttention 2 with dropout_p, 3
    # with seqused_q)
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Any:
        calls.append(Call("flash_attn_func", tuple(q.shape)))
        return wrap(dense(q, k, v))

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *longest: int
    ) -> Any:
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        starts = cu_seqlens_q.tolist()
        calls.append(Call("flash_attn_varlen_func", tuple(q.shape), (starts, *longest)))
        return wrap(packed(q, k, v, starts, cu_seqlens_k.tolist()))

    return {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}


def _sage(calls: list[Call]) -> Members:
    def sageattn(
        q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False
    ) -> Tensor:
        assert tensor_layout == "NHD"
        calls.append(Call("sageattn", tuple(q.shape), (is_causal,)))
        return dense(q, k, v)

    return {"sageattention": {"sageattn": sageattn}}


def _xformers(calls: list[Call]) -> Members:
    @dataclass(frozen=True)
    class BlockDiagonalMask:
        counts: tuple[int, ...]

        @classmethod
        def from_seqlens(cls, q_seqlen: Sequence[int]) -> "BlockDiagonalMask":
            return cls(tuple(q_seqlen))

    def memory_efficient_attention(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: BlockDiagonalMask | None = None
    ) -> Tensor:
        more = () if attn_bias is None else (attn_bias.counts,)
        calls.append(Call("memory_efficient_attention", tuple(query.shape), more))
        if attn_bias is None:
            return dense(query, key, value)
        assert len(query) == 1
        starts = [sum(attn_bias.counts[:index]) for index in range(len(attn_bias.counts) + 1)]
        return packed(query[0], key[0], value[0], starts, starts)[None]

    members = {"memory_efficient_attention": memory_efficient_attention}
    return {
        "xformers": {},
        "xformers.ops": members,
        "xformers.ops.fmha": {},
        "xformers.ops.fmha.attn_bias": {"BlockDiagonalMask": BlockDiagonalMask},
    }


PACKAGES: dict[str, Callable[[list[Call]], Members]] = {
    "flash": lambda calls: {"flash_attn": _flash(calls)},
    "flash3": lambda calls: {"flash_attn_interface": _flash(calls)},
    "flash3 of an early build": lambda calls: {
        "flash_attn_interface": _flash(calls, lambda out: (out, torch.zeros(1)))
    },
    "sage": _sage,
    "xformers": _xformers,
}
