"""Which tokens of a micro-batch go through the middle blocks."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from modules.errors import OptionError
from protocols.data import LOSS_MASK, Batch
from protocols.family import Abilities, DitSpec
from training.features.tread import TreadOptions, check_tread
from training.features.tread_routes import select_kept_tokens
from training.loss import MASK, NoisyBatch

GRID = (2, 4, 4)
LENGTH = 32


def make_batch(num_clean_frames: int = 0, number: int = 0, **masks: Tensor) -> NoisyBatch:
    latents = torch.zeros(2, 4, 4, 8, 8)
    batch = Batch({"latents": latents, **masks}, ("a", "b"), ("a", "b"))
    numbers = torch.full((2,), 0.5)
    return NoisyBatch(
        batch,
        latents,
        numbers,
        1000 * numbers,
        torch.ones(2),
        num_clean_frames=num_clean_frames,
        number=number,
    )


def test_each_sample_and_each_micro_batch_has_its_own_places() -> None:
    chosen = select_kept_tokens(make_batch(), GRID, drop_rate=0.3, seed=1)

    assert chosen.shape == (2, LENGTH - round(0.3 * LENGTH))
    assert (chosen.diff(dim=1) > 0).all()
    assert not torch.equal(chosen[0], chosen[1])
    assert torch.equal(select_kept_tokens(make_batch(), GRID, drop_rate=0.3, seed=1), chosen)
    for number, seed in [(1, 1), (0, 2)]:
        assert not torch.equal(
            select_kept_tokens(make_batch(number=number), GRID, drop_rate=0.3, seed=seed), chosen
        )


def test_all_places_are_left_out_equally_often() -> None:
    counts = torch.zeros(16)
    for number in range(500):
        counts += (
            select_kept_tokens(make_batch(number=number), (4, 4), drop_rate=0.5, seed=1)
            .flatten()
            .bincount(minlength=16)
        )

    assert (counts / 1000 - 0.5).abs().max() < 0.06


def test_given_frames_take_part() -> None:
    """The share is one of the other tokens."""
    chosen = select_kept_tokens(make_batch(num_clean_frames=2), GRID, drop_rate=0.5, seed=1)

    assert chosen.shape == (2, 16 + 8)
    assert torch.equal(chosen[:, :16], torch.arange(16).expand(2, -1))


@pytest.mark.parametrize("name", [MASK, LOSS_MASK])
def test_what_a_small_mask_counts_takes_part(name: str) -> None:
    """A mask of the half or more says nothing; a small one may leave too few tokens for the share."""
    shape = (2, 8, 8) if name == MASK else (2, 4, 8, 8)
    mask = torch.zeros(shape)
    mask[..., :, :3] = 0.5  # two of four columns of tokens: half
    mask[0, ..., 2:4] = 0
    mask[0, ..., :2] = 1  # one column
    chosen = select_kept_tokens(make_batch(**{name: mask}), GRID, drop_rate=0.7, seed=1)

    assert chosen.shape == (2, LENGTH - round(0.7 * LENGTH))
    first_column = set(range(0, LENGTH, 4))
    assert first_column <= set(chosen[0].tolist())
    assert not first_column <= set(chosen[1].tolist())
    maximum = select_kept_tokens(make_batch(**{name: mask}), GRID, drop_rate=0.9, seed=1)
    assert maximum.shape == (2, 8)
    assert set(maximum[0].tolist()) == first_column


def test_a_place_that_a_mask_counts_a_little_takes_part() -> None:
    mask = torch.zeros(2, 8, 8)
    mask[..., :2] = 0.1
    chosen = select_kept_tokens(make_batch(**{MASK: mask}), GRID, drop_rate=0.7, seed=1)

    for places in chosen.tolist():
        assert set(range(0, LENGTH, 4)) <= set(places)


def family_with(**changes: Any) -> Any:
    """What the check asks of a family."""
    plain = {"name": "toy", "abilities": Abilities(), "dit": DitSpec(("blocks",))}
    return SimpleNamespace(**{**plain, **changes})


SIDE_STREAM = DitSpec(("blocks", "others"), side_list="others")


@pytest.mark.parametrize(
    ("family", "counts", "message"),
    [
        (family_with(abilities=Abilities(trains_audio=True)), (4,), "second stream, for audio"),
        (family_with(dit=SIDE_STREAM), (4, 2), "second stream of blocks adds"),
        (family_with(dit=DitSpec(("blocks",), has_additions=True)), (4,), "the ControlNet adds"),
        (family_with(), (3,), "3 blocks, from 0 to 2, and these are 2 to 1"),
        (family_with(), (1, 1), "2 blocks"),
    ],
)
def test_models_that_cannot_leave_out_tokens_are_refused(
    family: Any, counts: tuple[int, ...], message: str
) -> None:
    options = TreadOptions(tread=0.25)
    check_tread(options, family_with(), (4,))
    with pytest.raises(OptionError, match=message):
        check_tread(options, family, counts)
