"""Formats of captions that are JSON objects: their keys, what each of them says, and the faults of a caption.

A family whose model was trained with such captions declares its format once. `--check`, the captioner and the
page read the declaration.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CERTAIN = 0.75  # how alike a misspelt key is to the one that is meant
_NAMES = {str: "a text", list: "a list", dict: "an object", bool: "true or false"}


@dataclass(frozen=True)
class CaptionKey:
    """A key of a caption.

    kind: str; dict, an object of texts; or list, of such objects. about: what it says, for a model that
    writes it. parts: usual keys of its objects; every object of a list has the first one.
    """

    name: str
    kind: type
    about: str
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class CaptionFormat:
    """The keys of a caption, in the order of training.

    title: of the model. The first key is a text that no caption lacks. ignored: keys that captions of other
    programs have, which the model never saw.
    """

    title: str
    keys: Sequence[CaptionKey]
    ignored: tuple[str, ...] = ()
    instruction: str = ""  # key of the text that says what an edit changes

    @property
    def main(self) -> str:
        """Return the key of the text that says the whole."""
        return self.keys[0].name

    def find_errors(self, caption: Mapping[str, Any]) -> list[str]:
        """Return what is missing in a caption, and what is misspelt or of the wrong kind."""
        missing = [] if is_said(caption.get(self.main)) else [f"{self.main} is missing"]
        return missing + self.find_key_errors(caption)

    def find_key_errors(self, caption: Mapping[str, Any]) -> list[str]:
        """Return the faults of the keys that are there."""
        keys = {key.name: key for key in self.keys}
        known = {name: value for name, value in caption.items() if name in keys}
        errors = []
        for name, value in caption.items():
            if name in self.ignored:
                continue
            if name not in keys:
                near = difflib.get_close_matches(name, keys, 1, CERTAIN)
                errors.append(f"{name} is no key of a caption" + (f": {near[0]} is meant" if near else ""))
            elif value is not None and not isinstance(value, keys[name].kind):
                errors.append(f"{name} is {_name_type(value)}, not {_NAMES[keys[name].kind]}")
        entries = {name: value for name, value in known.items() if isinstance(value, list)}
        for key in self.keys:
            if key.kind is list:
                errors += _find_entry_errors(key, entries.get(key.name, []))
        return errors

    def list_unsaid(self, caption: Mapping[str, Any]) -> list[str]:
        """Return the keys that say nothing in a caption."""
        return [key.name for key in self.keys if not caption.get(key.name)]


def _find_entry_errors(key: CaptionKey, entries: Sequence[Any]) -> Iterator[str]:
    needed = key.parts[0]
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not is_said(entry.get(needed)):
            yield f"{key.name}, entry {number}: {needed} is missing"


def is_said(value: Any) -> bool:
    """Return whether a value of a caption is text that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def _name_type(value: Any) -> str:
    return _NAMES.get(type(value), "a number")
