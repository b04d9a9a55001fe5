"""The figures of benchmarks/evening.py: written to a file, read from a stranger's, and shown in a table.

A file contains numbers and names from known lists, so it can name no person and no folder, and cannot put
anything else into a page or a table.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from downloads.catalogue import model_sets
from modules.atomic_write import write_text
from modules.control_codes import escape_control_codes, shorten
from modules.errors import UserError
from modules.text_files import parse_json, read_text
from runtime.machine import GIB, MAX_NAME, PACKAGES, SharedMachine, clean_name, clean_version

VERSION = 1
MAX_BYTES = 1 << 16
MAX_COUNT = 1 << 50
MAX_SECONDS = 1e8
MAX_GPUS = 64
# phases in the order in which they run
PHASES = ("check", "latents", "texts", "plan", "training", "generation", "scores")
DRAWN, OWN = "drawn", "own"
PRECISIONS = ("no", "bf16", "fp16")
# options that decide on memory and speed, as run.toml has them: switches and counts
SPEED_OPTIONS = (
    *("network_dim", "gradient_checkpointing", "gradient_checkpointing_cpu_offload", "blocks_to_swap"),
    *("fp8_base", "fp8_scaled", "convrot_int8", "nf4_base", "offload_inactive_dit", "compile", "sdpa"),
)
Read = Callable[[Any], Any]
Record = TypeVar("Record")


class FiguresError(UserError):
    """A file of figures that is damaged, or holds anything but figures."""


# How values are read. Each function raises ValueError for any other value


def _read_text(pattern: str, value: Any) -> str:
    if not isinstance(value, str) or re.fullmatch(pattern, value) is None:
        raise ValueError("is no such text")
    return value


def _read_choice(choices: Sequence[str], value: Any) -> str:
    if value not in choices:
        raise ValueError(f"is none of {', '.join(choices)}")
    return str(value)


def _read_count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise ValueError("is no count")
    return value


def _read_number(limit: float, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > limit:
        raise ValueError("is not a number that can be")
    return float(value)


def _read_seconds(value: Any) -> float:
    seconds = _read_number(MAX_SECONDS, value)
    if seconds < 0:
        raise ValueError("is below 0")
    return seconds


def _read_switch(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("is neither true nor false")
    return value


def _read_optional(read: Read, value: Any) -> Any:
    return None if value is None else read(value)


def _read_list(read: Read, most: int, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list) or len(value) > most:
        raise ValueError("is no such list")
    return tuple(map(read, value))


def _read_table(names: Sequence[str], read: Read, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not value.keys() <= set(names):
        raise ValueError("is no such table")
    return {name: read(value[name]) for name in names if name in value}


def _read_setting(value: Any) -> bool | int:
    return _read_switch(value) if isinstance(value, bool) else _read_count(value)


def _read_version(value: Any) -> str:
    text = _read_text(".{0,40}", value)
    number, _, build = text.partition("+")
    if clean_version(number) != number or re.fullmatch(r"|cpu|xpu|cu\d+|rocm[\d.]+", build) is None:
        raise ValueError("is not a version")
    return text


def _read_name(value: Any) -> str:
    text = _read_text(f".{{0,{MAX_NAME}}}", value)
    if clean_name(text) != text:
        raise ValueError("is not a name of a product")
    return text


def _figure(read: Read) -> Any:
    """Declare a field of a record of figures, with the function that reads it from a file."""
    return field(metadata={"read": read})


@dataclass(frozen=True)
class MachineFigures:
    """The machine, as `SharedMachine` describes it."""

    reelsmith: str = _figure(_read_version)
    commit: str = _figure(partial(_read_text, "[0-9a-f]{0,12}"))
    is_changed: bool = _figure(_read_switch)
    python: str = _figure(_read_version)
    system: str = _figure(_read_name)
    processor: str = _figure(_read_name)
    cores: int = _figure(_read_count)
    host_bytes: int = _figure(_read_count)
    torch: str = _figure(_read_version)
    cuda: str = _figure(_read_version)
    driver: str = _figure(_read_version)
    gpu: str = _figure(_read_name)  # the one that was used; "": the processor
    gpu_bytes: int = _figure(_read_count)
    capability: str = _figure(_read_version)
    packages: dict[str, str] = _figure(partial(_read_table, PACKAGES, _read_version))

    @staticmethod
    def of(machine: SharedMachine) -> "MachineFigures":
        """Return the figures of a machine, of whose GPUs the first is used."""
        values = asdict(machine)
        del values["gpus"]
        used = machine.gpus[0] if machine.gpus else None
        return MachineFigures(
            **values,
            gpu="" if used is None else used.name,
            gpu_bytes=0 if used is None else used.memory_bytes,
            capability="" if used is None else used.capability,
        )


@dataclass(frozen=True)
class PhaseFigures:
    """What a phase took, over all its attempts, and its peaks of memory."""

    name: str = _figure(partial(_read_choice, PHASES))
    seconds: float = _figure(_read_seconds)
    attempts: int = _figure(_read_count)
    device_bytes: int | None = _figure(partial(_read_optional, _read_count))  # None: not measured
    host_bytes: int | None = _figure(partial(_read_optional, _read_count))


@dataclass(frozen=True)
class StepFigures:
    """Seconds of training steps: the median, and those that a tenth of the steps stay below and above."""

    median: float = _figure(_read_seconds)
    low: float = _figure(_read_seconds)
    high: float = _figure(_read_seconds)
    count: int = _figure(_read_count)


@dataclass(frozen=True)
class MemoryFigures:
    """Bytes on the device that the plan predicted, and that were measured; None: not known."""

    planned: int | None = _figure(partial(_read_optional, _read_count))
    measured: int | None = _figure(partial(_read_optional, _read_count))

    @property
    def difference(self) -> float | None:
        """The prediction relative to the measurement, less 1."""
        if not self.planned or not self.measured:
            return None
        return self.planned / self.measured - 1


@dataclass(frozen=True)
class ScoreFigures:
    """Mean cosines of the samples before and after training, of tools/score.py; None: not known."""

    clip_before: float | None = _figure(partial(_read_optional, partial(_read_number, 1.01)))
    clip_after: float | None = _figure(partial(_read_optional, partial(_read_number, 1.01)))
    likeness_before: float | None = _figure(partial(_read_optional, partial(_read_number, 1.01)))
    likeness_after: float | None = _figure(partial(_read_optional, partial(_read_number, 1.01)))


@dataclass(frozen=True)
class EveningFigures:
    """All figures of an evening."""

    version: int = _figure(_read_count)
    family: str = _figure(partial(_read_text, r"[a-z0-9_]{1,40}"))
    task: str = _figure(partial(_read_text, r"[A-Za-z0-9._-]{1,40}"))
    data: str = _figure(partial(_read_choice, (DRAWN, OWN)))
    items: int = _figure(_read_count)
    width: int = _figure(_read_count)
    height: int = _figure(_read_count)
    frames: int = _figure(_read_count)
    steps: int = _figure(_read_count)
    precision: str = _figure(partial(_read_choice, PRECISIONS))
    options: dict[str, bool | int] = _figure(partial(_read_table, SPEED_OPTIONS, _read_setting))
    machine: MachineFigures = _figure(lambda value: _read_record(MachineFigures, value))
    phases: tuple[PhaseFigures, ...] = _figure(
        partial(_read_list, lambda value: _read_record(PhaseFigures, value), len(PHASES))
    )
    step: StepFigures = _figure(lambda value: _read_record(StepFigures, value))
    training_memory: MemoryFigures = _figure(lambda value: _read_record(MemoryFigures, value))
    generation_memory: MemoryFigures = _figure(lambda value: _read_record(MemoryFigures, value))
    first_loss: float | None = _figure(partial(_read_optional, partial(_read_number, 1e6)))
    last_loss: float | None = _figure(partial(_read_optional, partial(_read_number, 1e6)))
    scores: ScoreFigures | None = _figure(
        partial(_read_optional, lambda value: _read_record(ScoreFigures, value))
    )

    def seconds_of(self, *names: str) -> float:
        """Return the seconds of these phases together."""
        return sum(phase.seconds for phase in self.phases if phase.name in names)

    @property
    def attempts(self) -> int:
        """The largest number of attempts of a phase: above 1, the evening was interrupted."""
        return max((phase.attempts for phase in self.phases), default=1)


def _read_record(record: type[Record], value: Any) -> Record:
    """Return a record of the values in a table, each checked. Raises ValueError that names the key."""
    declared = {each.name: each.metadata["read"] for each in fields(record)}  # type: ignore[arg-type]
    if not isinstance(value, dict):
        raise ValueError("is not a table")
    for name in value.keys() ^ declared.keys():
        what = "is missing" if name in declared else "is not a figure"
        raise ValueError(f"{shorten(escape_control_codes(str(name)), 40)} {what}")
    values = {}
    for name, read in declared.items():
        try:
            values[name] = read(value[name])
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
    return record(**values)


def write_figures(path: Path, figures: EveningFigures) -> EveningFigures:
    """Write the figures of an evening, and return them as they can be read from the file.

    Raises:
        FiguresError: If a value is none that a file may hold; nothing is written.
    """
    text = json.dumps(asdict(figures), indent=1) + "\n"
    checked = parse_figures(text, path.name)
    write_text(path, text)
    return checked


def read_figures(path: Path) -> EveningFigures:
    """Read the figures in a file, which may be a stranger's.

    Raises:
        FiguresError: If it is too large, damaged, or holds anything but figures.
    """
    try:
        text = read_text(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise FiguresError(f"{path} cannot be read: {error}") from None
    return parse_figures(text, str(path))


def parse_figures(text: str, name: str) -> EveningFigures:
    """Return the figures in the text of a file.

    Args:
        text: Content of the file.
        name: Name of the file for messages.

    Raises:
        FiguresError: If the text is damaged, or holds anything but figures.
    """
    try:
        figures = _read_record(EveningFigures, parse_json(text, no_repeats=True))
        if figures.version != VERSION:
            raise ValueError(f"version is {figures.version}, not {VERSION}")
        models = {(model.family, model.task) for model in model_sets()}
        if (figures.family, figures.task) not in models:
            raise ValueError(f"{figures.family} {figures.task} is not a model of the catalogue")
    except (ValueError, RecursionError) as error:
        raise FiguresError(
            f"{name} is not a file of figures: {error}. benchmarks/evening.py makes figures.json"
        ) from None
    return figures


def list_figures(folder: Path) -> list[EveningFigures]:
    """Return the figures of all files in a folder, by model, then by GPU. Raises FiguresError."""
    figures = [read_figures(path) for path in sorted(folder.glob("*.json"))]
    return sorted(figures, key=lambda each: (each.family, each.task, each.machine.gpu, each.step.median))


COLUMNS = (
    *("model", "GPU", "data", "seconds a step", "GiB of a step: planned, measured"),
    *("caching, training", "CLIP score, before and after", "with"),
)


def make_proven_table(all_figures: Sequence[EveningFigures]) -> str:
    """Return the table of docs/proven.md, in Markdown; a sentence if there are no figures."""
    if not all_figures:
        return "**No figures have come yet.**\n"
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join(_list_cells(figures))} |" for figures in all_figures]
    return "\n".join(lines) + "\n"


def _list_cells(figures: EveningFigures) -> Iterator[str]:
    machine, step, memory, scores = figures.machine, figures.step, figures.training_memory, figures.scores
    frames = f", {figures.frames} frames" if figures.frames > 1 else ""
    switches = [name for name, value in figures.options.items() if value is True]
    counts = [f"{name} {value}" for name, value in figures.options.items() if value is not True and value]
    yield f"{figures.family} {figures.task}"
    yield f"{machine.gpu}, {show_gib(machine.gpu_bytes)} GiB" if machine.gpu else "none"
    yield f"{figures.items} items ({figures.data}), {figures.width}x{figures.height}{frames}"
    yield f"{show_seconds(step.median)} ({show_seconds(step.low)} to {show_seconds(step.high)})"
    yield f"{show_gib(memory.planned)}, {show_gib(memory.measured)}"
    caching, training = figures.seconds_of("latents", "texts"), figures.seconds_of("training")
    yield f"{caching:.0f} s, {training:.0f} s for {figures.steps} steps"
    yield "" if scores is None else f"{show_cosine(scores.clip_before)}, {show_cosine(scores.clip_after)}"
    yield (
        f"Reelsmith {machine.reelsmith} {machine.commit}, torch {machine.torch}; "
        f"{', '.join([*counts, *switches])}"
    )


def show_gib(size_bytes: int | None) -> str:
    """Return a size in GiB; a dash if it is not known."""
    return "-" if size_bytes is None else f"{size_bytes / GIB:.2f}"


def show_seconds(seconds: float) -> str:
    """Return seconds with three digits."""
    return f"{seconds:.3g}"


def show_cosine(cosine: float | None) -> str:
    """Return a cosine with three decimals; a dash if it is not known."""
    return "-" if cosine is None else f"{cosine:.3f}"
