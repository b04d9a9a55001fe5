"""Order of batches and the text of each sample: functions of names and a seed; which items are validated on.

All draws come from generators made of the seed of the run, the number of a micro-batch and the place of a
sample in it. Captions may be another text each time: parts shuffled or left out, wildcards, several lines.
"""

import dataclasses
import hashlib
import heapq
import itertools
import logging
import math
import random
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dataset.batches.items import OfSource, TrainingItem, tables_of
from dataset.cache.files import EMPTY
from dataset.sources.captions import add_ends, join_parts, lines_of
from dataset.sources.media_source import pause_collection
from dataset.table import NO_AUGMENTATION, CaptionChanges, DatasetTable
from modules.seeds import derive_seed

logger = logging.getLogger(__name__)

T = TypeVar("T")


class BatchOrder:
    """Order of batches of every epoch, a function of the items' names and the seed only.

    Each epoch is shuffled anew: first the items within each bucket, then the batches. A bucket is a table, or
    a group of tables, and a size; its items occur `num_repeats` times, regularisation images as often as
    `repeat_regularisation` says; the last batch of a bucket may be smaller.
    """

    def __init__(self, items: Iterable[TrainingItem], seed: int) -> None:
        self._seed = seed
        # by table and key; a key of two values would take a third of the memory
        self._items = sorted(items, key=lambda item: item.key)
        self._items.sort(key=lambda item: item.table.index)
        self._pools = repeat_items(self._items)
        if any(item.table.is_reg for item in self._items):
            used = {id(item) for pool in self._pools.values() for item in pool}
            if unused := len(self._items) - len(used):
                logger.warning(
                    "%d regularisation images are not used because fewer other pictures are trained in an "
                    "epoch. More num_repeats of those would use more.",
                    unused,
                )
        sizes = [(len(pool), pool[0].table.batch_size) for pool in self._pools.values()]
        # in an epoch, repeats included
        self.num_items = sum(count for count, _ in sizes)
        self.num_batches = sum(-(-count // size) for count, size in sizes)
        self._last = -1  # the epoch whose batches are held
        self._batches: list[tuple[TrainingItem, ...]] = []
        self._starts = array("q")  # how many items of the epoch stand before each batch

    @property
    def learning_keys(self) -> list[str]:
        """Return the settings of tables that change the run but not its items, in words."""
        return [
            f"{name} = {value} in {table.place}"
            for table in tables_of(self._items)
            for name, value in table.learning_keys.items()
        ]

    def epoch(self, number: int) -> Sequence[tuple[TrainingItem, ...]]:
        """Return the batches of an epoch in order. number: from 0. The last one asked for is remembered."""
        if self._last != number:
            self._last, self._batches = -1, []  # those held so far go first
            draw_bits = random.Random(derive_seed(self._seed, "items", number)).getrandbits
            batches: list[tuple[TrainingItem, ...]] = []
            with pause_collection():
                for _, pool in sorted(self._pools.items()):
                    size, shuffled = pool[0].table.batch_size, _shuffled(pool, draw_bits)
                    starts = range(0, len(pool), size)
                    batches += [tuple(shuffled[start : start + size]) for start in starts]
                self._last, self._batches = number, _shuffled(batches, draw_bits)
            self._starts = array("q", itertools.accumulate(map(len, self._batches), initial=0))
        return self._batches

    def items_before(self, epoch: int, index: int) -> int:
        self.epoch(epoch)
        return epoch * self.num_items + self._starts[index]


def repeat_regularisation(repeats: Sequence[int], learned: int) -> list[int]:
    """Return how often each regularisation image is trained, so that they are as many as those learned.

    repeats: of the images' tables, in order. Images are taken with their repeats until there are enough; the
    rest is left out. If all together are too few, they are repeated from the first on, one at a time.
    learned: how many other images of the dataset are trained in an epoch.
    """
    if not repeats or not learned:
        return [0] * len(repeats)
    pairs = zip(repeats, itertools.accumulate(repeats, initial=0), strict=False)
    taken = [count if before < learned else 0 for count, before in pairs]
    rounds, rest = divmod(max(0, learned - sum(taken)), len(repeats))
    return [count + rounds + (place < rest) for place, count in enumerate(taken)]


def repeat_items(items: Sequence[TrainingItem]) -> dict[tuple[int, ...], list[TrainingItem]]:
    """Return the items that can share a batch, each as often as it is trained in an epoch; no empty groups.

    If all items of a group occur equally often, the whole list is repeated: this keeps the batches of a seed.
    """
    repeats = [item.table.num_repeats for item in items]
    for group in {item.table.batch_group for item in items if item.table.is_reg}:
        of_group = [place for place, item in enumerate(items) if item.table.batch_group == group]
        reg = [place for place in of_group if items[place].table.is_reg]
        learned = sum(repeats[place] for place in of_group if not items[place].table.is_reg)
        found = repeat_regularisation([repeats[place] for place in reg], learned)
        for place, count in zip(reg, found, strict=True):
            repeats[place] = count
    groups: dict[tuple[int, ...], tuple[list[TrainingItem], list[int]]] = {}
    for item, count in zip(items, repeats, strict=True):
        one = groups.setdefault(item.group, ([], []))
        one[0].append(item)
        one[1].append(count)
    pools = {}
    for key, (some, counts) in groups.items():
        if min(counts) == max(counts):
            pools[key] = some * counts[0]
        else:
            pools[key] = [item for item, count in zip(some, counts, strict=True) for _ in range(count)]
    return {key: pool for key, pool in pools.items() if pool}


def _shuffled(values: Sequence[T], draw_bits: Callable[[int], int]) -> list[T]:
    """Return a list shuffled as `random.shuffle` does it.

    draw_bits: `getrandbits` of the generator. Written out, as later Pythons must give the same batches; it is
    a fifth faster too.
    """
    found = list(values)
    for place in range(len(found) - 1, 0, -1):
        bits = (place + 1).bit_length()
        other = draw_bits(bits)
        while other > place:
            other = draw_bits(bits)
        found[place], found[other] = found[other], found[place]
    return found


S = TypeVar("S", bound=OfSource)


def split_validation(items: Sequence[S], fraction: float, seed: int = 0) -> tuple[list[S], list[S]]:
    """Split into (training, validation): tables marked `validation`, and a fraction of the others' sources.

    Sources are chosen by name only: all crops of a clip, in all tables, are on one side. A fraction above 0
    takes at least one source and leaves at least one. Subsets of the image guides' form are split each by
    itself, by their own fraction and seed if they say any. seed: chooses for those that do not.
    """
    if any(item.table.group is not None for item in items):
        return _split_subsets(items, fraction, seed)
    chosen: set[str] = set()
    if fraction > 0:
        candidates = {item.source_stem for item in items if not item.table.validation}
        count = min(max(round(fraction * len(candidates)), 1), len(candidates) - 1)
        chosen = set(
            heapq.nsmallest(
                count,
                candidates,
                key=lambda stem: hashlib.sha256(stem.encode("utf-8", "surrogateescape")).digest(),
            )
        )
    training: list[S] = []
    validation: list[S] = []
    for item in items:
        is_held = item.table.validation or (bool(chosen) and item.source_stem in chosen)
        (validation if is_held else training).append(item)
    return training, validation


def _split_subsets(items: Sequence[S], fraction: float, seed: int) -> tuple[list[S], list[S]]:
    """Split the subsets of the image guides, each by itself; regularisation images are all trained on.

    The sorted names of a subset are shuffled by the seed; those after the first ceil(n (1 - fraction)) are
    validated on, once each, unchanged and with whole captions.
    """
    chosen: dict[int, tuple[frozenset[str], DatasetTable]] = {}  # by index of the table
    for table in tables_of(items):
        share = fraction if table.validation_split is None else table.validation_split
        if not share or table.is_reg:
            continue
        names = sorted({item.source_stem for item in items if item.table.index == table.index})
        random.Random(seed if table.validation_seed is None else table.validation_seed).shuffle(names)
        # rounded first: 10 * (1 - 0.7) is a little above 3
        held_back = frozenset(names[math.ceil(round(len(names) * (1 - share), 9)) :])
        changes = dataclasses.replace(
            table.changes, shuffle=False, dropout_every_n_epochs=0, part_dropout_rate=0.0, warmup_step=0.0
        )
        as_validated = dataclasses.replace(
            table,
            num_repeats=1,
            augmentation=NO_AUGMENTATION,
            changes=changes,
            caption_dropout_rate=0.0,
            reference_dropout_rate=0.0,
            prior_loss_weight=1.0,
        )
        chosen[table.index] = held_back, as_validated
    training: list[S] = []
    validation: list[S] = []
    for item in items:
        held_back, table = chosen.get(item.table.index, (frozenset[str](), item.table))
        if item.source_stem in held_back:
            validation.append(dataclasses.replace(item, table=table))
        else:
            training.append(item)
    return training, validation


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
    warm-up that is a share of it. `choose_captions` says which captions are dropped.
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
    if not (changes.shuffle or changes.warmup_step or changes.part_dropout_rate):
        return join_parts(text, changes)

    # parts between the fixed ones are shuffled; parts beyond the warm-up, or dropped at random, are left out
    def split(one: str) -> list[str]:
        return [part.strip() for part in one.split(changes.separator)]

    separator = changes.keep_tokens_separator
    if separator and separator in text:
        sections = map(split, text.split(separator, 2))
        first, moving, last = ([part for part in one if part] for one in (*sections, [])[:3])
    else:
        parts = split(text)
        first, moving, last = parts[: changes.keep_tokens], parts[changes.keep_tokens :], []
    # the number of moving parts grows evenly from warmup_min to all of them
    end = math.floor(changes.warmup_step * total_steps) if changes.warmup_step < 1 else changes.warmup_step
    if step < end:
        moving = moving[: math.floor(step * (len(moving) - changes.warmup_min) / end) + changes.warmup_min]
    if changes.shuffle:
        generator.shuffle(moving)
    rate = changes.part_dropout_rate
    if rate:
        moving = [part for part in moving if generator.random() >= rate]
    return join_parts(", ".join([*first, *moving, *last]), changes)


@dataclass(frozen=True)
class RunPlace:
    """Where in a run a micro-batch is."""

    seed: int  # of the run
    number: int  # of the micro-batch, in the whole run
    step: int  # of the optimizer, from 0
    total_steps: int


def choose_captions(
    items: Sequence[TrainingItem], seed: int, number: int, epoch: int = 0, drops: bool = True
) -> tuple[int, ...]:
    """Return for each item which of its captions is used, from 0, or EMPTY.

    number: of the micro-batch, in the whole run. epoch: from 0. EMPTY is chosen with the table's
    caption_dropout_rate, and in epochs whose captions are all empty; captions are equally likely.
    drops: if False, no caption is dropped; the choice of the others stays the same.
    """
    chosen = []
    for place, item in enumerate(items):
        rate, every = item.table.caption_dropout_rate, item.table.changes.dropout_every_n_epochs
        which = 0
        if every > 0 and (epoch + 1) % every == 0:  # all captions of every n-th epoch are empty
            rate = 1.0
        if rate or item.captions > 1:
            numbers = random.Random(derive_seed(seed, "caption", number, place))
            is_dropped = numbers.random() < rate
            which = EMPTY if is_dropped and drops else numbers.randrange(item.captions)
        chosen.append(which)
    return tuple(chosen)


def drops_references(items: Sequence[TrainingItem], seed: int, number: int) -> bool:
    """Return whether a batch is trained without its references. number: of the micro-batch."""
    rate = items[0].table.reference_dropout_rate
    return rate > 0 and random.Random(derive_seed(seed, "references", number)).random() < rate


def change_captions(
    items: Sequence[TrainingItem], texts: Sequence[str], chosen: Sequence[int], run: RunPlace
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
