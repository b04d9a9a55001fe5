"""A form for a tool that works through a folder: fields that are options of the tool, and its command."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modules.control_codes import shorten
from modules.errors import OptionError
from modules.options import default_of, facts_of
from modules.pages.language import say

NUMBER, TEXT, SWITCH, CHOICE = "number", "text", "switch", "choice"


@dataclass(frozen=True)
class ToolField:
    """A field of a form.

    name: the option of the tool; of a choice of switches, any name. record: declares the option; None: each
    value of the choice is a switch. choices: value -> text; the value "" gives no option.
    """

    name: str
    label: str
    kind: str  # NUMBER, TEXT, SWITCH, or CHOICE
    record: type | None
    choices: Mapping[str, str] | None = None

    @property
    def facts(self) -> Mapping[str, Any]:
        return {} if self.record is None else facts_of(self.record)[self.name]

    @property
    def usual(self) -> str:
        """Return the value that it has while nothing is typed, as its placeholder."""
        if self.record is None:
            return ""
        (declared,) = [field for field in dataclasses.fields(self.record) if field.name == self.name]
        value = default_of(self.record, declared)
        return "" if value is None or self.kind == SWITCH else str(value)


@dataclass(frozen=True)
class ToolForm:
    """The form of a tool. name: begins the ids of its fields in a page."""

    name: str
    script: str
    fields: Sequence[ToolField]

    def id(self, field: ToolField) -> str:
        return f"{self.name}-{field.name}"

    def make_words(self, target: str, texts: Mapping[str, str]) -> list[str]:
        """Return the command. target: what the tool works through. texts: of the fields, by their names.

        Raises OptionError for a text that the field cannot have.
        """
        words = ["python", self.script, target]
        for field in self.fields:
            text = " ".join(texts.get(field.name, "").split())
            if not text or text == field.usual:
                continue
            if field.kind == NUMBER:
                _check_number(field, text)
            if field.choices is not None and text not in field.choices:
                raise OptionError(
                    say(
                        "%(label)s %(text)s: choose from the list.",
                        label=field.label,
                        text=shorten(text, 40),
                    )
                )
            if field.record is None:
                words.append(f"--{text}")
            elif field.kind == SWITCH:
                words.append(f"--{field.name}")
            else:
                words += give_value(field.name, text)
        return words


def give_value(option: str, text: str) -> list[str]:
    """Return the words of an option with a value: one word if the value looks like an option."""
    return [f"--{option}={text}"] if text.startswith("-") else [f"--{option}", text]


def _check_number(field: ToolField, text: str) -> None:
    facts = field.facts
    least, most = facts.get("least", -math.inf), facts.get("most", math.inf)
    try:
        is_right = least <= float(text) <= most
    except ValueError:
        is_right = False
    if not is_right:
        raise OptionError(
            say(
                "%(label)s %(text)s: give a number from %(least)s to %(most)s.",
                label=field.label,
                text=shorten(text, 40),
                least=f"{least:g}",
                most=f"{most:g}",
            )
        )
