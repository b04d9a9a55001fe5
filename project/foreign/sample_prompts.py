"""Sample prompts of other trainers' projects, as lines of prompts.txt."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modules.control_codes import drop_control_codes
from project.foreign.contract import is_off, number, read_side

MAX_SAMPLES = 50  # each takes as long as a generation


@dataclass(frozen=True)
class ForeignSample:
    """A sample that another trainer's project asks for; None and "" are left to this program."""

    prompt: str
    negative: str = ""
    size: tuple[int, int] | None = None  # width, height
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    is_line: bool = False  # the prompt is a line with options of its own, as sd-scripts writes them

    def format_line(self, trigger_word: str | None, default_size: str, released_values: str) -> str:
        """Return the line of prompts.txt.

        Args:
            trigger_word: Replaces [trigger] in the prompt.
            default_size: Options of the size, if the sample has none.
            released_values: Options of the model's steps and guidance, if the sample has none.
        """
        prompt = self.prompt.replace("[trigger]", trigger_word or "").strip()
        if self.is_line:
            return " ".join(drop_control_codes(prompt).split())
        parts = [plain(prompt)]
        parts.append(default_size if self.size is None else f"--w {self.size[0]} --h {self.size[1]}")
        if self.steps is None and self.guidance is None:
            parts.append(released_values)
        if self.steps is not None:
            parts.append(f"--s {self.steps}")
        if self.guidance is not None:
            parts.append(f"--l {self.guidance:g}")
        if self.seed is not None:
            parts.append(f"--d {self.seed}")
        if self.negative:
            parts.append(f"--n {plain(self.negative)}")
        return " ".join(filter(None, parts))


def plain(text: str) -> str:
    """Return a prompt on one line, without characters that would start options or comments in prompts.txt."""
    on_one_line = " ".join(drop_control_codes(text).split())
    without_options = re.sub(r"(^|\s)-+", r"\1", on_one_line).lstrip("#")
    return " ".join(without_options.split())


def read_sample(values: Mapping[str, Any], keys: Mapping[str, str], **changes: Any) -> ForeignSample | None:
    """Return the sample that a table of a project describes; None without a prompt.

    A value that is not a number or a size is left out.

    Args:
        values: Values of the table.
        keys: The table's key of each field of `ForeignSample`; `width` and `height` stand for its size.
        **changes: Fields that other keys of the project give, for keys that the table lacks.
    """
    found = {name: values[key] for name, key in keys.items() if key in values and not is_off(values[key])}
    fields = {**changes, **found}
    prompt = fields.pop("prompt", None)
    if not isinstance(prompt, str) or not prompt.strip():
        return None
    negative = fields.get("negative", "")
    size = fields.pop("size", None)
    if size is None and fields.get("width") and fields.get("height"):
        size = f"{fields['width']}x{fields['height']}"
    return ForeignSample(
        prompt=prompt,
        negative=negative if isinstance(negative, str) else "",
        size=None if size is None else _read_or_none(read_side, size),
        steps=_read_or_none(_read_count, fields.get("steps")),
        guidance=_read_or_none(number(0, 100), fields.get("guidance")),
        seed=_read_or_none(_read_count, fields.get("seed")),
    )


def _read_count(value: Any) -> int:
    return int(number(0, 2**63 - 1)(value))


def _read_or_none(read: Any, value: Any) -> Any:
    try:
        return read(value)
    except (ValueError, TypeError):
        return None


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
