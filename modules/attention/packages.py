"""Attention by optional packages. Each is imported only here, when it is first used.

`modules.attention.attend.check_backend` checks, before anything is loaded, that the package works.
"""
# Letters: B batch, L query tokens, S key tokens, T real tokens of all samples together, N heads, D head width

from typing import Any

from torch import Tensor

from modules.attention.lengths import Lengths


def flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Run FlashAttention 2 (Dao 2023, arXiv 2307.08691): B L N D."""
    from flash_attn import flash_attn_func

    return flash_attn_func(query, key, value)


def flash_packed(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths) -> Tensor:
    """Run FlashAttention 2 on packed samples: T N D."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query, key, value, lengths.starts, lengths.starts, lengths.longest, lengths.longest
    )


def flash3(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Run FlashAttention 3 (Shah et al. 2024, arXiv 2407.08608): B L N D."""
    from flash_attn_interface import flash_attn_func

    return _output(flash_attn_func(query, key, value))


def flash3_packed(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths) -> Tensor:
    """Run FlashAttention 3 on packed samples: T N D."""
    from flash_attn_interface import flash_attn_varlen_func

    starts, longest = lengths.starts, lengths.longest
    return _output(flash_attn_varlen_func(query, key, value, starts, starts, longest, longest))


def sage(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Run SageAttention (Zhang et al. 2024, arXiv 2410.02367): B L N D, without gradients.

    Its function for packed tokens is an older, slower kernel, so padded batches run sample by sample.
    """
    from sageattention import sageattn

    return sageattn(query, key, value, tensor_layout="NHD")  # the package's letters for B L N D


def xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Run xFormers' memory-efficient attention: B L N D."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(query, key, value)


def xformers_packed(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths) -> Tensor:
    """Run xFormers on packed samples, T N D, with a mask stored as a list of lengths, not a matrix."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens(list(lengths.counts))
    return memory_efficient_attention(query[None], key[None], value[None], attn_bias=mask)[0]


def _output(result: Any) -> Tensor:
    """Return the attention output alone: early builds return the softmax's normaliser too."""
    return result[0] if isinstance(result, tuple) else result
