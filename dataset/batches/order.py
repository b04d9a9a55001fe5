"""Order of batches, selection of captions and validation items: functions of names and a seed.

All random numbers come from generators seeded by the run's seed, the micro-batch number and the position of
the sample in it. Captions may vary: parts shuffled or dropped, wildcards, several lines.
"""

import dataclasses
import hashlib
import heapq
import itertools
import logging
import math
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from dataset.batches.items import HasSource, TrainingItem, list_tables
from dataset.cache_files import EMPTY
from dataset.sources.captions import Caption, draw_caption, join_parts, split_captions
from dataset.sources.media_source import pause_garbage_collection
from dataset.table import NO_AUGMENTATION, CaptionChanges, DatasetTable
from modules.integers import ceil_div
from modules.seeds import derive_seed

logger = logging.getLogger(__name__)

T = TypeVar("T")


class BatchOrder:
    """Order of the batches in every epoch, which depends only on the items' names and the seed.

    Each epoch is shuffled separately: first the items within each bucket, then the batches. A bucket contains
    the items of one size in a table or a group of tables. Items occur `num_repeats` times, regularization
    images as often as `repeat_regularization` computes. The last batch of a bucket may be smaller.
    """

    def __init__(self, items: Iterable[TrainingItem], seed: int) -> None:
        """Sort and group the items; the batches of an epoch are drawn when they are first needed."""
        self._seed = seed
        # sorted by (table, key) with two stable sorts, because a million tuples as sort keys need much memory
        self._items = sorted(items, key=lambda item: item.key)
        self._items.sort(key=lambda item: item.table.index)
        self._repeated_items = repeat_items(self._items)  # items of an epoch, by group
        if any(item.table.learning.is_reg for item in self._items):
            # regularization images that no epoch contains
            used = {id(item) for group_items in self._repeated_items.values() for item in group_items}
            unused = len(self._items) - len(used)
            if unused:
                logger.warning(
                    "%d regularization images are not used because fewer other images are trained in an "
                    "epoch. Raise their num_repeats to use more.",
                    unused,
                )
        self.num_items = sum(map(len, self._repeated_items.values()))  # items of an epoch, including repeats
        group_sizes = [
            (len(group), group[0].table.learning.batch_size) for group in self._repeated_items.values()
        ]
        self.num_batches = sum(ceil_div(size, batch_size) for size, batch_size in group_sizes)
        self._turns: dict[str, float] = {}  # see `set_turns`
        # by table and group: the items that are drawn in all their turns, as often as they are repeated
        self._stand_ins: dict[tuple[int, ...], list[TrainingItem]] = {}
        self._cached_epoch = -1  # the epoch whose batches are cached; -1: none
        self._batches: list[tuple[TrainingItem, ...]] = []
        self._starts = array("q")  # for each batch: number of items of the epoch before it
        # for each batch: number of items of its group of tables before it; empty until it is needed
        self._group_starts = array("q")

    @property
    def learning_keys(self) -> list[str]:
        """Return texts for the tables' settings that change training but not the items, for messages."""
        return [
            f"{name} = {value} in {table.label}"
            for table in list_tables(self._items)
            for name, value in table.learning_keys.items()
        ]

    def set_turns(self, shares: Mapping[str, float]) -> None:
        """Draw some items less often: another item of the same table and sizes takes the rest of their turns.

        The number of batches and their sizes stay the same. An item is drawn in its turn if nothing can
        stand in for it.

        Args:
            shares: Share of its turns in which an item is drawn, by key; 1 for items that are not named.
        """
        self._turns = dict(shares)
        self._stand_ins = {}
        for items in self._repeated_items.values():
            for item in items if shares else ():
                if item.key not in shares:
                    self._stand_ins.setdefault((item.table.index, *item.group), []).append(item)
        self._cached_epoch = -1

    def _give_turns(self, number: int, index: int, batch: Sequence[TrainingItem]) -> tuple[TrainingItem, ...]:
        """Return a batch of an epoch, in which other items stand in for those that are drawn more seldom."""
        items = []
        for position, item in enumerate(batch):
            share = self._turns.get(item.key, 1.0)
            if share < 1:
                generator = random.Random(derive_seed(self._seed, "turns", number, index, position))
                is_drawn = generator.random() < share
                others = self._stand_ins.get((item.table.index, *item.group))
                items.append(generator.choice(others) if others and not is_drawn else item)
            else:
                items.append(item)
        return tuple(items)

    def planned_epoch(self, number: int) -> Sequence[tuple[TrainingItem, ...]]:
        """Return the batches of an epoch as they are if all items are drawn in all their turns."""
        return self._draw_epoch(number) if self._turns else self.epoch(number)

    def epoch(self, number: int) -> Sequence[tuple[TrainingItem, ...]]:
        """Return the batches of an epoch (counted from 0) in order; the most recent epoch is cached."""
        if self._cached_epoch != number:
            self._cached_epoch = -1  # in case building is interrupted
            self._batches = []  # freed before the next epoch is built
            self._batches = self._draw_epoch(number)
            if self._turns:
                self._batches = [
                    self._give_turns(number, index, batch) for index, batch in enumerate(self._batches)
                ]
            self._cached_epoch = number
            # the number of items before each batch, and at the end the number of all items
            self._starts = array("q", itertools.accumulate(map(len, self._batches), initial=0))
            self._group_starts = array("q")  # `group_items_before` computes it again
        return self._batches

    def _draw_epoch(self, number: int) -> list[tuple[TrainingItem, ...]]:
        """Return the shuffled batches of an epoch, each of shuffled items of one group."""
        draw_bits = random.Random(derive_seed(self._seed, "items", number)).getrandbits
        batches: list[tuple[TrainingItem, ...]] = []
        with pause_garbage_collection():
            for _, group_items in sorted(self._repeated_items.items()):
                batch_size = group_items[0].table.learning.batch_size
                shuffled = _shuffle(group_items, draw_bits)
                for start in range(0, len(shuffled), batch_size):
                    batches.append(tuple(shuffled[start : start + batch_size]))
            return _shuffle(batches, draw_bits)

    def items_before(self, epoch: int, index: int) -> int:
        """Return the number of items trained before batch `index` of an epoch, including earlier epochs."""
        self.epoch(epoch)
        return epoch * self.num_items + self._starts[index]

    def group_items_before(self, epoch: int, index: int) -> int:
        """Return how many items of a batch's table group are trained before the batch, over all epochs.

        The batch's items come from tables of one table group (`DatasetTable.batch_group`).
        """
        batches = self.epoch(epoch)
        if not self._group_starts:
            counts: Counter[int] = Counter()
            for batch in batches:
                self._group_starts.append(counts[batch[0].table.batch_group])
                counts[batch[0].table.batch_group] += len(batch)
        batch_group = batches[index][0].table.batch_group
        in_group = [items for key, items in self._repeated_items.items() if key[0] == batch_group]
        items_per_epoch = sum(map(len, in_group))
        return epoch * items_per_epoch + self._group_starts[index]


