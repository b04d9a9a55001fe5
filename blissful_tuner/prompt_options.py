"""Options of what is done with prompts before they are encoded. Standard library only."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from modules.errors import OptionError


@dataclass(frozen=True)
class PromptOptions:
    """How the texts of a video are read: what is drawn in them, and which parts of them have weights."""

    prompt_wildcards: Path | None  # folder of the files that `__name__` draws from
    prompt_alternatives: bool  # {a|b} draws
    prompt_weighting: bool  # (word:1.2) is a weight

    def __post_init__(self) -> None:
        folder = self.prompt_wildcards
        if folder is not None and not folder.is_dir():
            what = "it is not a folder" if folder.exists() else "there is no such folder"
            raise OptionError(
                f"--prompt_wildcards {folder}: {what}. Give the folder of the text files that __name__ in a "
                "prompt draws from"
            )

    @property
    def draws(self) -> bool:
        """Whether parts of prompts may be drawn."""
        return self.prompt_wildcards is not None or self.prompt_alternatives


PLAIN_PROMPTS = PromptOptions(prompt_wildcards=None, prompt_alternatives=False, prompt_weighting=False)


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `PromptOptions`."""
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompt_wildcards",
        type=str,
        default=None,
        help="folder of text files: __name__ in a prompt becomes a line of name.txt, drawn by the seed",
    )
    group.add_argument(
        "--prompt_alternatives",
        action="store_true",
        help="{red|blue} in a prompt becomes one of them, drawn by the seed; {3::red|blue} draws red 3 times "
        "as often",
    )
    group.add_argument(
        "--prompt_weighting",
        action="store_true",
        help="(word:1.4) in a prompt multiplies what the model is given for that part; (word) means 1.1, "
        "\\( a parenthesis",
    )
