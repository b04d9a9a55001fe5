"""Options that all tools with a network have. Standard library only."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from modules.options import NO_PIXELS  # noqa: F401  (facts of further fields


@dataclass(frozen=True)
class ToolNetworkOptions:
    """Which network works, and how."""

    model: Path
    dtype: str
    seed: str | None
    compile: bool


def add_network_arguments(parser: argparse.ArgumentParser, model: str) -> None:
    """Declare the options of `ToolNetworkOptions`. model: what --model is, for the help."""
    group = parser.add_argument_group("network")
    group.add_argument("--model", type=str, required=True, help=model)
    group.add_argument(
        "--dtype",
        type=str,
        default="fp32",
        help="fp32 (float32), bf16 (bfloat16) or fp16 (float16): the halves take half the memory",
    )
    group.add_argument(
        "--seed",
        type=str,
        default=None,
        help="of what is drawn at random; most of these networks draw nothing",
    )
    group.add_argument(
        "--compile", action="store_true", help="compile the network with torch: slow to start, then faster"
    )
