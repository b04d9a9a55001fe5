"""Which items are validated on, not trained on."""

import dataclasses
import hashlib
import itertools
import math
import random
from collections.abc import Iterable, Sequence

import numpy as np

from dataset.batches.items import Items, TrainingItem
from dataset.config import DatasetTable
from dataset.subset_records import NO_AUGMENTATION


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
