"""What reading a dataset asks all forms of data for. Standard library only."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from dataset import config_keys as forms
from dataset.config_keys import TableKey
from dataset.forms import FOLDER, FORMS, JSONL
from dataset.forms.contract import DataForm, FindCell, TableRow
from dataset.table import DatasetTable, declared_keys
from modules.errors import DatasetError

# --- keys of a dataset file
# ------------------------------------------------------------------------------------------------------------


def _list_declared_sources() -> dict[str, tuple[TableKey, DataForm]]:
    """Return the keys that say where items are: those of pictures, of clips, then the ones without a kind."""
    of_kind: list[tuple[str, forms.Form, DataForm]] = []
    alone: dict[str, tuple[TableKey, DataForm]] = {}
    for form in FORMS:
        record: Any = form.keys or DatasetTable
        for field in fields(record):
            if field.name == form.source and "source" in field.metadata:
                of_kind.append((field.name, field.metadata["source"], form))
            elif field.name == form.source:
                alone[field.name] = field.metadata["key"], form
    by_key = {}
    for kind in forms.BOTH:
        for name, values, form in of_kind:
            by_key[f"{kind}_{name}"] = TableKey(values, None, (kind,)), form
    return by_key | alone


_SOURCES = _list_declared_sources()
FORM_OF_SOURCE: Mapping[str, DataForm] = {name: form for name, (_, form) in _SOURCES.items()}
# a table has exactly one of these source keys; its other keys must fit that kind of source
SOURCES = tuple(_SOURCES)
OWN_KEYS: Mapping[str, TableKey] = {
    name: key
    for form in FORMS
    if form.source and form.keys is not None
    for name, key in declared_keys(form.keys).items()
    if name not in SOURCES
}


def _compose_keys() -> dict[str, TableKey]:
    """Return all keys of a [[datasets]] table, in the order in which messages list them."""
    keys = {name: key for name, (key, _) in _SOURCES.items()}
    shared = declared_keys(DatasetTable)
    for field in fields(DatasetTable):
        if field.name == "own":
            keys |= OWN_KEYS
        elif field.name in shared:
            keys[field.name] = shared[field.name]
    return keys


KEYS: Mapping[str, TableKey] = _compose_keys()
_ADDRESSING = [form for form in FORMS if "allow_urls" in form.shared_keys]  # in rows, or by their key
SOURCES_WITH_ADDRESSES = [form.source for form in sorted(_ADDRESSING, key=lambda form: form is JSONL)]


def form_of(table: DatasetTable) -> DataForm:
    if table.own is None:
        return FOLDER if table.directory is not None else JSONL
    return next(form for form in FORMS if form.keys is type(table.own))


def list_addresses(table: DatasetTable) -> list[str]:
    """Return the addresses of what has to be downloaded before the sources of a table can be listed."""
    addresses = form_of(table).addresses
    return [] if addresses is None else addresses(table)


def takes_key(form: DataForm, name: str) -> bool:
    """Return whether tables of a form may have a key."""
    if name in OWN_KEYS:
        return form.keys is not None and name in declared_keys(form.keys)
    return name in form.shared_keys or not KEYS[name].of_some_forms


def read_own_keys(form: DataForm, source_key: str, values: Mapping[str, Any]) -> Any:
    """Return the record of the keys that only a form has; None: it has none. values: of all keys."""
    if form.keys is None:
        return None
    own = {name: values[name] for name in declared_keys(form.keys)}
    return form.keys(**{**own, form.source: values[source_key]})


# --- rows of tables
# ------------------------------------------------------------------------------------------------------------

FORM_OF_SUFFIX: Mapping[str, DataForm] = {suffix: form for form in FORMS for suffix in form.suffixes}


def row_form(path: Path) -> DataForm:
    """Return the form of a table's rows, by its suffix. Raises DatasetError if it has another one."""
    of_folders = [form for form in FORMS if form.folder_of_parts]
    form = FORM_OF_SUFFIX.get(path.suffix.lower())
    if path.is_dir():
        form = of_folders[0] if of_folders else None
    if form is None:
        forms_read = ", ".join([*FORM_OF_SUFFIX, *(f"or {form.folder_of_parts}" for form in of_folders)])
        raise DatasetError(
            f"{path}: tables are read from {forms_read}; this ends in {path.suffix or 'nothing'}"
        )
    return form


def column_names(path: Path) -> tuple[str, ...]:
    """Return the names of a table's columns; of JSONL the keys of its first lines.

    Raises DatasetError if the file cannot be read or has no columns.
    """
    form = row_form(path)
    assert form.column_names is not None
    return form.column_names(path)


def read_columns(path: Path, names: Collection[str] | None = None) -> Iterator[TableRow]:
    """Yield the rows of a table with the columns `names`; None: all of them. A name that is not a column is
    left out.

    A row that cannot be read has a `fault` and no values; the next ones follow. Raises DatasetError if the
    file is missing, does not fit its suffix, or is not UTF-8.
    """
    form = row_form(path)
    assert form.read_rows is not None
    yield from form.read_rows(path, names)


def find_cells(path: Path, name: str, finds_nulls: bool) -> FindCell | None:
    """Return a function row -> place of its file if the column `name` holds files; None if it does not.

    finds_nulls: return None for a cell that is null and names no file.
    """
    form = row_form(path)
    return None if form.find_cells is None else form.find_cells(path, name, finds_nulls)


def plain_columns(path: Path, names: Collection[str]) -> tuple[list[str], list[str]]:
    """Return those columns whose values can be read cheaply, and those that hold whole files."""
    form = row_form(path)
    return ([*names], []) if form.plain_columns is None else form.plain_columns(path, names)


# --- caches
# ------------------------------------------------------------------------------------------------------------

# by `cache_format`, except our own files and shards
SHARED_CACHES: Mapping[str, DataForm] = {form.cache_format: form for form in FORMS if form.cache_format}
