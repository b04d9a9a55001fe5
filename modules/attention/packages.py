"""Attention by packages that are no part of torch. Each is imported here only, when it is first used.

`modules.attention.attend.check_backend` has said before anything is loaded whether a package is there.
"""
# Letters: B batch, L query tokens, S key tokens, T real tokens of all samples together, N heads, D head width

from typing import Any

from torch import Tensor

from modules.attention.lengths import Lengths


def flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """FlashAttention 2 (Dao 2023, arXiv 2307.08691): B L N D."""
    from flash_attn import flash_attn_func

    return flash_attn_func(query, key, value)


def flash_packed(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths) -> Tensor:
    """The same for T N D."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query, key, value, lengths.starts, lengths.starts, lengths.longest, lengths.longest
    )


def flash3(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """FlashAttention 3 (Shah et al. 2024, arXiv 2407.08608): B L N D."""
    from flash_attn_interface import flash_attn_func

    return _output(flash_attn_func(query, key, value))


def flash3_packed(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths) -> Tensor:
    """The same for T N D."""
    from flash_attn_interface import flash_attn_varlen_func

    starts, longest = lengths.starts, lengths.longest
    return _output(flash_attn_varlen_func(query, key, value, starts, starts, longest, longest))


def sage(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """SageAttention (Zhang et al. 2024, arXiv 2410.02367): B L N D, without gradients.

    Its function for packed tokens is an older and slower kernel, so that padded batches go sample by sample.
    """
    from sageattention import sageattn

    return sageattn(query, key, value, tensor_layout="NHD")  # the package's letters for B L N D


def xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """xFormers' memory-efficient attention: B L N D."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(query, key, value)


def xformers_packed(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths) -> Tensor:
    """The same for T N D, under a mask that is a list of lengths and no matrix."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens(list(lengths.counts))
    return memory_efficient_attention(query[None], key[None], value[None], attn_bias=mask)[0]


def _output(result: Any) -> Tensor:
    """Early builds return the softmax's normaliser too."""
    return result[0] if isinstance(result, tuple) else result
