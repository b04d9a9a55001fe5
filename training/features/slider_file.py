"""A file of captions to slide between: --slider."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.errors import OptionError
from modules.text_files import parse_toml, read_text

CAPTION_KEYS = ("positive", "negative", "neutral")
DEFAULT_WEIGHTS = {"weight": 1.0, "anchor_weight": 1.0}
KEYS = (*CAPTION_KEYS, "anchor", *DEFAULT_WEIGHTS)
FILE_KEYS = ("guidance", "sliders")
MAX_FACTOR = 100.0


@dataclass(frozen=True)
class Slider:
    """Captions between which one slider LoRA moves, with their loss weights."""

    positive: str
    negative: str
    neutral: str
    anchor: str | None  # caption whose prediction must not change at either strength; None: no anchor
    weight: float  # factor on the loss
    anchor_weight: float

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions that the slider needs encoded: positive, negative, neutral and an optional anchor."""
        anchors = () if self.anchor is None else (self.anchor,)
        return (self.positive, self.negative, self.neutral, *anchors)


@dataclass(frozen=True)
class SliderFile:
    """The content of a --slider file."""

    guidance: float  # how far the result of the neutral caption moves
    sliders: tuple[Slider, ...]

    @property
    def has_anchors(self) -> bool:
        """Return whether any slider has an anchor, a prompt that it leaves unchanged."""
        return any(slider.anchor is not None for slider in self.sliders)


def read_sliders(path: Path) -> SliderFile:
    """Read a --slider file. Raises OptionError that names the file, the key and what to write."""
    location = f"--slider {path}"
    try:
        content = parse_toml(read_text(path))
    except (OSError, ValueError) as error:
        raise OptionError(
            f"{location}: it is not a TOML file ({error}). Pass one with [[sliders]]: docs/targets.md shows "
            "it"
        ) from None
    _reject_unknown(location, content, FILE_KEYS)
    tables = content.get("sliders")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise OptionError(
            f"{location}: it has no [[sliders]]. Write one table for each direction, with positive, negative "
            "and neutral"
        )
    guidance = _read_number(location, content, "guidance", 3.0)
    sliders = [
        _read_slider(f"{location}, [[sliders]] {number}", table) for number, table in enumerate(tables, 1)
    ]
    return SliderFile(guidance, tuple(sliders))


def _reject_unknown(location: str, table: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = [key for key in table if key not in known]
    if unknown:
        raise OptionError(f"{location}: unknown key {unknown[0]}. Use {', '.join(known)}")


def _read_slider(location: str, table: Mapping[str, Any]) -> Slider:
    """Read one table of [[sliders]]; `location` names it in messages."""
    _reject_unknown(location, table, KEYS)
    for key in (*CAPTION_KEYS, "anchor"):
        text = table.get(key)
        if text is None and key in CAPTION_KEYS:
            raise OptionError(f'{location}: it has no {key}. Write {key} = "a caption"')
        if text is not None and not isinstance(text, str):
            raise OptionError(f'{location}: {key} = {text!r} is not a caption. Write {key} = "a caption"')
    if table["positive"] == table["negative"]:
        raise OptionError(
            f"{location}: positive and negative are equal, so there is nothing to slide between. Write two "
            "different captions"
        )
    if "anchor_weight" in table and "anchor" not in table:
        raise OptionError(
            f'{location}: anchor_weight needs an anchor. Write anchor = "a caption", or omit it'
        )
    return Slider(
        positive=table["positive"],
        negative=table["negative"],
        neutral=table["neutral"],
        anchor=table.get("anchor"),
        weight=_read_number(location, table, "weight", DEFAULT_WEIGHTS["weight"]),
        anchor_weight=_read_number(location, table, "anchor_weight", DEFAULT_WEIGHTS["anchor_weight"]),
    )


def _read_number(location: str, table: Mapping[str, Any], key: str, default: float) -> float:
    value = table.get(key, default)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= MAX_FACTOR:
        raise OptionError(
            f"{location}: {key} = {value!r}: use a number above 0 and of at most {MAX_FACTOR:g}"
        )
    return float(value)
