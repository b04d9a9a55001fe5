"""Order of batches and the text of each sample: functions of names and a seed; which items are validated on.

All draws come from generators made of the seed of the run, the number of a micro-batch and the place of a
sample in it. Captions may be another text each time: parts shuffled or left out, wildcards, several lines.
"""

import dataclasses
import hashlib
import itertools
import logging
import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from dataset.batches.items import Items, Places, TrainingItem
from dataset.cache.files import EMPTY
from dataset.sources.captions import add_ends, join_parts, lines_of
from dataset.table import NO_AUGMENTATION, CaptionChanges, DatasetTable
from modules.seeds import derive_seed

logger = logging.getLogger(__name__)


class EpochBatches(Sequence[tuple[TrainingItem, ...]]):
    """The batches of an epoch in order, 12 bytes an item; a batch is made when it is asked for."""

    def __init__(self, items: Items, places: Places, starts: NDArray[np.int64]) -> None:
        """places: of the items, batch by batch. starts: where each batch begins, and the end of the last."""
        self._items, self._places = items, places
        self.starts = starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> tuple[TrainingItem, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[tuple[TrainingItem, ...], ...]: ...
    def __getitem__(
        self, index: int | slice
    ) -> tuple[TrainingItem, ...] | tuple[tuple[TrainingItem, ...], ...]:
        if isinstance(index, slice):
            return tuple(self[number] for number in range(*index.indices(len(self))))
        number = range(len(self))[index]
        return tuple(self._items.take(self._places[self.starts[number] : self.starts[number + 1]]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def keys(self, start: int, end: int) -> list[list[str]]:
        """Return the keys of the items of batches `start` to `end`."""
        starts = self.starts[start : end + 1]
        keys = self._items.keys(self._places[starts[0] : starts[-1]])
        bounds = (starts - starts[0]).tolist()
        return [keys[first:last] for first, last in zip(bounds, bounds[1:], strict=False)]


class BatchOrder:
    """Order of batches of every epoch, a function of the items' names and the seed only.

    Each epoch is shuffled anew: first the items within each bucket, then the batches. A bucket is a table, or
    a group of tables, and a size; its items occur `num_repeats` times, regularisation images as often as
    `repeat_regularisation` says; the last batch of a bucket may be smaller.
    """

    def __init__(self, items: Iterable[TrainingItem], seed: int) -> None:
        self._seed = seed
        unsorted = Items.of(items)
        keys = unsorted.keys()
        order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int32)
        tables = np.array([facts.table.index for facts in unsorted.facts], np.int32)[unsorted.numbers[order]]
        self._items = unsorted.take(order[np.argsort(tables, kind="stable")])  # by table and key
        repeats = count_repeats(self._items)
        unused = int((repeats == 0).sum())
        if unused:
            logger.warning(
                "%d regularisation images are not used because fewer other pictures are trained in an epoch. "
                "More num_repeats of those would use more.",
                unused,
            )
        self._buckets = {
            key: (self._items[int(places[0])].table.batch_size, _repeat(places, repeats[places]))
            for key, places in self._items.groups().items()
        }
        self._buckets = {key: (size, pool) for key, (size, pool) in self._buckets.items() if len(pool)}
        sizes = [(len(pool), size) for size, pool in self._buckets.values()]
        # in an epoch, repeats included
        self.num_items = sum(count for count, _ in sizes)
        self.num_batches = sum(-(-count // size) for count, size in sizes)
        self._last: tuple[int, EpochBatches] | None = None

    @property
    def learning_keys(self) -> list[str]:
        """Return the settings of tables that change the run but not its items, in words."""
        return [
            f"{name} = {value} in {table.place}"
            for table in self._items.tables
            for name, value in table.learning_keys.items()
        ]

    def epoch(self, number: int) -> EpochBatches:
        """Return the batches of an epoch in order, shuffled as a list of all items, then one of all batches,
        would be. number: from 0. The last one asked for is remembered.
        """
        if self._last is not None and self._last[0] == number:
            return self._last[1]
        draw_bits = random.Random(derive_seed(self._seed, "items", number)).getrandbits
        places: list[Places] = [np.zeros(0, np.int32)]
        sizes = [np.zeros(0, np.int64)]
        for key in sorted(self._buckets):
            batch_size, pool = self._buckets[key]
            places.append(pool[_shuffled(len(pool), draw_bits)])
            size = np.full(-(-len(pool) // batch_size), batch_size, np.int64)
            size[-1] = len(pool) - (len(size) - 1) * batch_size
            sizes.append(size)
        size, order = np.concatenate(sizes), _shuffled(self.num_batches, draw_bits)
        before = np.cumsum(size) - size  # where each batch begins, before batches are shuffled
        starts = np.zeros(len(size) + 1, np.int64)
        np.cumsum(size[order], out=starts[1:])
        # item i of a batch that now begins at s, and began at b before, was at b + i - s
        was = np.repeat(before[order] - starts[:-1], size[order]) + np.arange(starts[-1])
        self._last = number, EpochBatches(self._items, np.concatenate(places)[was], starts)
        return self._last[1]


def count_repeats(items: Items) -> NDArray[np.int64]:
    """Return how often each item is trained in an epoch."""
    of_facts = np.array([facts.table.num_repeats for facts in items.facts], np.int64)
    repeats = of_facts[items.numbers]
    if not any(facts.table.is_reg for facts in items.facts):
        return repeats
    is_reg = np.array([facts.table.is_reg for facts in items.facts], bool)[items.numbers]
    groups = np.array([facts.table.batch_group for facts in items.facts], np.int64)[items.numbers]
    for group in np.unique(groups):
        places = np.flatnonzero((groups == group) & is_reg)
        learned = int(repeats[(groups == group) & ~is_reg].sum())
        repeats[places] = repeat_regularisation(repeats[places], learned)
    return repeats


def repeat_regularisation(repeats: NDArray[np.int64], learned: int) -> NDArray[np.int64]:
    """Return how often each regularisation image is trained, so that they are as many as those learned.

    repeats: of their tables, in order. Images are taken with their repeats until there are enough; those
    behind are left out. If all of them are too few, each once more, from the first on, until there are
    enough. learned: how many others of the dataset are trained in an epoch.
    """
    if not len(repeats) or not learned:
        return np.zeros_like(repeats) if not learned else repeats
    before = np.cumsum(repeats) - repeats
    taken = np.where(before < learned, repeats, 0)
    lacking = max(0, learned - int(taken.sum()))
    rounds, rest = divmod(lacking, len(repeats))
    return taken + rounds + (np.arange(len(repeats)) < rest)


def _repeat(places: Places, repeats: NDArray[np.int64]) -> Places:
    """Return a list in which each item occurs as often as `repeats` says.

    Where all occur equally often, all follow each other again and again, as ever: seeds keep their batches.
    """
    if repeats.min() == repeats.max():
        return np.tile(places, int(repeats[0]))
    return np.repeat(places, repeats)


def _shuffled(count: int, draw_bits: Callable[[int], int]) -> Places:
    """Return where each place of a list of this length, shuffled by `random.shuffle`, came from.

    draw_bits: `getrandbits` of the generator. Written out, as later Pythons must give the same batches; it is
    a fifth faster too.
    """
    numbers = list(range(count))
    for place in range(count - 1, 0, -1):
        bits = (place + 1).bit_length()
        other = draw_bits(bits)
        while other > place:
            other = draw_bits(bits)
        numbers[place], numbers[other] = numbers[other], numbers[place]
    return np.array(numbers, np.int32)


def split_validation(items: Iterable[TrainingItem], fraction: float, seed: int = 0) -> tuple[Items, Items]:
    """Split into (training, validation): tables marked `validation`, and a fraction of the others' sources.

    Sources are chosen by name only: all crops of a clip, in all tables, are on one side. A fraction above 0
    takes at least one source and leaves at least one. Subsets of the image guides' form are split each by
    itself, by their own fraction and seed if they say any. seed: chooses for those that do not.
    """
    items = Items.of(items)
    if any(facts.table.group is not None for facts in items.facts):
        return _split_subsets(items, fraction, seed)
    for_validation = [facts.table.validation for facts in items.facts]
    if fraction == 0:
        return items.where([not is_held for is_held in for_validation]), items.where(for_validation)
    held_back = np.array(for_validation, bool)[items.numbers]
    stems = items.stems
    candidates = list(dict.fromkeys(itertools.compress(stems, ~held_back)))
    count = round(fraction * len(candidates))
    if fraction > 0:
        count = min(max(count, 1), len(candidates) - 1)
    chosen = {candidates[place] for place in _by_hash(candidates)[:count]} if count > 0 else set()
    held_back |= np.fromiter((stem in chosen for stem in stems), bool, len(stems))
    return items.take(np.flatnonzero(~held_back)), items.take(np.flatnonzero(held_back))


def choose_held_back(stems: Iterable[str], fraction: float, seed: int) -> frozenset[str]:
    """Return which sources of a subset are validated on: those behind the first ceil(n (1 - fraction)) of the
    sorted names, shuffled by the seed.
    """
    names = sorted(set(stems))
    random.Random(seed).shuffle(names)
    # rounded first: 10 * (1 - 0.7) is a little above 3
    return frozenset(names[math.ceil(round(len(names) * (1 - fraction), 9)) :])


def as_validated(table: DatasetTable) -> DatasetTable:
    """Return a table as its items are validated on: once, as they are, with whole captions."""
    changes = dataclasses.replace(
        table.changes, shuffle=False, dropout_every_n_epochs=0, part_dropout_rate=0.0, warmup_step=0.0
    )
    return dataclasses.replace(
        table,
        num_repeats=1,
        augmentation=NO_AUGMENTATION,
        changes=changes,
        caption_dropout_rate=0.0,
        prior_loss_weight=1.0,
    )


def _split_subsets(items: Items, fraction: float, seed: int) -> tuple[Items, Items]:
    """Split the subsets of the image guides, each by itself; regularisation images are all trained on."""
    stems, numbers = np.array(items.stems, object), items.numbers
    tables = np.array([facts.table.index for facts in items.facts], np.int32)[numbers]
    held_back = np.zeros(len(items), bool)
    for table in items.tables:
        share = fraction if table.validation_split is None else table.validation_split
        if table.is_reg or not share:
            continue
        places = np.flatnonzero(tables == table.index)
        table_seed = seed if table.validation_seed is None else table.validation_seed
        chosen = choose_held_back(stems[places], share, table_seed)
        held_back[places] = [stem in chosen for stem in stems[places]]
    validation = items.take(np.flatnonzero(held_back))
    return items.take(np.flatnonzero(~held_back)), validation.with_tables(as_validated)


def _by_hash(stems: Sequence[str]) -> list[int]:
    """Return the places of names in the order of their SHA-256."""
    hashes = b"".join([hashlib.sha256(stem.encode("utf-8", "surrogateescape")).digest() for stem in stems])
    columns = np.frombuffer(hashes, ">u8").reshape(len(stems), 4)
    order: list[int] = np.lexsort(columns.T[::-1]).tolist()
    return order


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
