"""The up factor of a fused layer whose parts (q, k, v, ...) have LoRAs of their own."""
# Letters: R rank of a part, P parts

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn


class BlockUp(nn.Module):
    """Block-diagonal up factor, out x P R in files; only the blocks exist here: `weight`, out x R.

    Its rows of part p multiply the pth group of R values.
    """

    def __init__(self, rank: int, heights: Sequence[int]) -> None:
        """rank: of all parts together. heights: rows of each part; uninitialised, float32 on the CPU."""
        super().__init__()
        self.heights = tuple(heights)
        self.weight = nn.Parameter(torch.empty(sum(heights), rank // len(heights)))
        self.register_state_dict_post_hook(_spread)
        self.register_load_state_dict_pre_hook(_gather)

    def forward(self, hidden: Tensor) -> Tensor:
        # hidden: ... P R
        groups = hidden.chunk(len(self.heights), -1)
        blocks = self.weight.split(self.heights)
        return torch.cat([functional.linear(x, w) for x, w in zip(groups, blocks, strict=True)], -1)


def _spread(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Put the whole matrix, as files have it, in place of the blocks."""
    assert isinstance(module, BlockUp)
    state[f"{prefix}weight"] = torch.block_diag(*state[f"{prefix}weight"].split(module.heights))


def _gather(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Put the blocks in place of the whole matrix."""
    assert isinstance(module, BlockUp)
    whole = state.get(f"{prefix}weight")
    if whole is None:
        return
    blocks = diagonal_blocks(whole, module.heights)
    if blocks is None:
        raise ValueError(f"{prefix}weight has values outside the blocks of its parts")
    state[f"{prefix}weight"] = torch.cat(blocks)


def fused_heights(parts: int, rows: int, columns: int) -> tuple[int, ...]:
    """Return the rows of each part of a fused layer: q, k, v, or q, k, v and the first layer of the MLP.

    rows, columns: of the layer's weight; queries are as many as its columns. Of 3 parts, keys and values
    share the rest (they may have fewer heads); of 4, they are as high as queries. () if that does not fit.
    """
    rest = rows - columns
    by_parts = {3: (columns, rest // 2, rest - rest // 2), 4: (*(columns,) * 3, rows - 3 * columns)}
    heights: tuple[int, ...] = by_parts.get(parts, ())
    return heights if heights and min(heights) > 0 else ()


def diagonal_blocks(up: Tensor, heights: Sequence[int]) -> list[Tensor] | None:
    """Return the blocks of a block-diagonal up factor, None if it is none.

    up: out x P R. heights: rows of each of the P parts.
    """
    if up.ndim != 2 or sum(heights) != len(up) or up.shape[1] % len(heights):
        return None
    rank = up.shape[1] // len(heights)
    rows = up.split(list(heights))
    blocks = [part[:, index * rank : (index + 1) * rank] for index, part in enumerate(rows)]
    outside = sum(int(part.count_nonzero()) for part in rows) - sum(int(b.count_nonzero()) for b in blocks)
    return None if outside else blocks
