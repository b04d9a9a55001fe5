"""A form for a tool that processes a folder: fields that are options of the tool, and its command."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modules.control_codes import shorten
from modules.option_tables import list_rows
from modules.pages.language import refusal

NUMBER, TEXT, SWITCH = "number", "text", "switch"
CHOICE, SWITCH_CHOICE = "choice", "choice of switches"


@dataclass(frozen=True)
class ToolField:
    """A field of a form.

    Attributes:
        name: Option of the tool; for SWITCH_CHOICE, any name.
        label: Label of the field.
        kind: NUMBER, TEXT, SWITCH, CHOICE or SWITCH_CHOICE.
        choices: Text of each value; the value "" stands for no option.
    """

    name: str
    label: str
    kind: str  # NUMBER, TEXT, SWITCH, CHOICE or SWITCH_CHOICE, of which each value is an option
    choices: Mapping[str, str] | None = None


@dataclass(frozen=True)
class ToolForm:
    """The form of a tool. `name` starts the ids of its fields; the table of `script` has its options."""

    name: str
    script: str
    fields: Sequence[ToolField]

    def id(self, field: ToolField) -> str:
        """Return the HTML id of a field."""
        return f"{self.name}-{field.name}"

    def name_default(self, field: ToolField) -> str:
        """Return the default of a field, for its placeholder."""
        if field.kind in (SWITCH, SWITCH_CHOICE):
            return ""
        value = list_rows(self.script)[field.name].get("default")
        return "" if value is None else str(value)

    def make_argv(self, target: str, texts: Mapping[str, str]) -> list[str]:
        """Return the command line of the tool that the form is for.

        Args:
            texts: Typed values by field name.

        Raises:
            OptionError: If a text is not valid for its field.
        """
        argv = ["python", self.script, target]
        for field in self.fields:
            text = " ".join(texts.get(field.name, "").split())  # one line, single spaces
            if not text or text == self.name_default(field):
                continue
            self._check(field, text)
            if field.kind == SWITCH_CHOICE:  # each choice is the name of a switch
                argv.append(f"--{text}")
            elif field.kind == SWITCH:
                argv.append(f"--{field.name}")
            else:
                argv += format_option(field.name, text)
        return argv

    def _check(self, field: ToolField, text: str) -> None:
        """Raise OptionError if a text is not valid for its field."""
        if field.kind == NUMBER:
            _check_number(field, text, list_rows(self.script)[field.name])
        if field.choices is not None and text not in field.choices:
            raise refusal(
                "%(label)s %(text)s: choose from the list.", label=field.label, text=shorten(text, 40)
            )


def format_option(option: str, text: str) -> list[str]:
    """Return [option, value]; or [`--option=value`] if the value itself looks like an option."""
    return [f"--{option}={text}"] if text.startswith("-") else [f"--{option}", text]


def _check_number(field: ToolField, text: str, row: Mapping[str, Any]) -> None:
    """Raise OptionError if a text is not a number within an option's limits."""
    # `row` is the option's in the table of its script.
    limits = row.get("facts", {})
    is_integer = isinstance(row.get("default"), int)
    # `above` and `below` exclude their value: the command itself rejects that one
    minimum = limits.get("minimum", limits.get("above", -math.inf))
    maximum = limits.get("maximum", limits.get("below", math.inf))
    try:
        number = int(text) if is_integer else float(text)
        is_valid = minimum <= number <= maximum  # false for NaN
    except ValueError:
        is_valid = False
    if is_valid:
        return
    values = {
        "label": field.label,
        "text": shorten(text, 40),
        "minimum": f"{minimum:g}",
        "maximum": f"{maximum:g}",
    }
    if is_integer:
        raise refusal("%(label)s %(text)s: use a whole number from %(minimum)s to %(maximum)s.", **values)
    raise refusal("%(label)s %(text)s: use a number from %(minimum)s to %(maximum)s.", **values)
