"""Repaint a part of an image with Stable Diffusion 1.x, 2.x or XL by the command line of sd-scripts.

What the mask leaves black stays exactly as the VAE decodes it. gen_img.py has more.
"""

from collections.abc import Sequence

import modules.interpreter  # noqa: F401
from modules.command import begin_loading, command_line, name_as_typed
from modules.installation import hide_packages
from protocols.families import identify
from stable_diffusion.minimal_options import TYPED, read_minimal


def main(argv: Sequence[str] | None = None) -> None:
    """Repaint the image that the options name."""
    options = read_minimal(__doc__, argv)
    begin_loading()
    with name_as_typed(TYPED):
        # as in gen_img.py
        with hide_packages("accelerate", "bitsandbytes", "peft", "transformers"):
            from stable_diffusion.minimal_inpainting import repaint

        repaint(options)


if __name__ == "__main__":
    command_line(main, explain=identify)
