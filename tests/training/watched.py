"""A family whose decoder is watched: what samples are made of, before it becomes pictures."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from protocols.data import MediaEncoders


class Watched:
    """A family that keeps what is given to its decoder."""

    def __init__(self, family: Any) -> None:
        self.family = family
        self.decoded: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)

    def decode(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        self.decoded.append(latents.clone())
        yield from self.family.decode(encoders, latents)
