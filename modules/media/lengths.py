"""Frame counts that the clips of a model may have. Standard library only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ClipLengths:
    """Allowed frame counts of a model: step * n + first for n = 0, 1, 2, ..., and 1 for an image."""

    step: int
    first: int = 1

    def __str__(self) -> str:
        return f"{self.step}n + {self.first}"

    @property
    def shortest(self) -> int:
        """Length of the shortest clip with more than one frame."""
        return self.first if self.first > 1 else self.first + self.step

    def fit(self, frames: int) -> int:
        """Return the largest allowed length that is at most `frames`; `frames` must be at least 1."""
        if 0 < frames < self.first:
            return 1
        return (frames - self.first) // self.step * self.step + self.first

    def includes(self, frames: int) -> bool:
        """Return whether a clip may have this number of frames."""
        return frames == self.fit(frames)


DEFAULT_LENGTHS = ClipLengths(4)  # of most models
