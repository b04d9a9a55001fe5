"""At which steps classifier-free guidance runs, and how strongly: schedules and skip modes."""

from blissful_tuner.guidance_options import MOST_SCALE, GuidanceOptions
from modules.contract.requests import Prepared
from modules.errors import OptionError


def guidance_scales(prepared: Prepared, options: GuidanceOptions) -> list[tuple[float | None, ...]]:
    """List by expert the guidance scale of each step that is made; None: the positive conditions alone.

    Raises OptionError if the request's schedule and the options do not go together.
    """
    return [_scales_of_steps(prepared, options, scale) for scale in prepared.guidance_scale]


def _scales_of_steps(prepared: Prepared, options: GuidanceOptions, scale: float) -> tuple[float | None, ...]:
    schedule, num_steps = prepared.asked.cfg_schedule, prepared.num_steps
    if prepared.rules.below_share is not None and prepared.rules.below_share <= 0:
        return (None,) * num_steps  # the first step already has that share
    if schedule:
        if options.cfg_skip_mode != "none":
            raise OptionError(
                f"--cfg_schedule {schedule!r} and --cfg_skip_mode {options.cfg_skip_mode} both say which "
                "steps have guidance: give one of them"
            )
        table = parse_cfg_schedule(schedule, num_steps, scale)
        return tuple(table.get(step + 1) for step in range(num_steps))
    if scale == 1.0:  # the formula gives the positive velocity back
        return (None,) * num_steps
    applied = choose_applied_steps(options.cfg_skip_mode, options.cfg_apply_ratio, num_steps)
    return tuple(scale if is_applied else None for is_applied in applied)


def choose_applied_steps(mode: str, ratio: float | None, num_steps: int) -> tuple[bool, ...]:
    """Return for each step whether `--cfg_skip_mode` keeps guidance.

    int(num_steps * ratio) steps keep it, with "alternate" about that many. The mode names the steps that skip
    it: early, late, in the middle, or early and late.
    """
    if mode == "none" or ratio is None:
        return (True,) * num_steps
    if mode == "alternate":
        return _alternate(ratio, num_steps)
    kept = int(num_steps * ratio)
    skipped = num_steps - kept
    kept_at = {
        "early": range(skipped, num_steps),
        "late": range(kept),
        "early_late": range(skipped // 2, skipped // 2 + kept),
        "middle": [step for step in range(num_steps) if not 0 <= step - (num_steps - skipped) // 2 < skipped],
    }[mode]
    return tuple(step in kept_at for step in range(num_steps))


def _alternate(ratio: float, num_steps: int) -> tuple[bool, ...]:
    # plain doubles: 0.6 added five times is a little below 3, and existing tools depend on that
    applied, due = [], 0.0
    for _ in range(num_steps):
        due += ratio
        applied.append(due >= 1.0)
        if applied[-1]:
            due -= 1.0
    return tuple(applied)


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
