"""Generate images with Stable Diffusion 1.x, 2.x and XL."""

from collections.abc import Sequence

import modules.interpreter  # noqa: F401
from modules.command import begin_loading, command_line
from modules.installation import hide_packages
from protocols.families import identify
from stable_diffusion.options import read_gen_img


def main(argv: Sequence[str] | None = None) -> None:
    """Generate images with Stable Diffusion from the command line."""
    options = read_gen_img(__doc__, argv)
    options.console.apply()
    begin_loading()
    # diffusers loads these if they are installed; nothing here uses them, and they double the time to start
    with hide_packages("accelerate", "bitsandbytes", "peft", "transformers"):
        from stable_diffusion.run import generate  # torch loads here, after every option has been read

    generate(options)


if __name__ == "__main__":
    command_line(main, explain=identify)
