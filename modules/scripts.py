"""A script of a family: a function to call with words, and a program to run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modules.command import command_line
from modules.families import identify


@dataclass(frozen=True)
class Script:
    """Hold a script's function. Made by `caching_script`, `training_script` and `generation_script`."""

    main: Callable[..., None]  # takes the words behind the script's name; None: those of the command line

    def __call__(self, *args: Any, **named: Any) -> None:
        """Run the script in this process."""
        self.main(*args, **named)

    def run(self) -> None:
        """Run the script as a program, with the options of the command line."""
        command_line(self.main, explain=identify)
