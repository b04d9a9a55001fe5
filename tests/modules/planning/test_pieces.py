"""Pieces of one whole in a rehearsal: one is computed, the others take as much."""

import torch
from torch import Tensor

from modules.layers.convolution import compute_piece
from modules.planning.dry_run import ACCELERATOR, dry_run


class Compute:
    """Doubles the sides of a piece, by way of a tensor four times as large as its result; counts how
    often.
    """

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, piece: Tensor) -> Tensor:
        self.shapes.append(tuple(piece.shape))
        work = piece.repeat_interleave(4, -1).repeat_interleave(4, -2)
        return work[..., ::2, ::2].clone()


def test_in_a_rehearsal_the_largest_of_a_kind_is_computed() -> None:
    compute = Compute()
    with dry_run():
        for size in ((8, 16, 16), (8, 16, 16), (8, 4, 16), (3, 16, 16), (8, 16, 32), (8, 16, 16)):
            made = compute_piece(compute, torch.empty(size, device=ACCELERATOR))
            assert made.shape == (size[0], 2 * size[1], 2 * size[2])
            assert made.device == ACCELERATOR
    assert compute.shapes == [(8, 16, 16), (3, 16, 16), (8, 16, 32)]


def test_a_piece_that_is_not_computed_takes_its_share() -> None:
    def peak(computes: bool) -> int:
        compute = Compute()
        with dry_run() as ledger:
            if not computes:
                compute_piece(compute, torch.empty(64, 32, 32, device=ACCELERATOR))
            ledger.enter("here")
            given = torch.empty(64, 32, 16, device=ACCELERATOR)
            made = compute_piece(compute, given)
            assert len(compute.shapes) == 1
            del made
            return sum(ledger.peaks["here"].values())

    assert peak(computes=False) == peak(computes=True)
