"""Experts: networks of one model that share the noise levels among them. Most models have a single one."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Expert:
    """One network of a model, used from its lowest timestep up to where the next one begins."""

    name: str  # "high_noise": in options, file names and messages; "" if it is the only one
    lowest: float  # timestep, 0..1000, from which on it is used

    @property
    def words(self) -> str:
        """Return how messages call it: `high-noise transformer`."""
        return f"{self.name.replace('_', '-')} transformer".lstrip()


LOW_NOISE, HIGH_NOISE = "low_noise", "high_noise"  # names of the two that Wan2.2 has
ONE_EXPERT = (Expert("", 0.0),)

_WORDS = {"high": HIGH_NOISE, "low": LOW_NOISE}
# `high_noise`, `HighNoise`
_IN_FULL = re.compile(r"(?:^|_)(high|low)_?noise(?=_|$)")
# `HIGH` alone: at the end, or before a size, a dtype, a version and the like
_IN_SHORT = re.compile(
    r"(?:^|_)(high|low)(?=$|_(?:lora|model|fp\d+|bf16|rank\d*|r\d|v\d|e\d|ep\d|epoch|step\d|\d))"
)


def named_expert(name: str) -> str | None:
    """Return the expert that the name of a file (without its suffix) or of a folder says; None: neither."""
    plain = re.sub(r"[^a-z0-9]+", "_", name.lower())
    found = set(_IN_FULL.findall(plain))
    if not found and not _WORDS.keys() <= set(plain.split("_")):
        found = set(_IN_SHORT.findall(plain))
    return _WORDS[found.pop()] if len(found) == 1 else None


def expert_of_file(path: Path, folders: Mapping[str, str]) -> str | None:
    """Return the expert that the name of a file or folder says, or that of the folder it lies in; None: none.

    folders: names of folders that lie side by side in a model of several experts -> the expert of each; one
    of these alone says nothing.
    """
    for part in (path, path.absolute().parent):
        said = named_expert(part.name if part.is_dir() else part.stem)
        if said is not None:
            return said
        if part.name in folders and all(part.with_name(name).is_dir() for name in folders):
            return folders[part.name]
    return None


def expert_at(timestep: float, experts: Sequence[Expert]) -> int:
    """Return the index of the expert that a timestep belongs to: of those that begin at or below it the last.

    Levels below all of them belong to the lowest.
    """
    start = max(timestep, min(expert.lowest for expert in experts))
    begun = [(expert.lowest, index) for index, expert in enumerate(experts) if expert.lowest <= start]
    return max(begun)[1]


def noisiest(experts: Sequence[Expert]) -> int:
    """Return the index of the expert of the highest timesteps, with which a video from noise begins."""
    return max(range(len(experts)), key=lambda index: experts[index].lowest)