def repeat_regularization(repeats: Sequence[int], num_learned: int) -> list[int]:
    """Return how often each regularization image is repeated, so that an epoch has enough of them.

    An epoch has at least as many regularization images as other images, which are `num_learned`.
    Images are taken in order, with the repeats of their tables, until there are enough; the remaining images
    get 0. If there are too few images, repeats are added evenly, beginning with the first image.

    Args:
        repeats: Repeats of each image, from its table, in order.
        num_learned: Number of other images in an epoch.
    """
    if not repeats or not num_learned:
        return [0] * len(repeats)
    counts = []
    total = 0
    for count in repeats:
        used_count = count if total < num_learned else 0
        counts.append(used_count)
        total += used_count
    num_missing = max(0, num_learned - total)
    rounds, remainder = divmod(num_missing, len(repeats))
    for index in range(len(counts)):
        counts[index] += rounds
        if index < remainder:  # the first images get one repeat more
            counts[index] += 1
    return counts


class Grouped(Protocol):
    """Protocol of items for `repeat_items`: each has a table and a group key."""

    @property
    def table(self) -> DatasetTable:
        """The item's table, which has `num_repeats`."""

    @property
    def group(self) -> tuple[int, ...]:
        """Key that is equal for items that can share a batch (same table group and bucket)."""


G = TypeVar("G", bound=Grouped)


def count_batches(items: Sequence[Grouped]) -> int:
    """Return the number of batches in an epoch; each batch contains repeated items of one group."""
    pools = repeat_items(items).values()
    return sum(ceil_div(len(pool), pool[0].table.learning.batch_size) for pool in pools)


