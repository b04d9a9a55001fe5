"""Generate images with Stable Diffusion XL: gen_img.py with --sdxl, under an earlier name."""

import sys
from collections.abc import Sequence

import modules.interpreter  # noqa: F401
from gen_img import main as generate
from modules.command import command_line
from protocols.families import identify


def main(argv: Sequence[str] | None = None) -> None:
    """Generate images with Stable Diffusion XL from the command line."""
    generate([*(sys.argv[1:] if argv is None else argv), "--sdxl"])


if __name__ == "__main__":
    command_line(main, explain=identify)
