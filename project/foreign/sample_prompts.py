"""Sample prompts of other trainers' projects, as lines of prompts.txt."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modules.control_codes import drop_control_codes
from project.foreign.contract import UnsetValue, integer, is_off, number, read_side
from project.prompt_lines import format_options, plain

MAX_SAMPLES = 50  # each takes as long as a generation
_DASHES = "a line of prompts.txt has no -- in its prompt and no # at its start; they are left out"


@dataclass(frozen=True)
class ForeignSample:
    """A sample that another trainer's project asks for; None and "" are left to this program."""

    prompt: str
    negative: str = ""
    size: tuple[int, int] | None = None  # width, height
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    is_line: bool = False  # the prompt is a line with options of its own, as sd-scripts writes them
    omissions: tuple[str, ...] = ()  # values that are left out, each with the reason

    def format_line(
        self, trigger_word: str | None, default_options: Mapping[str, Any], guidance_letter: str
    ) -> str:
        """Return the line of prompts.txt.

        Args:
            trigger_word: Replaces [trigger] in the prompt.
            default_options: Size, steps and guidance by their letters, for those that the sample lacks.
            guidance_letter: The letter of the guidance: the model's embedded one, or that of two passes.
        """
        prompt = self.prompt.replace("[trigger]", trigger_word or "").strip()
        if self.is_line:
            return " ".join(drop_control_codes(prompt).split())
        options = dict(default_options)
        if self.size is not None:
            options["w"], options["h"] = self.size
        if self.frames is not None and "f" in options:  # a model of clips
            options["f"] = self.frames
        if self.steps is not None:
            options["s"] = self.steps
        if self.guidance is not None:
            options[guidance_letter] = f"{self.guidance:g}"
        if self.seed is not None:
            options["d"] = self.seed
        if self.negative:
            options["n"] = plain(self.negative)
        return f"{plain(prompt)} {format_options(options)}".strip()


def _read_seed(value: Any) -> int:
    """Return a seed. Raises UnsetValue for -1, which means a random one."""
    seed = integer(-1, 2**63 - 1)(value)
    if seed < 0:
        raise UnsetValue
    return seed


def _read_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("it is not text")
    return value


# field of a sample -> how its value is read
_READERS: Mapping[str, Callable[[Any], Any]] = {
    "negative": _read_text,
    "size": read_side,
    "frames": integer(1, 100_000),
    "steps": integer(1, 100_000),
    "guidance": number(0, 1000),
    "seed": _read_seed,
}


def read_sample(values: Mapping[str, Any], keys: Mapping[str, str], **changes: Any) -> ForeignSample | None:
    """Return the sample that a table of a project describes; None without a prompt.

    Args:
        values: Values of the table.
        keys: The table's key of each field of `ForeignSample`; `width` and `height` stand for its size.
        **changes: Fields that other keys of the project give, for keys that the table lacks.
    """
    found = {name: values[key] for name, key in keys.items() if key in values and not is_off(values[key])}
    texts = {**changes, **found}
    prompt = texts.pop("prompt", None)
    if not isinstance(prompt, str) or not prompt.strip():
        return None
    width, height = texts.pop("width", None), texts.pop("height", None)
    if width and height:
        texts.setdefault("size", f"{width}x{height}")
    fields: dict[str, Any] = {}
    loses_characters = plain(prompt) != " ".join(prompt.split())  # prompts.txt cannot have all of them
    omissions = [f"sample {plain(prompt)}: {_DASHES}"] if loses_characters else []
    for name, value in texts.items():
        try:
            fields[name] = _READERS[name](value)
        except UnsetValue:
            continue
        except (ValueError, TypeError) as error:
            omissions.append(f"{keys.get(name, name)} = {value} of a sample: {error}")
    return ForeignSample(prompt, **fields, omissions=tuple(omissions))


def group_list(values: Mapping[str, Any], start: str) -> list[dict[str, Any]]:
    """Return the tables of the list `start` from dotted keys, such as `samples[0].prompt` for `samples`."""
    tables: dict[int, dict[str, Any]] = {}
    pattern = re.compile(rf"{re.escape(start)}\[(\d+)\]\.(.+)")
    for key, value in values.items():
        match = pattern.fullmatch(key)
        if match is not None:
            tables.setdefault(int(match[1]), {})[match[2]] = value
    return [tables[index] for index in sorted(tables)]


def drop_missing(samples: Sequence[ForeignSample | None]) -> list[ForeignSample]:
    """Return the samples that have a prompt."""
    return [sample for sample in samples if sample is not None]
