"""Formats of captions that are JSON objects: their keys, what each of them says, and the errors in a caption.

A family whose model was trained with such captions declares its format once. `--check`, the captioner and the
page read the declaration.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CERTAIN = 0.75  # minimum similarity of a misspelled key to the intended one
_NAMES = {str: "a text", list: "a list", dict: "an object", bool: "true or false"}


@dataclass(frozen=True)
class CaptionKey:
    """One key of a JSON caption.

    `kind` is str, dict (an object whose values are texts) or list (of such objects). `about` describes the
    content of the key to the model that writes captions. `parts` are the usual keys of the objects; the first
    one is required in every object of a list.
    """

    name: str
    kind: type
    about: str
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class CaptionFormat:
    """The keys of a JSON caption, in the order that the model was trained with.

    `title` names the model. The first key contains a text and is required in every caption. `ignored` are
    keys that captions of other programs contain and the model was not trained with.
    """

    title: str
    keys: Sequence[CaptionKey]
    ignored: tuple[str, ...] = ()
    instruction: str = ""  # key of the text that says what an edit changes

    @property
    def main(self) -> str:
        """Return the key whose text describes the image as a whole."""
        return self.keys[0].name

    def find_errors(self, caption: Mapping[str, Any]) -> list[str]:
        """Return an error for each key of a caption that is missing, misspelled or of the wrong kind."""
        missing = [] if has_text(caption.get(self.main)) else [f"{self.main} is missing"]
        return missing + self.find_key_errors(caption)

    def find_key_errors(self, caption: Mapping[str, Any]) -> list[str]:
        """Return an error for each key present in a caption that is unknown or of the wrong kind."""
        kinds = {key.name: key.kind for key in self.keys}
        errors = []
        for name, value in caption.items():
            if name in self.ignored:
                continue
            if name not in kinds:
                # The error of an unknown key, with the key that is probably meant
                near = difflib.get_close_matches(name, kinds, 1, CERTAIN)
                suggestion = f": {near[0]} is meant" if near else ""
                errors.append(f"{name} is not a key of a caption{suggestion}")
            elif value is not None and not isinstance(value, kinds[name]):
                errors.append(f"{name} is {_name_type(value)}, not {_NAMES[kinds[name]]}")
        for key in self.keys:
            value = caption.get(key.name)
            if key.kind is list and isinstance(value, list):
                errors += _find_entry_errors(key, value)
        return errors

    def list_unsaid(self, caption: Mapping[str, Any]) -> list[str]:
        """Return the keys whose values in a caption are missing or blank."""
        return [key.name for key in self.keys if not caption.get(key.name)]


def _find_entry_errors(key: CaptionKey, entries: Sequence[Any]) -> Iterator[str]:
    needed = key.parts[0]
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not has_text(entry.get(needed)):
            yield f"{key.name}, entry {number}: {needed} is missing"


def has_text(value: Any) -> bool:
    """Return whether a value in a JSON caption is a non-blank string."""
    return isinstance(value, str) and bool(value.strip())


def _name_type(value: Any) -> str:
    return _NAMES.get(type(value), "a number")
