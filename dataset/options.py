"""Options of all caching scripts."""

import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from modules.command import did_you_mean
from modules.errors import OptionError
from modules.options import CONNECTS, WRITES, KeyFile, Options, option, read_options
from modules.parser import Parser, add_options
from modules.script_options import parse_options
from protocols.families import FAMILIES

R = TypeVar("R", bound=Options)

GUESS = "guess"  # value of --repair_captions without an encoding
MAX_AT_ONCE = 1024  # maximum number of items or threads
MAX_SHARDS = 1_000_000
COLORS = ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white")  # in the terminal's order


def _dataset_keys() -> Collection[str]:
    """Return the names of all dataset file keys."""
    from dataset.config import KNOWN_KEYS  # only error messages need them

    return KNOWN_KEYS


DATASET_FILE = KeyFile(
    _dataset_keys, "It is a key of the dataset file: write {key} = ... in its table there."
)


class CheckPageOptions(Options):
    """Options for the HTML page of dataset items that --check can write."""

    html: Path | None = option(
        "with --check: also write an HTML page of all items: frames with the crop, caption "
        "with its tokens, sizes, what is left out and why",
        place="new file",
        often=True,
    )
    html_items: int = option(
        "maximum number of files on the page: those with problems first, then an even selection",
        default=500,
        minimum=1,
        ignored_without="html",
    )

    def __post_init__(self) -> None:
        if self.html is not None and self.html.suffix.lower() not in {".html", ".htm"}:
            raise OptionError(f"--html {self.html}: name a file that ends in .html")

    def require_check(self, check: bool) -> None:
        """Raise OptionError if --html is set without --check: the page shows the results of the check."""
        if not check:
            raise OptionError("--html writes what --check finds: add --check")


class ShardOptions(Options):
    """Options for the part of the dataset that this run caches, if several machines share the work."""

    num_shards: int | None = option(
        "share the work with other machines: each runs the same command with its own --shard_index, in "
        "any order and number at a time, into one cache folder. When all are done, run the command "
        "once without these two options: it checks everything, creates missing files and removes stale "
        "ones",
        minimum=1,
        maximum=MAX_SHARDS,
        needs="shard_index",
    )
    shard_index: int | None = option(
        "which part this run processes, from 0 to N - 1: every N-th source (or batch of captions) from "
        "this one on; several processes of accelerate launch divide it among themselves",
        minimum=0,
        needs="num_shards",
        hint="from 0",
    )

    def __post_init__(self) -> None:
        shards, index = self.num_shards, self.shard_index
        if shards is not None and index is not None and index >= shards:
            raise OptionError(
                f"--shard_index {index}: shards are counted from 0, so with --num_shards {shards} pass 0 to "
                f"{shards - 1}"
            )

    def reject_beside(self, option: str) -> None:
        """Raise OptionError if --num_shards is set, because `option` needs the whole dataset."""
        if self.num_shards is not None:
            raise OptionError(
                f"{option} looks at the whole dataset: omit --num_shards and --shard_index, which share "
                "the work of caching"
            )


