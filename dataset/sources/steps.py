"""Sizes, lengths and latents that a model takes, as far as sources are concerned."""

from typing import Protocol


class Steps(Protocol):
    """A `LatentSpec` is one."""

    @property
    def channels(self) -> int: ...

    @property
    def stride(self) -> tuple[int, int, int]:
        """Return how many frames, rows and columns of pixels are one of the latents."""
        ...

    @property
    def pixel_step(self) -> int: ...

    @property
    def frame_step(self) -> int: ...
