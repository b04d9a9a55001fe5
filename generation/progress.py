"""Console output of a generation: boxes at its start and end, and bars and lines between them."""

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from pathlib import Path

import torch

from generation.experts import experts_by_step
from modules.console import Row, as_size, count_of, in_words, show_box
from modules.contract.family import Family
from modules.contract.requests import Prepared
from modules.planning.device_memory import peak_in_words

logger = logging.getLogger(__name__)

PROMPT_LENGTH = 100  # characters of a prompt in a line
FLOAT_BYTES = 4  # latent files are float32


def in_short(prompt: str, length: int = PROMPT_LENGTH) -> str:
    """Return the beginning of a prompt as one line."""
    line = " ".join(prompt.split())
    return line if len(line) <= length else f"{line[: length - 3]}..."


def size_in_words(prepared: Prepared) -> str:
    """Return a description of a request's result, without its prompt."""
    return (
        f"{prepared.width} x {prepared.height} (width x height), {count_of(prepared.frames, 'frame')}, "
        f"{prepared.num_steps} steps, seed {prepared.seed}"
    )


def show_start(
    family: Family,
    requests: Sequence[Prepared],
    loras: Mapping[str, Sequence[tuple[str, float]]],
    folder: Path,
    device: torch.device,
) -> None:
    """Show the generation's plan. loras: by expert, "" if none is meant, file name and strength of each."""
    step, rows, columns = family.latent.stride
    sizes = [
        (family.latent.channels, (one.frames - 1) // step + 1, one.height // rows, one.width // columns)
        for one in requests
    ]
    first = requests[0]
    is_one = len(requests) == 1
    free = shutil.disk_usage(folder).free
    has_names = any(expert.name for expert in family.experts)
    lines = [
        f"{name}, strength {strength:g}" + (f", for {expert.replace('_', ' ')}" if expert else "")
        for expert, files in loras.items()
        for name, strength in files
    ]
    source, steps = first.asked.source, count_of(first.steps, "step")
    start = None if source is None else f"{source.path}, the last {first.num_steps} of {steps}"
    box: list[Row] = [
        ("model", name_model(family.metadata)),
        ("experts", "\n".join(experts_in_words(family)) if has_names else None),
        ("LoRAs", "\n".join(lines)),
        ("clip", size_in_words(first) if is_one else None),
        ("clips", None if is_one else f"{len(requests)}; the first: {size_in_words(first)}"),
        ("turns", turns_in_words(family, first) if has_names else None),
        ("prompt", in_short(first.asked.prompt, 3 * PROMPT_LENGTH) if is_one else None),
        ("from", start if is_one else None),
        ("device", str(device)),
        ("disk", f"latents {as_size(FLOAT_BYTES * sum(map(prod, sizes)))}; {as_size(free)} free"),
        ("folder", str(folder)),
    ]
    show_box("Generating", box)


def experts_in_words(family: Family) -> list[str]:
    """Return a line for each expert that has a name: its file, and the timesteps that it is for."""
    experts = family.experts
    named = [(expert, file) for expert, file in zip(experts, family.dit_files, strict=False) if expert.name]
    lines = []
    for expert, file in named:
        above = min((each.lowest for each in experts if each.lowest > expert.lowest), default=None)
        upper = "" if above is None else f" below timestep {above:g}"
        lower = f" from timestep {expert.lowest:g} on" if expert.lowest else ""
        lines.append(
            f"{expert.name.replace('_', ' ')}: {file.name}{lower}{' and' * bool(lower and upper)}{upper}"
        )
    return lines


def turns_in_words(family: Family, prepared: Prepared) -> str:
    """Return how many steps each expert makes, in their order."""
    runs = [
        (family.experts[expert], len([*run])) for expert, run in groupby(experts_by_step(family, prepared))
    ]
    shares = ", ".join(f"{count} by the {expert.words}" for expert, count in runs)
    start = "" if prepared.num_steps == prepared.steps else f", the last {prepared.num_steps} of them"
    steps = count_of(prepared.steps, "step")
    return f"{prepared.solver} grid, shift {prepared.flow_shift:g}, {steps}{start}: {shares}"


def show_end(paths: Sequence[Path], seconds: float, device: torch.device, failed: int = 0) -> None:
    """Show the results, with time and memory. Several paths were logged as they were made."""
    size = as_size(sum(map(bytes_of, paths)))
    rows: list[Row] = [
        ("result", f"{paths[0]} ({size})" if len(paths) == 1 else None),
        ("results", f"{len(paths)} in {paths[0].parent} ({size})" if len(paths) > 1 else None),
        ("failed", str(failed) if failed else None),
        ("time", in_words(seconds)),
        ("peak memory", peak_in_words(device)),
    ]
    show_box("Generation is finished", rows)


def name_model(metadata: Mapping[str, str]) -> str:
    """Return a family's model in words."""
    names = [metadata.get("model_type"), metadata.get("task"), metadata.get("sd_model_name")]
    return ", ".join(name for name in names if name)


def bytes_of(path: Path) -> int:
    """Return the bytes of a file, or of the files in a folder."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


@dataclass
class Queue:
    """The requests of a run, one after the other, and the time that they take."""

    requests: Sequence[Prepared]
    now: Callable[[], float] = time.monotonic
    _begun: int = field(default=0, init=False)
    _start: float = field(default=0.0, init=False)

    def begin(self, label: str) -> None:
        """Log a line about the next request, if there are several: "3 of 40, about 2 h left"."""
        if self._begun == 0:
            self._start = self.now()
        done = sum(map(work_of, self.requests[: self._begun]))
        to_do = sum(map(work_of, self.requests[self._begun :]))
        prepared = self.requests[self._begun]
        self._begun += 1
        if len(self.requests) == 1:
            return
        left = f", about {in_words((self.now() - self._start) * to_do / done)} left" if done else ""
        where = f"{self._begun} of {len(self.requests)}{left}"
        logger.info("%s (%s): %s: %s", where, label, size_in_words(prepared), in_short(prepared.asked.prompt))


def work_of(prepared: Prepared) -> float:
    """Return the work of a request, in units of its own: clips of one size take equally long."""
    return prepared.num_steps * prepared.width * prepared.height * prepared.frames
