"""Generate pictures with Stable Diffusion 1.x, 2.x and XL. All options: python gen_img.py --help"""

import logging
from collections.abc import Sequence

import modules.interpreter  # noqa: F401
from families import identify
from modules.command import command_line
from stable_diffusion.options import read_gen_img


def main(argv: Sequence[str] | None = None) -> None:
    options = read_gen_img(__doc__, argv)
    options.console.apply()
    # diffusers imports it if it is installed; it speaks of kernels for CPUs, which nothing here uses
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    from stable_diffusion.run import generate  # torch loads here, after every option has been read

    generate(options)


if __name__ == "__main__":
    command_line(main, explain=identify)
