"""Options of caching on a Ray cluster."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.options import MOST_AT_ONCE, MOST_SHARDS
from modules.command import did_you_mean
from modules.errors import OptionError
from modules.families import WITH_SCRIPTS
from modules.option_values import check_at_most
from modules.options import read_options
from modules.parser import Parser

LATENT_SCRIPTS = tuple(f"{entry.cache}_latents" for entry in WITH_SCRIPTS.values())
TEXT_SCRIPTS = tuple(f"{entry.cache}_text_encoder_outputs" for entry in WITH_SCRIPTS.values())


@dataclass(frozen=True)
class RayOptions:
    """Where to cache, in how many pieces, and which command."""

    address: str | None  # None: a cluster of this machine alone is started
    num_actors: int | None  # None: one for each GPU of the cluster, or one
    gpus_per_actor: float | None  # None: 1 if the cluster has a GPU
    cpus_per_actor: int
    num_shards: int | None  # None: as many as actors for texts, 8 times as many for latents
    temp_dir: Path | None
    command: tuple[str, ...]  # a caching script with its options

    def __post_init__(self) -> None:
        for name, value in (
            ("num_actors", self.num_actors),
            ("cpus_per_actor", self.cpus_per_actor),
            ("num_shards", self.num_shards),
        ):
            if value is not None and value < 1:
                raise OptionError(f"--{name} {value}: give at least 1")
        check_at_most("--num_actors", self.num_actors, MOST_AT_ONCE, "actors")
        check_at_most("--cpus_per_actor", self.cpus_per_actor, MOST_AT_ONCE, "CPU cores for one actor")
        check_at_most("--num_shards", self.num_shards, MOST_SHARDS, "shards of the work")
        if self.gpus_per_actor is not None and not 0 <= self.gpus_per_actor <= MOST_AT_ONCE:
            raise OptionError(f"--gpus_per_actor {self.gpus_per_actor}: give 0 (the CPU) or a number of GPUs")
        if self.address is not None and self.temp_dir is not None:
            raise OptionError("--temp_dir is for a cluster that is started here: leave it out with --address")
        if not self.command:
            raise OptionError(
                "which command is to run on the cluster? Add it behind the options, such as "
                "wan_cache_latents.py --dataset_config data.toml --vae VAE"
            )
        if self.script not in (*LATENT_SCRIPTS, *TEXT_SCRIPTS):
            raise OptionError(
                f"{self.command[0]} is none of the scripts that cache: "
                f"{', '.join((*LATENT_SCRIPTS, *TEXT_SCRIPTS))}."
                + did_you_mean(self.script, (*LATENT_SCRIPTS, *TEXT_SCRIPTS))
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
    group = parser.add_argument_group("cluster")
    group.add_argument(
        "--address",
        type=str,
        default=None,
        help="the Ray cluster to use: auto for the one that this machine belongs to, or ray://HOST:10001; "
        "default: start one of this machine alone",
    )
    group.add_argument(
        "--num_actors",
        type=int,
        default=None,
        help="processes that encode; default: one for each GPU of the cluster, or a single one",
    )
    group.add_argument(
        "--gpus_per_actor",
        type=float,
        default=None,
        help="GPUs that each of them gets; 0.5 puts two on one GPU; default: 1 if the cluster has any",
    )
    group.add_argument(
        "--cpus_per_actor",
        type=int,
        default=1,
        help="CPU cores that each of them gets, and threads that read ahead if --num_workers is not given",
    )
    group.add_argument(
        "--num_shards",
        type=int,
        default=None,
        metavar="N",
        help="pieces of the work, which actors take one after the other; more of them balance the load; "
        "default: 8 for each actor, or 1 for each if texts are cached",
    )
    group.add_argument(
        "--temp_dir",
        type=str,
        default=None,
        help="where a cluster of this machine alone keeps its sockets and logs; a short path; default: "
        "Ray's own",
    )
    group.add_argument(
        "command",
        nargs="*",
        metavar="SCRIPT ...",
        help="the caching command, without python: wan_cache_latents.py --dataset_config data.toml --vae VAE",
    )
    words = sys.argv[1:] if argv is None else list(argv)
    # what stands behind the script is the script's own
    place = next((index for index, word in enumerate(words) if _is_script(word)), len(words))
    args = parser.parse_args(words[:place])
    args.command = [*args.command, *words[place:]]
    return read_options(RayOptions, args)


def _is_script(word: str) -> bool:
    return not word.startswith("-") and (word.endswith(".py") or word in (*LATENT_SCRIPTS, *TEXT_SCRIPTS))