def repeat_items(items: Sequence[G]) -> dict[tuple[int, ...], list[G]]:
    """Return the items of an epoch, repeated as often as they are trained, by group (see `Grouped`).

    A batch has items of one group. Empty groups are omitted. If all items of a group have the same repeats,
    the whole list is repeated, so that a seed keeps giving the same batches.
    """
    repeats = [item.table.learning.num_repeats for item in items]
    if any(item.table.learning.is_reg for item in items):
        repeats = _count_repeats(items)
    items_by_group: dict[tuple[int, ...], list[G]] = {}
    repeats_by_group: dict[tuple[int, ...], list[int]] = {}
    for item, count in zip(items, repeats, strict=True):
        items_by_group.setdefault(item.group, []).append(item)
        repeats_by_group.setdefault(item.group, []).append(count)
    repeated: dict[tuple[int, ...], list[G]] = {}
    for key, group_items in items_by_group.items():
        group_repeats = repeats_by_group[key]
        if min(group_repeats) == max(group_repeats):
            repeated_items = group_items * group_repeats[0]
        else:
            repeated_items = []
            for item, count in zip(group_items, group_repeats, strict=True):
                repeated_items += [item] * count
        if repeated_items:
            repeated[key] = repeated_items
    return repeated


def _count_repeats(items: Sequence[Grouped]) -> list[int]:
    """Return how often an epoch trains each item, if there are regularization images."""
    counts = [item.table.learning.num_repeats for item in items]
    # tables of one group share their batches; each group is balanced separately
    for group in {item.table.batch_group for item in items if item.table.learning.is_reg}:
        reg_indices: list[int] = []  # indices of regularization images
        num_learned = 0  # number of other images, with repeats
        for index, item in enumerate(items):
            if item.table.batch_group != group:
                continue
            if item.table.learning.is_reg:
                reg_indices.append(index)
            else:
                num_learned += counts[index]
        repeats = repeat_regularization([counts[index] for index in reg_indices], num_learned)
        for index, count in zip(reg_indices, repeats, strict=True):
            counts[index] = count
    return counts


def _shuffle(values: Sequence[T], draw_bits: Callable[[int], int]) -> list[T]:
    """Return a shuffled list, in the order that `random.shuffle` would give."""
    # `draw_bits` is `getrandbits` of the generator. The algorithm is written out so that all Python versions
    # give the same batches; it is also a fifth faster.
    shuffled = list(values)
    for index in range(len(shuffled) - 1, 0, -1):  # Fisher-Yates
        num_bits = (index + 1).bit_length()
        drawn = draw_bits(num_bits)
        while drawn > index:  # drawn again, so that 0..index are equally likely
            drawn = draw_bits(num_bits)
        shuffled[index], shuffled[drawn] = shuffled[drawn], shuffled[index]
    return shuffled


S = TypeVar("S", bound=HasSource)


def split_validation(items: Sequence[S], fraction: float, seed: int = 0) -> tuple[list[S], list[S]]:
    """Split items into those for training and those for validation.

    Validation gets the tables marked `validation`, and a fraction of the media files of all other tables.
    Files are selected by name only, so that all crops of a clip, in all tables, are on the same side. A
    fraction above 0 selects at least one file and leaves at least one. Subsets (the layout of sd-scripts) are
    split separately, by their own fraction and seed if they have them.

    Args:
        items: Items of all tables.
        fraction: Fraction of the media files that is held out.
        seed: Seed for subsets without validation_seed.

    Returns:
        Items for training, and items for validation.
    """
    if any(item.table.group is not None for item in items):
        return _split_subsets(items, fraction, seed)
    held_out_stems: set[str] = set()
    if fraction > 0:
        candidates = {item.source_stem for item in items if not item.table.learning.validation}
        count = min(max(round(fraction * len(candidates)), 1), len(candidates) - 1)
        # the smallest hashes of names, so that the selection does not depend on the order
        held_out_stems = set(heapq.nsmallest(count, candidates, key=_digest))
    training: list[S] = []
    validation: list[S] = []
    for item in items:
        if item.table.learning.validation or item.source_stem in held_out_stems:
            validation.append(item)
        else:
            training.append(item)
    return training, validation


def _digest(stem: str) -> bytes:
    """Return a hash of a stem; sorting by it gives an arbitrary but permanent order."""
    return hashlib.sha256(stem.encode("utf-8", "surrogateescape")).digest()


