"""`--cfg_schedule`: at which steps classifier-free guidance runs, and how strongly. Standard library only."""

from blissful_tuner.guidance_options import MOST_SCALE
from modules.errors import OptionError


def parse_cfg_schedule(text: str, steps: int, guidance_scale: float) -> dict[int, float]:
    """Return the guidance scale by step number, counted from 1; other steps run without guidance.

    text: comma-separated `k`, `a-b` or `e~m` (every m-th step), each with an optional `:scale`, by default
    `guidance_scale`; `!` in front excludes. Later entries override earlier ones; exclusions override all
    entries, wherever they stand. Raises OptionError naming the entry if it is not a number, lies outside
    1..steps, runs backwards, or has a scale that is no number or too large.
    """
    scales: dict[int, float] = {}
    excluded: set[int] = set()
    for entry in filter(None, (part.strip() for part in text.split(","))):
        numbers, colon, scale = entry.removeprefix("!").partition(":")
        chosen = _steps_of(numbers.strip(), steps, entry)
        if entry.startswith("!"):
            excluded.update(chosen)
        else:
            scales.update(dict.fromkeys(chosen, _scale(scale, entry) if colon else guidance_scale))
    return {step: scales[step] for step in sorted(scales.keys() - excluded)}


def _steps_of(numbers: str, steps: int, entry: str) -> range:
    if numbers.startswith("e~"):
        every = _whole(numbers[2:], entry)
        if every < 1:
            raise _problem(entry, "the interval after ~ must be at least 1")
        return range(every, steps + 1, every)
    first_text, dash, last_text = numbers.partition("-")
    first = _whole(first_text, entry)
    last = _whole(last_text, entry) if dash else first
    if first > last:
        raise _problem(entry, f"it runs backwards, from {first} to {last}")
    if first < 1 or last > steps:
        raise _problem(entry, f"the steps are 1 to {steps}")
    return range(first, last + 1)


def _whole(text: str, entry: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise _problem(entry, f"{text.strip()!r} is not a whole number") from None


def _scale(text: str, entry: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        raise _problem(entry, f"the scale {text.strip()!r} is not a number") from None
    if not abs(scale) <= MOST_SCALE:  # nan too
        raise _problem(entry, f"give a scale of at most {MOST_SCALE}")
    return scale


def _problem(entry: str, reason: str) -> OptionError:
    return OptionError(
        f"--cfg_schedule entry {entry!r}: {reason}. Write entries such as 1-10, 20, e~3 or 1-10:6.5, !5"
    )
