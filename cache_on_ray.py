"""Cache a dataset on a Ray cluster: any caching command, its work shared by actors on all machines.

All options: python cache_on_ray.py --help
"""

from collections.abc import Sequence

import modules.interpreter  # noqa: F401
from dataset.options import read_ray_options
from modules.command import command_line
from modules.families import identify
from modules.installation import import_own


def main(argv: Sequence[str] | None = None) -> None:
    options = read_ray_options(__doc__, argv)
    script = import_own(options.script)

    from dataset.caching.on_ray import run_on_ray  # torch loads here, after options are read

    run_on_ray(script.main, options)


if __name__ == "__main__":
    command_line(main, explain=identify)
