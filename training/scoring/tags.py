"""How many of a prompt's tags a tagger sees in a sample."""
# Letters: F frames, T tags

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from training.scoring.model import EmbedsImages

MIN_PROBABILITY = 0.35  # a tag counts as seen from this probability up; the default of tools/tag.py


class RecognizesTags(EmbedsImages, Protocol):
    """A tagging model, whose vector for an image contains the probability of each tag."""

    @property
    def names(self) -> Sequence[str]:
        """The tags, in the order of the probabilities."""


def number_tags(names: Sequence[str]) -> dict[str, int]:
    """Map each tag, spelled as in prompts, to its index."""
    return {_spell(name): index for index, name in enumerate(names)}


def find_tags(prompt: str, indices: Mapping[str, int]) -> list[int]:
    """Return the indices of a prompt's comma-separated tags that the tagger knows."""
    parts = dict.fromkeys(_spell(part) for part in prompt.split(","))
    return [indices[part] for part in parts if part in indices]


def tag_recall(tags: Sequence[int], probabilities: Tensor) -> float | None:
    """Return the fraction of expected tags detected in a sample; None without tags.

    A tag counts as detected if its probability reaches MIN_PROBABILITY in any frame.

    Args:
        tags: Indices of the expected tags.
        probabilities: Probabilities of all tags in each frame, F T.
    """
    if not tags:
        return None
    seen = probabilities.amax(dim=0)[list(tags)] >= MIN_PROBABILITY
    return float(seen.float().mean())


def _spell(tag: str) -> str:
    """Return a tag as prompts spell it: lowercase, blanks for underscores, no backslashes."""
    return " ".join(tag.replace("_", " ").replace("\\", "").lower().split())
