"""Work on many equal pieces, one after the other: a dry run (`dry_run.py`) computes only one of them."""

from collections.abc import Callable

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

Compute = Callable[[Tensor], Tensor]


def compute_piece(compute: Compute, piece: Tensor) -> Tensor:
    """Return `compute(piece)`.

    Its result and the memory that it uses must be proportional to the last two axes.
    """
    if has_torch_function((piece,)):  # true while a mode such as `dry_run.OneOfManyPieces` is active
        result: Tensor = handle_torch_function(compute_piece, (piece,), compute, piece)
        return result
    return compute(piece)
