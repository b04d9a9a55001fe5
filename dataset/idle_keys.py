"""Warn about keys of subsets that have an effect only with other keys. Standard library only."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dataset.subset_options import SUBSET_KEYS
from dataset.table import DatasetTable, Table

logger = logging.getLogger(__name__)

_VARIES = "shuffle_caption, caption_tag_dropout_rate or token_warmup_step"
_BUCKETS = "enable_bucket = true"
# key -> the keys without one of which it has no effect
_NEEDS: Mapping[str, str] = {
    "min_bucket_reso": _BUCKETS,
    "max_bucket_reso": _BUCKETS,
    "bucket_reso_steps": _BUCKETS,
    "bucket_no_upscale": _BUCKETS,
    "keep_tokens": _VARIES,
    "keep_tokens_separator": _VARIES,
    "token_warmup_min": "token_warmup_step",
    "prior_loss_weight": "is_reg = true",
}


def warn_idle(path: Path, content: Mapping[str, Any], tables: Sequence[DatasetTable]) -> None:
    """Log a warning about keys that have no effect because no subset has the keys they depend on."""
    # whether any subset fulfills each condition that keys may depend on
    is_fulfilled = {
        _BUCKETS: any(table.buckets.enable_bucket for table in tables),
        _VARIES: any(table.captions.changes.moves_tags for table in tables),
        "token_warmup_step": any(table.captions.changes.warmup_step > 0 for table in tables),
        "is_reg = true": any(table.learning.is_reg for table in tables),
    }
    idle = []
    for name, condition in _NEEDS.items():
        if _is_changed(name, content) and not is_fulfilled[condition]:
            idle.append(f"{name} (needs {condition})")
    if idle:
        logger.warning("%s: without effect: %s", path, ", ".join(idle))


def _is_changed(name: str, content: Mapping[str, Any]) -> bool:
    """Return whether a key is set anywhere in a dataset file to another value than its default."""
    default = SUBSET_KEYS[name].default
    return any(level.get(name, default) != default for level in _iterate_subset_tables(content))


def _iterate_subset_tables(content: Mapping[str, Any]) -> Iterator[Table]:
    """Yield all tables of a dataset file that may have subset keys: [general], [[datasets]] and subsets."""
    general, entries = content.get("general"), content.get("datasets")
    levels = [general, *(entries if isinstance(entries, list) else [])]
    for level in levels:
        if isinstance(level, dict):
            yield level
            subsets = level.get("subsets")
            inner = subsets if isinstance(subsets, list) else []
            yield from (subset for subset in inner if isinstance(subset, dict))
