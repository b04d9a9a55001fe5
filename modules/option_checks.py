"""Check the values of options against their facts, from a record or a table.

Facts are those of `option` (modules/options.py): limits, choices, what an option needs and excludes, and what
a path has to be. Standard library only.
"""

import operator
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from modules.control_codes import shorten
from modules.errors import OptionError
from modules.option_values import check_path, format_number
from modules.output_files import reject_replacing

Info = Mapping[str, Any]
# returns which of the named options are set: they differ from their defaults and are not turned off
ListSetOptions = Callable[[Collection[str]], list[str]]


class _Limit(NamedTuple):
    words: str  # text before the limit in a message
    holds: Callable[[Any, Any], bool]  # whether a number is within the limit


LIMITS: Mapping[str, _Limit] = {
    "minimum": _Limit("of at least", operator.ge),
    "above": _Limit("above", operator.gt),
    "maximum": _Limit("of at most", operator.le),
    "below": _Limit("below", operator.lt),
}
# facts that this file checks, also contained in tables
CHECKED_INFO = (*LIMITS, "one_of", "hint", "needs", "excludes", "why", "off", "place", "must_not_replace")


def check_value(name: str, value: Any, facts: Info) -> None:
    """Check the value of an option, regardless of other options.

    Raises:
        OptionError: If a number is outside its limits, or the value is not in `one_of`.
    """
    limits = {limit: facts[limit] for limit in LIMITS if limit in facts}
    for number in value if isinstance(value, (tuple, list)) else (value,):
        is_number = isinstance(number, (int, float))
        # `holds` is never true for NaN
        if is_number and not all(LIMITS[limit].holds(number, bound) for limit, bound in limits.items()):
            hint = f"{_describe_limits(limits)}{_find_hint(facts)}"
            raise OptionError(f"--{name} {format_number(number)}: use a number {hint}")
    if "one_of" in facts and value not in facts["one_of"]:
        near = f", not {shorten(str(value), 80)!r}" if not value else ""
        raise OptionError(
            f"--{name} {value}: use {_join_alternatives(facts['one_of'])}{near}{_find_hint(facts)}"
        )


def check_relations(name: str, facts: Info, list_set: ListSetOptions) -> None:
    """Raise OptionError if a set option conflicts with, or lacks, another option.

    The option's fact `excludes` names options that must not be set too; `needs` names options of which one
    must be set.
    """
    excluded = list_set(facts["excludes"]) if facts.get("excludes") else []
    if excluded:
        hint = _find_relation_hint(facts)
        raise OptionError(f"--{name} and --{excluded[0]} exclude each other: pass one of them{hint}")
    missing_flags = find_needed(facts, list_set) if facts.get("needs") else ""
    if missing_flags:
        remedy = "both" if len(facts["needs"]) == 1 else "one of them too"
        hint = "" if facts.get("excludes") else _find_relation_hint(facts)
        raise OptionError(f"--{name} needs {missing_flags}: pass {remedy}{hint}")


def find_needed(facts: Info, list_set: ListSetOptions) -> str:
    """Return the flags that an option needs, joined by "or", if none of them is set; "" otherwise."""
    needed = facts.get("needs", ())
    if not needed or list_set(needed):
        return ""
    return _join_alternatives([f"--{name}" for name in needed])


def check_paths(flag: str, value: Any, facts: Info, find_paths: Callable[[str], Any]) -> None:
    """Check the paths of an option.

    Args:
        flag: The option as it is typed.
        value: A path or several.
        facts: Facts of the option; `place` says what a path must be, as in `check_path`.
        find_paths: Returns the path or paths of another option by its public name.

    Raises:
        OptionError: If a path is unusable, or if it would replace a file of an option in
            `must_not_replace`.
    """
    for path in list_paths(value):
        for name in facts.get("must_not_replace", ()):
            reject_replacing(flag, path, list_paths(find_paths(name)))
        check_path(flag, path, facts["place"], facts.get("hint", ""))  # also warns if a file will be replaced


def list_paths(value: Any) -> list[Path]:
    """Return the paths in an option's value, which may be a single path or a tuple."""
    values = value if isinstance(value, tuple) else (value,)
    return [path for path in values if isinstance(path, Path)]


def _find_hint(facts: Info) -> str:
    return f" ({facts['hint']})" if facts.get("hint", "") else ""


def _find_relation_hint(facts: Info) -> str:
    """Return the reason for `needs` or `excludes`: `why`, else a `hint` that is not about the value."""
    if "why" in facts:
        return f" ({facts['why']})"
    is_value_hint = any(fact in facts for fact in (*LIMITS, "one_of", "place"))
    return "" if is_value_hint else _find_hint(facts)


def _describe_limits(limits: Mapping[str, float]) -> str:
    """Describe the limits of a number, by their names in `LIMITS`: "from 1 to 10" or "above 0"."""
    texts = {
        name: f"{bound:,g}" if isinstance(bound, float) else f"{bound:,}" for name, bound in limits.items()
    }
    if "minimum" in texts and "maximum" in texts:
        return f"from {texts['minimum']} to {texts['maximum']}"
    return " and ".join(f"{LIMITS[name].words} {text}" for name, text in texts.items())


def _join_alternatives(words: Collection[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last
