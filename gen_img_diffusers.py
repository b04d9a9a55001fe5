"""Generate images with Stable Diffusion: an earlier name of gen_img.py, with the same options."""

import modules.interpreter  # noqa: F401
from gen_img import main
from modules.command import command_line
from protocols.families import identify

if __name__ == "__main__":
    command_line(main, explain=identify)
