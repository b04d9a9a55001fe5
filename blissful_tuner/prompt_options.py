"""Options of what is done with prompts before they are encoded. Standard library only."""

import argparse

from modules.options import add_unsupported


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --prompt_wildcards and --prompt_weighting."""
    group = parser.add_argument_group("prompts")
    reason = "write the prompt out"
    add_unsupported(
        group, "--prompt_wildcards", type=str, default=None, reason=reason, help="folder of wildcard files"
    )
    add_unsupported(
        group, "--prompt_weighting", action="store_true", reason=reason, help="(word:1.2) in prompts"
    )