def _split_subsets(items: Sequence[S], fraction: float, seed: int) -> tuple[list[S], list[S]]:
    """Split each subset separately; all regularization images are for training."""
    # The sorted names of a subset are shuffled by the seed. Those after the first ceil(n (1 - fraction)) are
    # for validation: once each, without augmentation or caption changes. A subset's own fraction and seed
    # take precedence.
    held_out_stems: dict[int, frozenset[str]] = {}  # by index of the table
    validation_tables: dict[int, DatasetTable] = {}
    for table in list_tables(items):
        table_fraction = (
            fraction if table.learning.validation_split is None else table.learning.validation_split
        )
        if not table_fraction or table.learning.is_reg:
            continue
        names = sorted({item.source_stem for item in items if item.table.index == table.index})
        table_seed = seed if table.learning.validation_seed is None else table.learning.validation_seed
        random.Random(table_seed).shuffle(names)
        # rounded because 10 * (1 - 0.7) is slightly above 3
        num_trained = math.ceil(round(len(names) * (1 - table_fraction), 9))
        held_out_stems[table.index] = frozenset(names[num_trained:])
        validation_tables[table.index] = _without_randomness(table)
    training: list[S] = []
    validation: list[S] = []
    for item in items:
        index = item.table.index
        if index in held_out_stems and item.source_stem in held_out_stems[index]:
            validation.append(dataclasses.replace(item, table=validation_tables[index]))
        else:
            training.append(item)
    return training, validation


def _without_randomness(table: DatasetTable) -> DatasetTable:
    """Return the table as validation uses it, without repeats, loss weight and random changes."""
    changes = dataclasses.replace(
        table.captions.changes,
        shuffle=False,
        dropout_every_n_epochs=0,
        part_dropout_rate=0.0,
        warmup_step=0.0,
    )
    return table.with_values(
        num_repeats=1,
        augmentation=NO_AUGMENTATION,
        changes=changes,
        caption_dropout_rate=0.0,
        reference_dropout_rate=0.0,
        prior_loss_weight=1.0,
    )


def changed_caption(
    caption: str, table: DatasetTable, *, step: int, total_steps: int, generator: random.Random
) -> str:
    """Apply a table's random caption changes for one training step.

    Captions that `select_captions` drops are not passed to this function.

    Args:
        caption: Caption from the dataset (`MediaSource.caption`).
        table: Table that contains the item.
        step: Step, counted from 0.
        total_steps: Number of steps of the run, for a warm-up that is a fraction of the run.
        generator: Random generator for this caption.
    """
    changes = table.captions.changes
    if not changes.varies_per_step:  # trigger word, prefix and suffix were added when the source was listed
        return caption
    captions = split_captions(caption, table)
    chosen = generator.choice(captions) if changes.wildcards else captions[0]
    drawn = draw_caption(chosen, table, generator)
    if changes.moves_tags and not drawn.is_object:
        varied = _vary_parts(drawn.text, changes, step=step, total_steps=total_steps, generator=generator)
        drawn = Caption(varied, is_object=False)
    return join_parts(drawn, changes)


def _vary_parts(
    text: str, changes: CaptionChanges, step: int, total_steps: int, generator: random.Random
) -> str:
    """Shuffle the movable parts of a caption, and drop some at random or because of the warm-up."""
    parts = _split_parts(text, changes)
    movable = parts.movable
    # the warm-up increases the number of movable parts linearly, from warmup_min to all
    warmup_end = changes.warmup_step
    if warmup_end < 1:  # a fraction of the run
        warmup_end = math.floor(warmup_end * total_steps)
    if step < warmup_end:
        num_added = math.floor(step * (len(movable) - changes.warmup_min) / warmup_end)
        movable = movable[: num_added + changes.warmup_min]
    if changes.shuffle:
        generator.shuffle(movable)
    dropout_rate = changes.part_dropout_rate
    if dropout_rate:
        movable = [part for part in movable if generator.random() >= dropout_rate]
    separator = changes.separator if changes.separator[-1].isspace() else f"{changes.separator} "
    return separator.join([*parts.fixed_beginning, *movable, *parts.fixed_end])


class _CaptionParts(NamedTuple):
    """Parts of a caption, such as tags between commas: fixed ones at both ends, movable ones between."""

    fixed_beginning: list[str]
    movable: list[str]  # parts that may be shuffled or dropped
    fixed_end: list[str]


