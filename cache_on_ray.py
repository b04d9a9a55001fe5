"""Cache a dataset on a Ray cluster: any caching command, its work shared by actors on all machines.

All options: python cache_on_ray.py --help
"""

from collections.abc import Sequence

import modules.interpreter  # noqa: F401
from dataset.ray_options import read_ray_options
from modules.command import as_typed, command_line
from modules.families import identify
from modules.installation import import_own


def main(argv: Sequence[str] | None = None) -> None:
    options = read_ray_options(__doc__, argv)
    script = import_own(options.script)

    from dataset.caching.on_ray import require_done, run_on_ray  # torch loads here, after options are read
    from modules.console import show_box

    rows = run_on_ray(script.main, options)
    done = [row for row in rows if not row["error"]]
    files = ", ".join(f"{sum(row[count] for row in done)} {count}" for count in ("written", "kept"))
    shards = f"{len(done)} of {len(rows)} are done"
    command = as_typed(["python", f"{options.script}.py", *options.command[1:]])
    following = [("Last, check everything and remove what is stale", command)]
    show_box("Caching on Ray is finished", [("cache files", files), ("shards", shards)], following)
    require_done(rows)


if __name__ == "__main__":
    command_line(main, explain=identify)
