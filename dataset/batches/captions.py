"""Choose which text each sample of a micro-batch is trained with, and change it.

A function of the seed of the run, the number of the micro-batch in the run and the place of the sample in it:
all draws come from generators made of these. Captions may be another text each time: parts shuffled or left
out, wildcards, several lines.
"""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dataset.batches.items import TrainingItem
from dataset.cache.files import EMPTY
from dataset.sources.captions import add_ends, join_parts, lines_of
from dataset.table import CaptionChanges, DatasetTable
from modules.seeds import derive_seed

_WILDCARD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")  # {{ and }} stand for the braces themselves
_BRACES = {"{{": "{", "}}": "}"}


def changed_caption(
    caption: str,
    changes: CaptionChanges,
    table: DatasetTable,
    step: int,
    total_steps: int,
    generator: random.Random,
) -> str:
    """Return the text that a sample is trained with now, if it is not dropped.

    caption: of a source of the table (`MediaSource.caption`). step: from 0. total_steps: of the run, for a
    warm-up that is a share of it. Which captions are dropped says `choose_captions`.
    """
    if not changes.is_raw:  # the source has it as it is trained
        return caption
    lines = lines_of(caption) or [""]
    text = generator.choice(lines) if changes.wildcards else lines[0]
    text = add_ends(text, table)
    if changes.wildcards:
        text = _WILDCARD.sub(
            lambda found: _BRACES.get(found[0]) or generator.choice((found[1] or "").split("|")), text
        )
    if changes.shuffle or changes.warmup_step or changes.part_dropout_rate:
        text = _change_parts(text, changes, step, total_steps, generator)
    return join_parts(text, changes)


def _change_parts(
    text: str, changes: CaptionChanges, step: int, total_steps: int, generator: random.Random
) -> str:
    """Shuffle the parts between those that are fixed; leave out those that come later, or that are drawn."""
    separator = changes.keep_tokens_separator
    if separator and separator in text:
        sections = [_parts(one, changes) for one in text.split(separator, 2)]
        first, moving, last = ([part for part in one if part] for one in (*sections, [])[:3])
    else:
        parts = _parts(text, changes)
        first, moving, last = parts[: changes.keep_tokens], parts[changes.keep_tokens :], []
    # of the moving parts those that are there yet: from warmup_min, evenly up to all of them
    end = math.floor(changes.warmup_step * total_steps) if changes.warmup_step < 1 else changes.warmup_step
    if step < end:
        moving = moving[: math.floor(step * (len(moving) - changes.warmup_min) / end) + changes.warmup_min]
    if changes.shuffle:
        generator.shuffle(moving)
    rate = changes.part_dropout_rate
    if rate:
        moving = [part for part in moving if generator.random() >= rate]
    return ", ".join([*first, *moving, *last])


def _parts(text: str, changes: CaptionChanges) -> list[str]:
    return [part.strip() for part in text.split(changes.separator)]


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
    chosen = []
    for place, item in enumerate(items):
        rate, every = item.table.caption_dropout_rate, item.table.changes.dropout_every_n_epochs
        which = 0
        if every > 0 and (epoch + 1) % every == 0:  # all captions of every n-th epoch are empty
            which = EMPTY
        elif rate or item.captions > 1:
            numbers = random.Random(derive_seed(seed, "caption", number, place))
            which = EMPTY if numbers.random() < rate else numbers.randrange(item.captions)
        chosen.append(which)
    return tuple(chosen)


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
