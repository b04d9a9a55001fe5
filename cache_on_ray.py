"""The old name of tools/cache_on_ray.py."""

import modules.interpreter  # noqa: F401
from modules.command import command_line
from protocols.families import identify
from tools.cache_on_ray import main

if __name__ == "__main__":
    command_line(main, explain=identify)
