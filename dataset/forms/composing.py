"""Combine all source formats, their keys, and shared caches. Standard library only."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dataset import config_keys
from dataset.config_keys import TableKey
from dataset.forms import CACHES, FOLDER, FORMS, JSONL
from dataset.forms.contract import SharedCaches, SourceFormat
from dataset.table import DatasetTable, declared_keys, list_fields

# --- keys of a dataset file
# ------------------------------------------------------------------------------------------------------------


def _list_declared_sources() -> dict[str, tuple[TableKey, SourceFormat]]:
    """Return the table keys that name where items come from: keys for images, for clips, then for both."""
    # `source` of a format is the name of such a key, or its end: `directory` stands for `image_directory` and
    # `video_directory`.
    # names without the kind, such as `directory`
    kind_keys: list[tuple[str, config_keys.ValueType, SourceFormat]] = []
    # names that are the same for all kinds
    common_keys: dict[str, tuple[TableKey, SourceFormat]] = {}
    for source_format in FORMS:
        record: Any = source_format.keys
        declared = list_fields() if record is None else fields(record)
        for field in declared:
            if field.name == source_format.source and "source" in field.metadata:
                kind_keys.append((field.name, field.metadata["source"], source_format))
            elif field.name == source_format.source:
                common_keys[field.name] = field.metadata["key"], source_format
    by_key = {}
    for kind in config_keys.BOTH:
        for name, value_type, source_format in kind_keys:
            by_key[f"{kind}_{name}"] = TableKey(value_type, None, (kind,)), source_format
    return by_key | common_keys


_SOURCES = _list_declared_sources()
FORMAT_BY_SOURCE: Mapping[str, SourceFormat] = {
    name: source_format for name, (_, source_format) in _SOURCES.items()
}
# a table has exactly one of these source keys; its other keys must fit that kind of source
SOURCES = tuple(_SOURCES)
FORMAT_KEYS: Mapping[str, TableKey] = {
    name: key
    for source_format in FORMS
    if source_format.source and source_format.keys is not None
    for name, key in declared_keys(source_format.keys).items()
    if name not in SOURCES
}


def _compose_keys() -> dict[str, TableKey]:
    """Return all keys that a [[datasets]] table may have, in the order in which messages list them."""
    keys = {name: key for name, (key, _) in _SOURCES.items()}
    shared = declared_keys(DatasetTable)
    for field in list_fields():
        if field.name == "format_keys":
            keys |= FORMAT_KEYS
        elif field.name in shared:
            keys[field.name] = shared[field.name]
    return keys


KEYS: Mapping[str, TableKey] = _compose_keys()


def _list_source_keys(source: str, source_format: SourceFormat) -> frozenset[str]:
    """Return the keys of a source format that a table may have if `source` names its data."""
    own = {} if source_format.keys is None else declared_keys(source_format.keys)
    common = {name for name, key in KEYS.items() if not (key.is_form_specific or name in FORMAT_KEYS)}
    accepted_keys = (common | {*source_format.shared_keys, *own}) - {*SOURCES}
    kind = KEYS[source].kinds[0]
    return frozenset(name for name in accepted_keys if kind in KEYS[name].kinds)


KEYS_BY_SOURCE: Mapping[str, frozenset[str]] = {
    source: _list_source_keys(source, source_format) for source, source_format in FORMAT_BY_SOURCE.items()
}
# formats whose rows, or whose source key, may name URLs
_ADDRESSING = [source_format for source_format in FORMS if "allow_urls" in source_format.shared_keys]
# in the order in which a message lists them: JSONL last
_ADDRESSING.sort(key=lambda source_format: source_format is JSONL)
SOURCES_WITH_ADDRESSES = [source_format.source for source_format in _ADDRESSING]


def get_source_format(table: DatasetTable) -> SourceFormat:
    """Return a table's source format (folder, list, tars ...), which its keys determine."""
    if table.source.format_keys is None:
        return FOLDER if table.source.directory is not None else JSONL
    return next(
        source_format for source_format in FORMS if source_format.keys is type(table.source.format_keys)
    )


# --- caches
# ------------------------------------------------------------------------------------------------------------

# by value of `cache_format`; without "files" and "shards", which other programs do not share
SHARED_CACHES: Mapping[str, SharedCaches] = {caches.cache_format: caches for caches in CACHES}
