"""Read model files whose fused qkv weights have their rows ordered by head: MiniMax-H3's shards."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from checkpoints.dialects import stack_heads
from checkpoints.opening import Checkpoint, is_sharded
from networks.module_names import FAMILIES


def with_stacked_rows(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose fused weights have their rows in our order, [q; k; v].

    Some models' shards order rows by head, [q0 k0 v0, q1 k1 v1, ...] (`FamilyNames.rows_by_head`). For other
    files, `checkpoint` itself is returned. Both share the open files: close only one of them.
    """
    if not is_sharded(checkpoint.path):
        return checkpoint
    # The head width of each fused weight whose rows are ordered by head, by tensor name
    widths: dict[str, int] = {}
    for family in FAMILIES:
        rule = family.rows_by_head
        if rule is None:
            continue
        suffix = f"{rule.ending}.weight"
        for name in checkpoint.tensors:
            if not name.endswith(suffix):
                continue
            # the norm of the queries is as wide as a head
            norm = checkpoint.tensors.get(f"{name.removesuffix(suffix)}{rule.norm_ending}.weight")
            if norm is not None:
                widths[name] = norm.shape[0]
    head_widths = widths
    if not head_widths:
        return checkpoint
    stacked: Any = _StackedFile(checkpoint, head_widths)
    return Checkpoint(checkpoint.path, {name: (stacked, name) for name in checkpoint.tensors}, [stacked])


class _StackedFile:
    """View of another checkpoint's file in which the rows of fused weights have our order."""

    def __init__(self, checkpoint: Checkpoint, head_widths: Mapping[str, int]) -> None:
        self.path = checkpoint.path
        self.left_out = checkpoint.left_out
        self.metadata = checkpoint.metadata
        self.tensors = checkpoint.tensors
        self._checkpoint = checkpoint
        self._head_widths = head_widths

    def borrow(self, name: str, read_buffer: Tensor) -> Tensor:
        """Return a tensor, which may be a view of `read_buffer` if its rows need no reordering."""
        if name not in self._head_widths:
            return self._checkpoint.borrow(name, read_buffer)
        rows = stack_heads(self._checkpoint.read(name), self._head_widths[name])
        return rows.contiguous()

    def close(self) -> None:
        self._checkpoint.close()
