"""Where a model comes from: for licence and card of models trained from it. Standard library only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelRelease:
    """A released model: its repositories on the hub and the licence of its weights."""

    repositories: tuple[str, ...]  # "owner/name"; several where they cannot be told apart
    licence: str
    licence_key: str  # the hub's identifier of it, "other" for those that have none
    licence_url: str