class CachingOptions(Options, title="caching"):
    """Options for caching: what to encode, on which device, and which existing files to keep."""

    key_files = (DATASET_FILE,)

    dataset_config: Path = option("dataset configuration, .toml or .json", required=True, by_place=True)
    device: str | None = option("cuda, cuda:1, mps or cpu; default: the best one available", often=True)
    batch_size: int | None = option(
        "items to encode at once; default: batch_size of each dataset",
        minimum=1,
        maximum=MAX_AT_ONCE,
        often=True,
    )
    num_workers: int | None = option(
        "threads that read ahead of the encoder; default: all cores but one", minimum=1, maximum=MAX_AT_ONCE
    )
    skip_existing: bool = option("also keep files made by other programs if their size is right", often=True)
    keep_cache: bool = option("do not remove cache files that no longer belong to an item", often=True)
    download_directory: Path | None = option(
        "folder for downloads; default: in the cache folders",
        place="new folder",
    )
    verify: bool = option(
        "read every cache file completely; without it, only the headers are read if there are "
        "thousands of them"
    )
    shard: ShardOptions
    disable_cudnn_backend: bool = option(
        "compute without cuDNN, whose convolutions are slow or fail on some GPUs, mostly from AMD"
    )
    check: bool = option(
        "print what would be cached and what is wrong with the dataset, then exit (0 or 1)", often=True
    )
    repair_captions: str | None = option(
        "with --check: rewrite captions that are not UTF-8 as UTF-8 and keep the old files as .bak; "
        "without ENCODING, only if the encoding is certain",
        nargs="?",
        const=GUESS,
        metavar="ENCODING",
        needs="check",
    )
    page: CheckPageOptions
    typed_names: Mapping[str, str] = option(default={})  # no option: see `name_as_typed`

    def __post_init__(self) -> None:
        if self.page.html is not None:
            self.page.require_check(self.check)
        if self.check:
            self.shard.reject_beside("--check")
        encoding = self.repair_captions
        if encoding is not None and encoding != GUESS and not _is_text_encoding(encoding):
            raise OptionError(
                f"--repair_captions {encoding}: no such encoding. Use for example cp1252, shift_jis or gbk, "
                "or omit it to guess."
            )


def _is_text_encoding(name: str) -> bool:
    """Return whether Python has a text encoding of this name."""
    try:
        return isinstance(b"a".decode(name), str)
    except LookupError:
        return False
    except ValueError:  # an encoding with two bytes for each character
        return True


class EmptyPromptOptions(Options, title="caching"):
    """Whether to cache the empty prompt even if no table drops captions."""

    empty_prompt: bool = option(
        "also cache the empty prompt, as trainings with --guided_target or --blank_prior_weight need it"
    )


class CachingInRunOptions(Options, title="caches made by this command"):
    """Which caches training makes itself. Without these options, it reads the caching commands' caches."""

    cache_latents: bool = option("encode all images once and keep their latents", often=True)
    cache_latents_to_disk: bool = option("the same, in files next to the images")
    vae_batch_size: int = option("number of images to encode at once", default=1, minimum=1)
    skip_cache_check: bool = option("use cache files that exist without looking into them")
    cache_text_encoder_outputs: bool = option(
        "encode all captions once, and free the text encoders; not with captions that vary", often=True
    )
    cache_text_encoder_outputs_to_disk: bool = option("the same, in files")
    text_encoder_batch_size: int | None = option(
        "captions to encode at once; default: --train_batch_size",
        minimum=1,
        ignored_without=("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"),
    )

    @property
    def caches_latents(self) -> bool:
        """Whether the run caches latents, in memory or on disk."""
        return self.cache_latents or self.cache_latents_to_disk

    @property
    def caches_texts(self) -> bool:
        """Whether the run caches text encoder outputs, in memory or on disk."""
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk


class ConvertCacheOptions(Options):
    """Options of `tools/convert_cache.py`: the cache folders to convert, and their new format."""

    key_files = (DATASET_FILE,)

    dataset_config: Path | None = option(
        "TOML or JSON file: convert the cache folders of its tables", excludes="cache_directory"
    )
    cache_directory: tuple[Path, ...] | None = option(
        "convert these folders, without a dataset file",
        nargs="+",
        place="folder",
        hint="that of existing caches",
    )
    to: str = option(
        "files: a file for each entry, as other programs read them; shards: few large SQLite files, for "
        'cache_format = "shards"',
        required=True,
        choices=("files", "shards"),
    )
    keep: bool = option("also keep the old form of what was converted")
    dry_run: bool = option("only count what would be converted")

    def __post_init__(self) -> None:
        if self.dataset_config is None and self.cache_directory is None:
            raise OptionError(
                "pass either --dataset_config, for the cache folders of all its tables, or --cache_directory"
            )


