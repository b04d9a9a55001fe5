"""Keys of dataset.toml in the table of all settings: the batch size, and options that keys override."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import Table

from browser.folders.described_folder import append_key
from dataset.subset_options import SUBSET_KEYS, SubsetOptions
from modules.options import option_name
from modules.pages.language import refusal, say
from modules.text_files import parse_toml

BATCH = "batch_size"  # key of dataset.toml
BATCH_OPTION = "train_batch_size"  # training option, for datasets whose file does not set a batch size
GENERAL = "general"
OPTION_WITHOUT_KEY = "masked_loss"  # the only option without a corresponding dataset key
MAX_IN_BATCH = 1024


@cache
def _list_options() -> Mapping[str, str]:
    """Return, for each dataset option of a command line, the dataset.toml key that replaces it; or ""."""
    keys = {key.option or name: name for name, key in SUBSET_KEYS.items() if key.option != ""}
    return {
        option_name(field): keys.get(option_name(field), "") for field in dataclasses.fields(SubsetOptions)
    }


@dataclasses.dataclass(frozen=True)
class DatasetKeys:
    """The values of a dataset.toml that the page's table of all settings shows or checks."""

    content: Mapping[str, Any]

    @classmethod
    def from_text(cls, text: str) -> "DatasetKeys":
        """Parse a dataset.toml. Raises ValueError if it is not TOML."""
        return cls(parse_toml(text))

    @property
    def tables(self) -> list[Mapping[str, Any]]:
        """The file's `[[datasets]]` tables, without array items that are not tables."""
        entries = self.content.get("datasets")
        return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []

    @property
    def has_subsets(self) -> bool:
        """Whether the file has `[[datasets.subsets]]`, the form that guides for image models use."""
        return any("subsets" in table for table in self.tables)

    def explain_unused(self, option: str) -> str:
        """Return why a training option has no effect with this dataset file; "" if it has one."""
        key = _list_options().get(option)
        if key is None:
            return ""
        if not self.has_subsets:
            return say("No effect in this run: it is for datasets with subsets, and dataset.toml has none.")
        if not key:  # the dataset file replaces the option without a key of its own
            if option == OPTION_WITHOUT_KEY:
                return ""
            return say("No effect in this run: the data are listed in dataset.toml.")
        if self._is_set_everywhere(key):
            return say("No effect in this run: %(key)s in dataset.toml sets this.", key=key)
        return ""

    def _is_set_everywhere(self, key: str) -> bool:
        """Return whether dataset.toml sets a key for all its data: in [general], in tables or in subsets."""
        if key in self._read_general():
            return True
        for table in self.tables:
            subsets = _list_subsets(table)
            is_set_by_subsets = subsets != [] and all(key in subset for subset in subsets)
            if key not in table and not is_set_by_subsets:
                return False
        return True

    def _read_general(self) -> Mapping[str, Any]:
        general = self.content.get(GENERAL)
        return general if isinstance(general, dict) else {}

    def read_batch_size(self, values: Mapping[str, Any]) -> str:
        """Return the batch size as text; several numbers if the tables differ.

        `values` are the options of the training run; they apply where the file sets no batch size.
        """
        default = self._read_general().get(BATCH, values.get(BATCH_OPTION, 1) if self.has_subsets else 1)
        sizes = [table.get(BATCH, default) for table in self.tables] or [default]
        return ", ".join(str(size) for size in dict.fromkeys(sizes))


def _list_subsets(table: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    subsets = table.get("subsets")
    return [subset for subset in subsets if isinstance(subset, dict)] if isinstance(subsets, list) else []


def read_batch_field(text: str) -> int:
    """Parse the batch-size field. Raises OptionError if it is not a positive integer."""
    if text.isascii() and text.isdecimal() and 0 < int(text[:9]) <= MAX_IN_BATCH:
        return int(text)
    raise refusal(
        "Images of a step %(text)s: use a whole number from 1 to %(maximum)s.",
        text=text or "-",
        maximum=MAX_IN_BATCH,
    )


def write_batch(text: str, size: int) -> str:
    """Set the batch size of all tables in the text of a dataset.toml, and return the new text.

    Raises ValueError if the text is not TOML.
    """
    try:
        document = tomlkit.parse(text)
    except TOMLKitError as error:
        raise ValueError(f"it is not TOML: {error}") from None
    for table in _list_tables(document):  # a table's own size would take precedence over [general]
        table.pop(BATCH, None)
    if GENERAL not in document:  # the new table goes to the top of the file
        document = tomlkit.parse(f"[{GENERAL}]\n\n{tomlkit.dumps(document)}")
    general = document[GENERAL]
    if not isinstance(general, Table):
        raise ValueError(f"[{GENERAL}] is not a table")
    if BATCH in general:
        general[BATCH] = size
    else:
        append_key(general, BATCH, size)
    return tomlkit.dumps(document)


def _list_tables(document: Any) -> Iterator[Any]:
    entries = document.get("datasets")
    yield from entries if isinstance(entries, Sequence) else ()
