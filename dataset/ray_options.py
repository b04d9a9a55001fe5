"""Options of caching on a Ray cluster."""

import sys
from collections.abc import Sequence
from pathlib import Path

from dataset.options import MOST_AT_ONCE, MOST_SHARDS
from modules.command import did_you_mean
from modules.errors import OptionError
from modules.families import WITH_SCRIPTS
from modules.options import Options, option, read_options
from modules.parser import Parser, add_options

LATENT_SCRIPTS = tuple(f"{entry.cache}_latents" for entry in WITH_SCRIPTS.values())
SCRIPTS = (*LATENT_SCRIPTS, *(f"{entry.cache}_text_encoder_outputs" for entry in WITH_SCRIPTS.values()))


class RayOptions(Options, title="cluster"):
    """Where to cache, in how many pieces, and which command."""

    address: str | None = option(
        "the Ray cluster to use: auto for the one that this machine belongs to, or ray://HOST:10001; "
        "default: start one of this machine alone",
        excludes="temp_dir",
        hint="--temp_dir is for a cluster that is started here",
    )
    num_actors: int | None = option(
        "processes that encode; default: one for each GPU of the cluster, or a single one",
        least=1,
        most=MOST_AT_ONCE,
    )
    gpus_per_actor: float | None = option(
        "GPUs that each of them gets; 0.5 puts two on one GPU; default: 1 if the cluster has any",
        least=0,
        most=MOST_AT_ONCE,
        hint="0 for the CPU",
    )
    cpus_per_actor: int = option(
        "CPU cores that each of them gets, and threads that read ahead if --num_workers is not given",
        default=1,
        least=1,
        most=MOST_AT_ONCE,
    )
    num_shards: int | None = option(
        "pieces of the work, which actors take one after the other; more of them balance the load; "
        "default: 8 for each actor, or 1 for each if texts are cached",
        least=1,
        most=MOST_SHARDS,
    )
    temp_dir: Path | None = option(
        "where a cluster of this machine alone keeps its sockets and logs; a short path; default: Ray's own"
    )
    command: tuple[str, ...] = option(
        "the caching command, without python: wan_cache_latents.py --dataset_config data.toml --vae VAE",
        positional=True,
        metavar="SCRIPT ...",
    )

    def __post_init__(self) -> None:
        if not self.command:
            raise OptionError(
                "which command is to run on the cluster? Add it behind the options, such as "
                "wan_cache_latents.py --dataset_config data.toml --vae VAE"
            )
        if self.script not in SCRIPTS:
            raise OptionError(
                f"{self.command[0]} is none of the scripts that cache: {', '.join(SCRIPTS)}."
                + did_you_mean(self.script, SCRIPTS)
            )

    @property
    def script(self) -> str:
        """Return the name of the script's module."""
        return Path(self.command[0]).name.removesuffix(".py")

    @property
    def is_latents(self) -> bool:
        """Return whether the script caches latents, not texts."""
        return self.script in LATENT_SCRIPTS


def read_ray_options(description: str | None, argv: Sequence[str] | None) -> RayOptions:
    """Read the options of the script that caches on Ray."""
    parser = Parser(description=description)
    add_options(parser, RayOptions)
    words = sys.argv[1:] if argv is None else list(argv)
    # what stands behind the script is the script's own
    places = (
        index
        for index, word in enumerate(words)
        if not word.startswith("-") and (word.endswith(".py") or word in SCRIPTS)
    )
    place = next(places, len(words))
    args = parser.parse_args(words[:place])
    args.command = [*args.command, *words[place:]]
    return read_options(RayOptions, args)
