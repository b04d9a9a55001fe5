"""Options of all caching scripts."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from modules.errors import OptionError
from modules.option_values import check_at_most
from modules.options import Options, read_options
from modules.parser import Parser, add_options, refuse_unsupported

T = TypeVar("T")
R = TypeVar("R", bound=Options)

GUESS = "guess"  # of --repair_captions without a value
MOST_AT_ONCE = 1024  # items or threads
MOST_CHARACTERS = 1000
MOST_SHARDS = 1_000_000
COLOURS = ("black", "red", "green", "yellow", "blue", "magenta", "cyan", "white")  # in the terminal's order


@dataclass(frozen=True)
class CheckPageOptions:
    """The page of --check."""

    html: Path | None
    html_items: int

    def __post_init__(self) -> None:
        if self.html_items < 1:
            raise OptionError(f"--html_items {self.html_items}: give at least 1")
        if self.html is not None and self.html.suffix.lower() not in {".html", ".htm"}:
            raise OptionError(f"--html {self.html}: name a file that ends in .html")
        if self.html is not None and self.html.is_dir():
            raise OptionError(f"--html {self.html}: there is a folder of that name; name a file")

    def require_check(self, check: bool) -> None:
        """Raise OptionError if the page is asked for without --check."""
        if self.html is not None and not check:
            raise OptionError("--html writes what --check finds: add --check")


@dataclass(frozen=True)
class ShardOptions:
    """Which share of the work this run does, if several machines cache one dataset."""

    num_shards: int | None  # None: this run does everything, and cleans up
    shard_index: int | None

    def __post_init__(self) -> None:
        if self.num_shards is None and self.shard_index is None:
            return
        if self.num_shards is None:
            raise OptionError(
                f"--shard_index {self.shard_index} needs --num_shards, how many shards there are"
            )
        if self.shard_index is None:
            raise OptionError(
                f"--num_shards {self.num_shards} needs --shard_index, which of them this is: 0 to "
                f"{max(0, self.num_shards - 1)}"
            )
        if self.num_shards < 1:
            raise OptionError(f"--num_shards {self.num_shards}: give at least 1")
        check_at_most("--num_shards", self.num_shards, MOST_SHARDS, "shards of the work")
        if not 0 <= self.shard_index < self.num_shards:
            raise OptionError(
                f"--shard_index {self.shard_index}: shards are counted from 0, so with --num_shards "
                f"{self.num_shards} give 0 to {self.num_shards - 1}"
            )

    @property
    def is_given(self) -> bool:
        """Return whether this run does a share only, and so removes nothing."""
        return self.num_shards is not None

    def of(self, work: Sequence[T]) -> Sequence[T]:
        """Return this shard's pieces, every `num_shards`-th, of a list that all machines have."""
        if self.num_shards is None or self.shard_index is None:
            return work
        return work[self.shard_index :: self.num_shards]

    def refuse_beside(self, option: str) -> None:
        """Raise OptionError if a shard is given to what looks at the whole dataset."""
        if self.is_given:
            raise OptionError(
                f"{option} looks at the whole dataset: leave out --num_shards and --shard_index, which share "
                "the work of caching"
            )


@dataclass(frozen=True)
class CachingOptions:
    """What to cache, on which device, and which files to keep."""

    dataset_config: Path
    device: str | None  # None: CUDA or MPS if there is one, else the CPU
    batch_size: int | None  # None: that of each dataset table
    num_workers: int | None  # None: the machine's cores minus one
    skip_existing: bool
    keep_cache: bool
    verify: bool
    disable_cudnn_backend: bool
    check: bool
    repair_captions: str | None  # an encoding, or GUESS
    page: CheckPageOptions
    shard: ShardOptions

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise OptionError(f"--batch_size {self.batch_size}: give at least 1")
        if self.num_workers is not None and self.num_workers < 1:
            raise OptionError(f"--num_workers {self.num_workers}: give at least 1")
        check_at_most("--batch_size", self.batch_size, MOST_AT_ONCE, "items to encode at once")
        check_at_most("--num_workers", self.num_workers, MOST_AT_ONCE, "threads that read ahead")
        self.page.require_check(self.check)
        if self.check:
            self.shard.refuse_beside("--check")
        if self.repair_captions is None:
            return
        if not self.check:
            raise OptionError("--repair_captions is a part of --check: add --check")
        if self.repair_captions != GUESS and not _is_encoding(self.repair_captions):
            raise OptionError(
                f"--repair_captions {self.repair_captions}: no such encoding. Use for example cp1252, "
                "shift_jis or gbk, or leave it out to guess."
            )


def _is_encoding(name: str) -> bool:
    try:
        return isinstance(b"a".decode(name), str)
    except LookupError:
        return False
    except ValueError:  # of two bytes a character
        return True


