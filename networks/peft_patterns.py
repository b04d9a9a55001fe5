"""Match module names against the keys of PEFT's `alpha_pattern` and `rank_pattern`.

A key is the end of a module's path (`to_q`, `attn1.to_q`) or a regular expression for it. A file may come
from anywhere, and a hostile expression keeps Python's `re` busy for years, so expressions are matched here,
in time linear in the path.
"""

import functools
import re
import string
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass

MAX_EXPRESSIONS = 1_000  # characters of all regular expressions of a file together
MAX_PATH = 1_000  # characters of a path; longer ones match nothing
_PLAIN = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)
_CLASSES = {
    "d": frozenset(string.digits),
    "w": frozenset(string.ascii_letters + string.digits + "_"),
    "s": frozenset(string.whitespace),
}


@dataclass(frozen=True)
class _Chars:
    """A step of an automaton that takes one character: one of `chars`, or with `negated` any other."""

    chars: Set[str]
    negated: bool = False

    def takes(self, char: str) -> bool:
        return (char in self.chars) != self.negated


@dataclass(frozen=True)
class _Fork:
    """A step that takes nothing and goes on at other steps, given by their distance from this one."""

    ways: tuple[int, ...]


_Step = _Chars | _Fork
_ANY = _Chars(frozenset(), negated=True)


class PeftPatterns:
    """The keys of an `alpha_pattern` with their values; of several that match, PEFT takes the first."""

    def __init__(self, values: Mapping[str, float]) -> None:
        """Raises ValueError if a key is an expression that is not supported, or if these are too long."""
        self._values = values
        self._places = {key: place for place, key in enumerate(values)}
        self._expressions = [key for key in values if not _PLAIN.fullmatch(key)]
        if sum(map(len, self._expressions)) > MAX_EXPRESSIONS:
            raise ValueError(f"its regular expressions have more than {MAX_EXPRESSIONS} characters in all")
        for key in self._expressions:
            _compile(key)

    def find(self, path: str) -> float | None:
        """Return the value for a module path (`blocks.0.attn1.to_q`), or None if no key matches."""
        if len(path) > MAX_PATH:
            return None
        ends = [path, *(path[index + 1 :] for index, char in enumerate(path) if char == ".")]
        found = [end for end in ends if end in self._places] + [
            key for key in self._expressions if _matches(key, path)
        ]
        return self._values[min(found, key=self._places.__getitem__)] if found else None


def _matches(key: str, path: str) -> bool:
    """Tell whether an expression matches a path or what follows one of its dots."""
    steps = _compile(key)
    starts = {0}  # as after PEFT's own `(.*\.)?` before the key
    if not key.startswith("^"):
        starts |= {index + 1 for index, char in enumerate(path) if char == "."}
    active: set[int] = set()
    for index, char in enumerate(path):
        if index in starts:
            active |= _reach(steps, [0])
        taken = [at for at in active if isinstance(step := steps[at], _Chars) and step.takes(char)]
        active = _reach(steps, [at + 1 for at in taken])
    return len(steps) - 1 in active


def _reach(steps: tuple[_Step, ...], starts: Iterable[int]) -> set[int]:
    """Return the steps that can be reached from `starts` without taking a character, these included."""
    reached, waiting = set[int](), list(starts)
    while waiting:
        at = waiting.pop()
        if at in reached:
            continue
        reached.add(at)
        step = steps[at]
        if isinstance(step, _Fork):
            waiting.extend(at + way for way in step.ways)
    return reached


@functools.lru_cache(maxsize=1024)
def _compile(key: str) -> tuple[_Step, ...]:
    """Compile an expression; its last step, which takes nothing, is reached if it matches.

    Raises ValueError.
    """
    text = key.removeprefix("^")
    text = text[:-1] if text.endswith("$") and not text.endswith(r"\$") else text
    steps, at = _alternatives(text, 0, key)
    if at < len(text):
        raise _refusal(key, at, text)
    return (*steps, _Fork(()))


def _alternatives(text: str, at: int, key: str) -> tuple[list[_Step], int]:
    """Parse `one|two|...` from a place on, up to a closing bracket or the end."""
    steps, at = _sequence(text, at, key)
    while text[at : at + 1] == "|":
        other, at = _sequence(text, at + 1, key)
        steps = [_Fork((1, len(steps) + 2)), *steps, _Fork((len(other) + 1,)), *other]
    return steps, at


def _sequence(text: str, at: int, key: str) -> tuple[list[_Step], int]:
    steps: list[_Step] = []
    while at < len(text) and text[at] not in "|)":
        atom, at = _atom(text, at, key)
        repeat = _REPEATS.get(text[at : at + 1])
        if repeat is not None:
            atom, at = repeat(atom), at + 1
            at += text[at : at + 1] == "?"  # lazy: a match of the whole is the same
        steps += atom
    return steps, at


_REPEATS: Mapping[str, Callable[[list[_Step]], list[_Step]]] = {
    "?": lambda atom: [_Fork((1, len(atom) + 1)), *atom],
    "*": lambda atom: [_Fork((1, len(atom) + 2)), *atom, _Fork((-len(atom) - 1,))],
    "+": lambda atom: [*atom, _Fork((-len(atom), 1))],
}


def _atom(text: str, at: int, key: str) -> tuple[list[_Step], int]:
    char, after = text[at], text[at + 1 : at + 2]
    if char == "(":
        start = at + 3 if text.startswith("(?:", at) else at + 1
        steps, at = _alternatives(text, start, key) if text[start : start + 1] != "?" else ([], start)
        if text[at : at + 1] != ")":
            raise _refusal(key, at, text)
        return steps, at + 1
    if char == "[":
        return _set(text, at, key)
    if char == ".":
        return [_ANY], at + 1
    if char == "\\" and after.lower() in _CLASSES:
        return [_Chars(_CLASSES[after.lower()], negated=after.isupper())], at + 2
    if char == "\\" and after and not after.isalnum():
        return [_Chars(frozenset(after))], at + 2
    if char in r"\^$*+?{}]":
        raise _refusal(key, at, text)
    return [_Chars(frozenset(char))], at + 1


def _set(text: str, at: int, key: str) -> tuple[list[_Step], int]:
    """Parse `[a-z0-9_]`."""
    found = re.compile(r"\[(\^?)((?:[\w.]-[\w.]|[\w.]|\\[dw.])+)\]", re.ASCII).match(text, at)
    if found is None:
        raise _refusal(key, at, text)
    chars: set[str] = set()
    for part in re.findall(r"[\w.]-[\w.]|\\[dw.]|[\w.]", found[2], re.ASCII):
        if part[0] == "\\":
            chars |= _CLASSES.get(part[1], {part[1]})
        else:
            chars |= {chr(code) for code in range(ord(part[0]), ord(part[-1]) + 1)}
    return [_Chars(frozenset(chars), negated=bool(found[1]))], found.end()


def _refusal(key: str, at: int, text: str) -> ValueError:
    shown, what = key if len(key) <= 80 else f"{key[:80]}...", text[at : at + 4] or "its end"
    return ValueError(
        f"the key {shown!r} is not supported from {what!r} on: write the end of a module's name, or a "
        "regular expression of "
        "characters, sets, groups, |, *, + and ?"
    )