def _split_parts(text: str, changes: CaptionChanges) -> _CaptionParts:
    """Split a caption at `separator` into parts: fixed ones (see keep_tokens) and movable ones."""
    fix_separator = changes.keep_tokens_separator
    if fix_separator and fix_separator in text:
        # a second separator marks where the fixed end begins
        sections = [_split_section(section, changes) for section in text.split(fix_separator, 2)]
        without_empty = [[part for part in section if part] for section in sections]
        fixed_beginning, movable = without_empty[:2]
        fixed_end = without_empty[2] if len(without_empty) > 2 else []
        return _CaptionParts(fixed_beginning, movable, fixed_end)
    parts = _split_section(text, changes)
    return _CaptionParts(parts[: changes.keep_tokens], parts[changes.keep_tokens :], [])


def _split_section(section: str, changes: CaptionChanges) -> list[str]:
    """Split a part of a caption into tags at each separator."""
    return [part.strip() for part in section.split(changes.separator)]


@dataclass(frozen=True)
class RunPosition:
    """Position of a micro-batch in a training run."""

    seed: int  # seed of the run
    micro_batch: int  # index of the micro-batch in the run
    step: int  # optimizer step, from 0
    total_steps: int


def select_captions(
    items: Sequence[TrainingItem], seed: int, micro_batch: int, epoch: int = 0, drops: bool = True
) -> tuple[int, ...]:
    """Return the index of the caption to use for each item, from 0, or EMPTY.

    All captions of an item are equally likely. EMPTY is selected with the probability caption_dropout_rate of
    the table, and always in the epochs of caption_dropout_every_n_epochs.

    Args:
        items: Items of the batch.
        seed: Seed of the run.
        micro_batch: Index of the micro-batch in the run.
        epoch: Epoch, counted from 0.
        drops: Whether captions are dropped; this does not change the choice of the other captions.
    """
    selected = []
    for position, item in enumerate(items):
        rate = item.table.captions.caption_dropout_rate
        interval = item.table.captions.changes.dropout_every_n_epochs
        if interval > 0 and (epoch + 1) % interval == 0:  # in every n-th epoch, all captions are empty
            rate = 1.0
        caption_index = 0
        if rate or item.num_captions > 1:
            generator = random.Random(derive_seed(seed, "caption", micro_batch, position))
            is_dropped = generator.random() < rate  # drawn even if unused, so that `drops` changes no caption
            caption_index = EMPTY if is_dropped and drops else generator.randrange(item.num_captions)
        selected.append(caption_index)
    return tuple(selected)


def should_drop_references(items: Sequence[TrainingItem], seed: int, micro_batch: int) -> bool:
    """Return whether reference dropout removes the references of a batch.

    `micro_batch` is the index of the micro-batch in the training run; with the seed, it decides.
    """
    rate = items[0].table.references.reference_dropout_rate  # all items of a batch have the same rate
    generator = random.Random(derive_seed(seed, "references", micro_batch))
    return rate > 0 and generator.random() < rate


def change_captions(
    items: Sequence[TrainingItem],
    captions: Sequence[str],
    caption_indices: Sequence[int],
    run_position: RunPosition,
) -> tuple[str, ...]:
    """Apply the tables' random caption changes, such as shuffled tags, to all items of a batch.

    `captions` are the original captions, and `caption_indices` their indices among an item's captions; a
    caption with index EMPTY was dropped, and becomes "".
    """
    changed_captions = []
    samples = zip(items, captions, caption_indices, strict=True)
    for position, (item, caption, caption_index) in enumerate(samples):
        if caption_index == EMPTY:
            changed_captions.append("")
            continue
        seed = derive_seed(run_position.seed, "caption changes", run_position.micro_batch, position)
        changed_text = changed_caption(
            caption,
            item.table,
            step=run_position.step,
            total_steps=run_position.total_steps,
            generator=random.Random(seed),
        )
        changed_captions.append(changed_text)
    return tuple(changed_captions)


def select_mirrored(items: Sequence[TrainingItem], seed: int, micro_batch: int) -> tuple[bool, ...]:
    """Return which items of a batch are mirrored: each with probability 0.5 if its table has flip_aug."""
    are_mirrored = []
    for position, item in enumerate(items):
        generator = random.Random(derive_seed(seed, "flip", micro_batch, position))
        are_mirrored.append(item.table.buckets.augmentation.flip and generator.random() < 0.5)
    return tuple(are_mirrored)
