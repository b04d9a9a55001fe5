"""Options of prompts that a chat model writes anew. Standard library only."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from modules.errors import OptionError
from modules.options import NO_PIXELS

MODES = ("normal", "master")


@dataclass(frozen=True)
class PromptRewriteOptions:
    """How prompts are rewritten before they are encoded."""

    # outputs record the text that came of these
    prompt_rewrite: str | None = field(metadata=NO_PIXELS)  # normal, master
    prompt_rewrite_model: Path | None = field(metadata=NO_PIXELS)

    def __post_init__(self) -> None:
        model = self.prompt_rewrite_model
        if self.prompt_rewrite is None:
            if model is not None:
                raise OptionError(f"--prompt_rewrite_model {model} needs --prompt_rewrite: normal or master")
            return
        if model is None:
            raise OptionError(
                f"--prompt_rewrite {self.prompt_rewrite} needs --prompt_rewrite_model: the folder of a chat "
                "model"
            )
        if not (model / "config.json").is_file():
            raise OptionError(
                f"--prompt_rewrite_model {model}: no folder with a config.json. Give the folder of a chat "
                "model in the layout of transformers"
            )


def add_prompt_rewrite_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --prompt_rewrite and --prompt_rewrite_model."""
    group = parser.add_argument_group("prompts that a chat model rewrites")
    group.add_argument(
        "--prompt_rewrite",
        type=str,
        default=None,
        choices=MODES,
        help="have a chat model describe what the prompt asks for, in English: normal keeps every detail, "
        "master adds composition, light and camera",
    )
    group.add_argument(
        "--prompt_rewrite_model",
        type=str,
        default=None,
        help="folder of the chat model; needs the package transformers",
    )