class DebugOptions(Options, title="looking at the dataset"):
    """Options that show what the model would be given, instead of caching it."""

    debug_mode: str | None = option(
        "show what the model will see and cache nothing: in a window (or PNG files), as colored text, "
        "or as mp4 files",
        choices=("image", "console", "video"),
        often=True,
    )
    console_width: int = option(
        "console: width in characters", default=80, minimum=8, maximum=1000, ignored_without="debug_mode"
    )
    console_back: str | None = option(
        f"console: background ({', '.join(COLORS)})", ignored_without="debug_mode"
    )
    console_num_images: int | None = option(
        "console: at most this many items of each dataset", minimum=1, ignored_without="debug_mode"
    )

    def __post_init__(self) -> None:
        if self.console_back is not None and self.console_back.lower() not in COLORS:
            raise OptionError(f"--console_back {self.console_back}: use one of {', '.join(COLORS)}")


def read_latent_caching(
    description: str | None, record: type[R], argv: Sequence[str] | None
) -> tuple[CachingOptions, DebugOptions, R]:
    """Parse the options of a script that caches latents.

    `record` is the class of the family's options.
    """
    caching, family_options, debug = parse_options(description, argv, CachingOptions, record, DebugOptions)
    return caching, debug, family_options


def caching_scripts() -> tuple[str, ...]:
    """Return the names of all families' caching scripts: those for latents, then those for texts."""
    scripts = []
    for ending in ("latents", "text_encoder_outputs"):
        scripts += [f"{entry.cache}_{ending}" for entry in FAMILIES.values() if entry.script]
    return tuple(scripts)


class RayOptions(Options, title="cluster"):
    """Options for caching on a Ray cluster: its address, the number of shards, and the caching command."""

    address: str | None = option(
        "the Ray cluster to use: auto for the one that this machine belongs to, or ray://HOST:10001; "
        "default: start one of this machine alone",
        excludes="temp_dir",
        hint="--temp_dir is for a cluster that is started here",
        facts=CONNECTS,
    )
    num_actors: int | None = option(
        "processes that encode; default: one for each GPU of the cluster, or a single one",
        minimum=1,
        maximum=MAX_AT_ONCE,
    )
    gpus_per_actor: float | None = option(
        "GPUs that each of them gets; 0.5 puts two on one GPU; default: 1 if the cluster has any",
        minimum=0,
        maximum=MAX_AT_ONCE,
        hint="0 for the CPU",
    )
    cpus_per_actor: int = option(
        "CPU cores that each of them gets, and threads that read ahead if --num_workers is not given",
        default=1,
        minimum=1,
        maximum=MAX_AT_ONCE,
    )
    num_shards: int | None = option(
        "pieces of the work, which actors take one after the other; more of them balance the load; "
        "default: 8 for each actor, or 1 for each if texts are cached",
        minimum=1,
        maximum=MAX_SHARDS,
    )
    temp_dir: Path | None = option(
        "where a cluster of this machine alone keeps its sockets and logs; a short path; default: Ray's own",
        facts=WRITES,
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
        scripts = caching_scripts()
        if self.script not in scripts:
            raise OptionError(
                f"{self.command[0]} is none of the scripts that cache: {', '.join(scripts)}."
                + did_you_mean(self.script, scripts)
            )

    @property
    def script(self) -> str:
        """File name of the command's script without `.py`."""
        return Path(self.command[0]).name.removesuffix(".py")

    @property
    def is_latents(self) -> bool:
        """Whether the command caches latents; False for text embeddings."""
        return self.script.endswith("_latents")


def read_ray_options(description: str | None, argv: Sequence[str] | None) -> RayOptions:
    """Parse the options of the Ray script, which are followed by a caching command."""
    parser = Parser(description=description)
    add_options(parser, RayOptions)
    words = sys.argv[1:] if argv is None else list(argv)
    # options behind the name of the caching script belong to that script
    script_index = len(words)
    for index, word in enumerate(words):
        if not word.startswith("-") and (word.endswith(".py") or word in caching_scripts()):
            script_index = index
            break
    args = parser.parse_args(words[:script_index])
    args.command = [*args.command, *words[script_index:]]
    return read_options(RayOptions, args)
