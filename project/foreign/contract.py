"""What a program's file says of a training: a record with a rule for each key. No torch."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from downloads.naming import plain_name
from modules.output_files import check_output_name
from project.options import check_trigger

# where a value goes: an option of `new`, a key of [training] in run.toml or of [general] in dataset.toml, or
NEW, TRAINING, DATA = "new", "training", "data"
MODEL = "model"  # the name of a model: a task is looked for
FOLDER = "folder"  # with pictures or clips
EPOCHS = "epochs"  # they become steps
WHOLE = "whole"  # whether the model itself is trained
KIND = "kind"  # of a network: a LoRA, or another one
LEFT = "left"  # it is not taken; the rule says why

MOST_STEPS = 10_000_000


class KeyRule(NamedTuple):
    """What becomes of a key. read: makes our value of theirs; raises ValueError with a reason."""

    to: str
    name: str = ""  # of the option or key; of LEFT the reason
    read: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Program:
    """A trainer, and how its files are read.

    Keys are written with dots, elements of lists as []. What has no rule is left, and told.
    """

    title: str
    suffixes: tuple[str, ...]
    marks: tuple[str, ...]  # keys of which each of its files has at least one
    rules: Mapping[str, KeyRule]
    models: Mapping[str, tuple[str, str | None]]  # its name of a model -> family and task
    alpha: float | None  # --network_alpha of a LoRA for which none is said; None: its rank
    companions: tuple[str, ...] = ()  # keys that name a further file, whose keys follow KEY:


def left(reason: str) -> KeyRule:
    return KeyRule(LEFT, reason)


def number(least: float = 0, most: float = 1e9) -> Callable[[Any], float]:
    """Return a reader of numbers within limits."""

    def read(value: Any) -> float:
        if isinstance(value, str):  # YAML takes 1e-4 for a text, and the fields of a page are texts
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError("it is no number")
        if not least <= value <= most:
            raise ValueError(f"it has to be {least:.12g} to {most:.12g}")
        return value

    return read


def whole(least: int = 0, most: int = MOST_STEPS) -> Callable[[Any], int]:
    """Return a reader of whole numbers within limits."""
    of_number = number(least, most)

    def read(value: Any) -> int:
        found = of_number(value)
        if found != int(found):
            raise ValueError("it is no whole number")
        return int(found)

    return read


def text_of(table: Mapping[str, str], instead: str) -> Callable[[Any], str]:
    """Return a reader of names that are spelled in any way. instead: what to do with other names."""

    def read(value: Any) -> str:
        name = table.get(plain_name(str(value)))
        if name is None:
            raise ValueError(instead)
        return name

    return read


_OPTIMIZERS = {
    **dict.fromkeys(("adamw", "adamwoptimi", "adamwbf16", "adamwtorch"), "adamw"),
    **dict.fromkeys(("adamw8bit", "adamw8bitkahan", "bnbadamw8bit"), "adamw8bit"),
    **{name: name for name in ("adafactor", "lion", "prodigy")},
}
_SCHEDULERS = {
    plain_name(name): name
    for name in ("constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "polynomial")
}
read_optimizer = text_of(_OPTIMIZERS, "choose one from docs/training.md: optimizer_type below [training]")
read_scheduler = text_of(_SCHEDULERS, "choose one from docs/training.md: lr_scheduler below [training]")


def read_name(value: Any) -> str:
    """Return the name of a LoRA: the file's without folders and suffix."""
    name = re.split(r"[/\\]", str(value).strip())[-1].removesuffix(".safetensors")
    if not name:
        raise ValueError("it is empty")
    check_output_name("--output_name", name)
    return name


def read_trigger(value: Any) -> str:
    """Return a trigger word."""
    word = str(value or "")
    if not word.strip():
        raise ValueError("it is empty")
    check_trigger(word)
    return word


def read_side(value: Any) -> tuple[int, int]:
    """Return width and height: of a number, `512,512`, `512x768`, or of the largest of several numbers."""
    if isinstance(value, list):
        value = max(map(whole(), value), default=0)
    parts = re.split(r"[,x]", value) if isinstance(value, str) else [value]
    sides = [whole(64, 8192)(part) for part in parts]
    if len(sides) > 2:
        raise ValueError("it is no size: give resolution in dataset.toml")
    rounded = [side // 32 * 32 for side in sides]
    return rounded[0], rounded[-1]


def read_text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("it is empty")
    return value.strip()


def read_folder(value: Any) -> Path:
    return Path(read_text(value))
