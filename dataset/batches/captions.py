"""Choose which text each sample of a micro-batch is trained with.

A function of the run's seed, the micro-batch's number in the run and the sample's place in it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from dataset.batches.changing import changed_caption, is_dropped
from dataset.batches.items import TrainingItem
from dataset.cache.files import EMPTY
from modules.seeds import derive_seed


@dataclass(frozen=True)
class RunPlace:
    """Where in a run a micro-batch is."""

    seed: int  # of the run
    number: int  # of the micro-batch, in the whole run
    step: int  # of the optimizer, from 0
    total_steps: int


def choose_captions(items: Sequence[TrainingItem], seed: int, number: int, epoch: int = 0) -> tuple[int, ...]:
    """Return for each item which of its captions is used, from 0, or EMPTY.

    number: of the micro-batch, in the whole run. epoch: from 0. EMPTY is chosen with the table's
    caption_dropout_rate, and in epochs whose captions are all empty; captions are equally likely.
    """
    return tuple(
        EMPTY if is_dropped(item.table.changes, epoch) else _choose(item, seed, number, place)
        for place, item in enumerate(items)
    )


def change_captions(
    items: Sequence[TrainingItem],
    texts: Sequence[str],
    chosen: Sequence[int],
    run: RunPlace,
) -> tuple[str, ...]:
    """Return the texts that samples are trained with, as the tables change them each time.

    texts: of the sources. chosen: as of `choose_captions`; a caption that is EMPTY stays so.
    """
    return tuple(
        ""
        if which == EMPTY
        else changed_caption(
            text,
            item.table.changes,
            item.table,
            run.step,
            run.total_steps,
            random.Random(derive_seed(run.seed, "caption changes", run.number, place)),
        )
        for place, (item, text, which) in enumerate(zip(items, texts, chosen, strict=True))
    )


def choose_sides(items: Sequence[TrainingItem], seed: int, number: int) -> tuple[bool, ...]:
    """Return for each item whether it is trained mirrored: every other time, if its table says so."""
    return tuple(
        item.table.augmentation.flip
        and random.Random(derive_seed(seed, "flip", number, place)).random() < 0.5
        for place, item in enumerate(items)
    )


def _choose(item: TrainingItem, seed: int, number: int, place: int) -> int:
    rate = item.table.caption_dropout_rate
    if not rate and item.captions == 1:
        return 0
    numbers = random.Random(derive_seed(seed, "caption", number, place))
    is_dropped = numbers.random() < rate
    return EMPTY if is_dropped else numbers.randrange(item.captions)
