"""Work that is done on many pieces of a whole, one after the other: a rehearsal (`dry_run.py`) needs to do
one of them only.
"""

from collections.abc import Callable

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

Compute = Callable[[Tensor], Tensor]


def compute_piece(compute: Compute, piece: Tensor) -> Tensor:
    """`compute(piece)`.

    What it holds beside its result and the result itself have to be proportional to the last two axes.
    """
    if has_torch_function((piece,)):  # true while a mode such as `dry_run.OneOfManyPieces` is on
        result: Tensor = handle_torch_function(compute_piece, (piece,), compute, piece)
        return result
    return compute(piece)
