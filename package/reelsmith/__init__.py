"""Teach open video models something new, and make videos with them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # commands need none of it
    from package.reelsmith.api import (
        CommandRun,
        Event,
        Finding,
        LineEvent,
        SampleEvent,
        SavedEvent,
        StepEvent,
        UserError,
        ValidationEvent,
        cache,
        command,
        diagnose,
        generate,
        merge,
        plan,
        resume,
        train,
    )

__all__ = [
    "CommandRun",
    "Event",
    "Finding",
    "LineEvent",
    "SampleEvent",
    "SavedEvent",
    "StepEvent",
    "UserError",
    "ValidationEvent",
    "cache",
    "command",
    "diagnose",
    "generate",
    "merge",
    "plan",
    "resume",
    "train",
]


def __getattr__(name: str) -> object:
    """Return a name of api.py, which is imported only when a program first uses one of its names."""
    if name not in __all__:
        raise AttributeError(f"module 'reelsmith' has no attribute {name!r}")
    from package.reelsmith import api  # commands, which import this first, need none of it

    return getattr(api, name)


def __dir__() -> list[str]:
    """Return the names of the API, which are what a user looks for."""
    return __all__