@dataclass(frozen=True)
class DebugOptions:
    """How to show what the model will see, instead of caching it."""

    debug_mode: str | None  # image, console or video
    console_width: int  # characters
    console_back: str | None  # one of COLOURS
    console_num_images: int | None  # None: all

    def __post_init__(self) -> None:
        if self.console_width < 8:
            raise OptionError(f"--console_width {self.console_width}: give at least 8 characters")
        check_at_most("--console_width", self.console_width, MOST_CHARACTERS, "characters; 80 is usual")
        if self.console_back is not None and self.console_back.lower() not in COLOURS:
            raise OptionError(f"--console_back {self.console_back}: use one of {', '.join(COLOURS)}")
        if self.console_num_images is not None and self.console_num_images < 1:
            raise OptionError(f"--console_num_images {self.console_num_images}: give at least 1")


def read_latent_caching(
    description: str | None, record: type[R], argv: Sequence[str] | None
) -> tuple[CachingOptions, DebugOptions, R]:
    """Read the options of a script that caches latents. record: the family's own."""
    parser = Parser(description=description)
    add_caching_arguments(parser)
    add_options(parser, record)
    add_debug_arguments(parser)
    args = _parse(parser, argv)
    caching, debug = read_options(CachingOptions, args), read_options(DebugOptions, args)
    if debug.debug_mode is not None:
        caching.shard.refuse_beside("--debug_mode")
    return caching, debug, read_options(record, args)


def read_text_caching(
    description: str | None, record: type[R], argv: Sequence[str] | None
) -> tuple[CachingOptions, R]:
    """Read the options of a script that caches texts. record: the family's own."""
    parser = Parser(description=description)
    add_caching_arguments(parser)
    add_options(parser, record)
    args = _parse(parser, argv)
    return read_options(CachingOptions, args), read_options(record, args)


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    args = parser.parse_args(argv)
    refuse_unsupported(parser, args)
    return args


def add_caching_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of both caching scripts."""
    group = parser.add_argument_group("caching")
    group.add_argument(
        "--dataset_config", type=str, required=True, help="dataset configuration, .toml or .json"
    )
    group.add_argument(
        "--device", type=str, default=None, help="cuda, cuda:1, mps or cpu; default: the best one available"
    )
    group.add_argument(
        "--batch_size",
        type=int,
        default=None,
        help="items to encode at once; default: batch_size of each dataset",
    )
    group.add_argument(
        "--num_workers",
        type=int,
        default=None,
        help="threads that read ahead of the encoder; default: all cores but one",
    )
    group.add_argument(
        "--skip_existing",
        action="store_true",
        help="also keep files made by other programs if their size is right",
    )
    group.add_argument(
        "--keep_cache", action="store_true", help="do not remove cache files that no longer belong to an item"
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="read every cache file again; without it, files that have not changed since they were last read "
        "are not opened if a folder has thousands of them",
    )
    _add_share_arguments(group)
    group.add_argument(
        "--disable_cudnn_backend",
        action="store_true",
        help="compute without cuDNN, whose convolutions are slow or fail on some GPUs, mostly of AMD",
    )
    group.add_argument(
        "--check",
        action="store_true",
        help="print what would be cached and what is wrong with the dataset, then exit (0 or 1)",
    )
    group.add_argument(
        "--repair_captions",
        nargs="?",
        const=GUESS,
        default=None,
        metavar="ENCODING",
        help="with --check: rewrite captions that are not UTF-8 as UTF-8 and keep the old files as .bak; "
        "without ENCODING only if the guess is sure",
    )
    add_page_arguments(group)


def _add_share_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--num_shards",
        type=int,
        default=None,
        metavar="N",
        help="share the work with other machines: each runs the same command with its own --shard_index, in "
        "any order and number at a time, into one cache folder. When all are done, run the command once "
        "without these two: it checks everything, makes what is missing and removes what is stale",
    )
    group.add_argument(
        "--shard_index",
        type=int,
        default=None,
        metavar="I",
        help="which share this run does, from 0 to N - 1: every N-th source (or batch of captions) from the "
        "I-th on; several processes of accelerate launch divide it among themselves",
    )


def add_page_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the options of the page that --check writes."""
    group.add_argument(
        "--html",
        type=str,
        default=None,
        metavar="FILE",
        help="with --check: also write an HTML page that shows every item: frames with the crop, caption "
        "with its tokens, sizes, what is left out and why",
    )
    group.add_argument(
        "--html_items",
        type=int,
        default=500,
        help="most files that the page shows: those with faults first, then an even choice; default: 500",
    )


def add_debug_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of latent caching scripts that show the frames instead of encoding them."""
    group = parser.add_argument_group("looking at the dataset")
    group.add_argument(
        "--debug_mode",
        type=str,
        default=None,
        choices=["image", "console", "video"],
        help="show what the model will see and cache nothing: in a window (or PNG files), as coloured text, "
        "or as mp4 files",
    )
    group.add_argument("--console_width", type=int, default=80, help="console: width in characters")
    group.add_argument(
        "--console_back", type=str, default=None, help=f"console: background ({', '.join(COLOURS)})"
    )
    group.add_argument(
        "--console_num_images",
        type=int,
        default=None,
        help="console: at most this many items of each dataset",
    )
