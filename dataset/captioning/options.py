"""Options of tools/caption_dataset.py."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from dataset.config_keys import MOST_WORDS
from modules.errors import OptionError
from modules.option_values import check_at_least, check_at_most, check_seed
from modules.text_files import bad_character

MOST_FRAMES = 1024
MOST_TOKENS = 32_768
Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class CaptionModelOptions:
    """A vision-language model that runs here."""

    model: str | None  # a folder, or the name of a repository of a hub
    batch_size: int | None  # None: 1
    dtype: str | None  # None: that of the file, on a CPU float32
    device: str | None  # None: CUDA or MPS if there is one, else the CPU

    def __post_init__(self) -> None:
        check_at_least("--batch_size", self.batch_size, 1, "images or clips that are described together")
        check_at_most("--batch_size", self.batch_size, 1024, "images or clips that are described together")

    @property
    def given(self) -> list[str]:
        """Return the options that are given and mean nothing without --model."""
        return [f"--{name}" for name in ("batch_size", "dtype", "device") if getattr(self, name) is not None]


@dataclass(frozen=True)
class ApiOptions:
    """A server with an OpenAI-compatible interface."""

    api_base: str | None
    api_model: str | None
    api_workers: int | None  # None: 4
    api_timeout: float | None  # seconds; None: 120

    def __post_init__(self) -> None:
        check_at_least("--api_workers", self.api_workers, 1, "requests that wait for an answer together")
        check_at_most("--api_workers", self.api_workers, 256, "requests that wait for an answer together")
        check_at_least("--api_timeout", self.api_timeout, 1, "seconds until a request is made again")
        if self.api_base is None:
            return
        try:
            parts = urlsplit(self.api_base)
            is_address = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_address, parts = False, urlsplit("")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise OptionError(
                "--api_base holds a user's name, a password, or what follows ? or #. Give the address alone, "
                "such as http://localhost:8000/v1, and a key in the environment variable OPENAI_API_KEY"
            )
        if not is_address:
            raise OptionError(f"--api_base {self.api_base}: give an address such as http://localhost:8000/v1")

    @property
    def given(self) -> list[str]:
        """Return the options that are given and mean nothing without --api_base."""
        names = ("api_model", "api_workers", "api_timeout")
        return [f"--{name}" for name in names if getattr(self, name) is not None]


@dataclass(frozen=True)
class AskOptions:
    """What is shown and asked, and how the answer is chosen."""

    prompt: str | None  # None: for images and clips a usual one
    system_prompt: str | None
    num_frames: int  # of a clip
    max_pixels: int  # of a frame
    max_new_tokens: int
    temperature: float  # 0: always the most probable word
    seed: int

    def __post_init__(self) -> None:
        if self.prompt is not None and not self.prompt.strip():
            raise OptionError("--prompt is empty: say what to describe, or leave it out for the usual one")
        check_at_least("--num_frames", self.num_frames, 1, "frames of a clip that the model sees")
        check_at_most("--num_frames", self.num_frames, MOST_FRAMES, "frames of a clip that the model sees")
        check_at_least("--max_pixels", self.max_pixels, 1024, "pixels of a frame, such as 262144")
        check_at_least("--max_new_tokens", self.max_new_tokens, 1, "tokens of a caption")
        check_at_most("--max_new_tokens", self.max_new_tokens, MOST_TOKENS, "tokens of a caption")
        check_at_least("--temperature", self.temperature, 0, "0 takes the most probable word every time")
        check_at_most("--temperature", self.temperature, 10, "1 draws words as the model learned them")
        check_seed("--seed", self.seed)


@dataclass(frozen=True)
class WordingOptions:
    """What is put into captions and replaced in them."""

    trigger_word: str
    caption_prefix: str
    caption_suffix: str
    replace: Pairs
    replace_regex: Pairs

    def __post_init__(self) -> None:
        for name in ("trigger_word", "caption_prefix", "caption_suffix"):
            text = getattr(self, name)
            if len(text) > MOST_WORDS or len(text.splitlines()) > 1:
                raise OptionError(f"--{name}: give one line of at most {MOST_WORDS} characters")
        for option, pairs in (("--replace", self.replace), ("--replace_regex", self.replace_regex)):
            for old, new in pairs:
                found = bad_character(old + new)
                if found is not None:
                    raise OptionError(f"{option} holds {found}: set the terminal to UTF-8")
                if not old:
                    raise OptionError(f'{option} "" {new!r}: say what to replace')
        for pattern, new in self.replace_regex:
            try:
                re.compile(pattern).sub(new, "")
            except (re.error, IndexError, OverflowError, RecursionError) as error:
                raise OptionError(
                    f"--replace_regex {pattern!r} {new!r}: {error}. Write it as Python's re.sub takes it"
                ) from None

    @property
    def changes_something(self) -> bool:
        """Return whether any of the options is given."""
        return any(
            (self.trigger_word, self.caption_prefix, self.caption_suffix, self.replace, self.replace_regex)
        )


@dataclass(frozen=True)
class CaptioningOptions:
    """Which captions to write, who makes them, and what is done to them."""

    dataset_config: Path
    dry_run: bool
    overwrite: bool
    overwrite_all: bool
    fill_empty: bool
    edit_only: bool
    model: CaptionModelOptions
    api: ApiOptions
    ask: AskOptions
    wording: WordingOptions

    def __post_init__(self) -> None:
        if self.model.model is not None and self.api.api_base is not None:
            raise OptionError("--model and --api_base exclude each other: give one of the two")
        if (self.api.api_base is None) != (self.api.api_model is None):
            lacking = "--api_base" if self.api.api_base is None else "--api_model"
            raise OptionError(f"{lacking} is missing: --api_base and --api_model are given together")
        if self.api.api_base is None and self.api.given:
            raise OptionError(f"{self.api.given[0]} is for a server: give --api_base too, or leave it out")
        if self.api.api_base is not None and self.model.given:
            raise OptionError(f"{self.model.given[0]} is for --model: leave it out with --api_base")
        if self.edit_only:
            self._check_edit_only()
        elif not self.dry_run and self.model.model is None and self.api.api_base is None:
            raise OptionError(
                "--model or --api_base is missing: give the folder of a model, or a server and --api_model. "
                "--dry_run and --edit_only need neither"
            )

    def _check_edit_only(self) -> None:
        others = {
            "--model": self.model.model is not None,
            "--api_base": self.api.api_base is not None,
            "--overwrite": self.overwrite,
            "--overwrite_all": self.overwrite_all,
            "--fill_empty": self.fill_empty,
            "--prompt": self.ask.prompt is not None,
        }
        wrong = next((name for name, is_given in others.items() if is_given), None)
        if wrong is not None:
            raise OptionError(f"--edit_only makes no captions: leave out {wrong}")
        if not self.wording.changes_something:
            raise OptionError(
                "--edit_only changes nothing by itself: add --replace, --replace_regex, --trigger_word, "
                "--caption_prefix or --caption_suffix"
            )


def add_captioning_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options of tools/caption_dataset.py."""
    group = parser.add_argument_group("what to do")
    group.add_argument(
        "--dataset_config", type=str, required=True, help="dataset configuration, .toml or .json"
    )
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="name the captions that are missing and where they would be written; load and write nothing",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="also make those captions anew that this program wrote and nobody has edited since",
    )
    group.add_argument(
        "--overwrite_all",
        action="store_true",
        help="replace all captions, also hand-written ones; these are kept beside the new ones as .bak",
    )
    group.add_argument(
        "--fill_empty", action="store_true", help="also write captions where one is there and empty"
    )
    group.add_argument(
        "--edit_only",
        action="store_true",
        help="make no captions: apply --replace, --replace_regex, --trigger_word, --caption_prefix and "
        "--caption_suffix to those that are there; the old ones are kept as .bak",
    )
    _add_model_arguments(parser.add_argument_group("a model that runs here"))
    _add_api_arguments(parser.add_argument_group("a server of your own, OpenAI-compatible"))
    _add_ask_arguments(parser.add_argument_group("what is asked"))
    _add_wording_arguments(parser.add_argument_group("the text that is written"))


def _add_model_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        type=str,
        default=None,
        help="folder of a vision-language model for transformers (config.json, safetensors), or the name of "
        "its repository on Hugging Face; code that comes with a model is never run",
    )
    group.add_argument(
        "--batch_size", type=int, default=None, help="images or clips described together; default: 1"
    )
    group.add_argument(
        "--dtype",
        type=str,
        default=None,
        help="bfloat16, float16 or float32; default: that of the model's files, on a CPU float32",
    )
    group.add_argument(
        "--device", type=str, default=None, help="cuda, cuda:1, mps or cpu; default: the best one available"
    )


def _add_api_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--api_base",
        type=str,
        default=None,
        help="address of the server, such as http://localhost:8000/v1; frames are sent there as JPEG. A key, "
        "if the server wants one, is read from the environment variable OPENAI_API_KEY",
    )
    group.add_argument("--api_model", type=str, default=None, help="name of the model on the server")
    group.add_argument("--api_workers", type=int, default=None, help="requests at a time; default: 4")
    group.add_argument(
        "--api_timeout",
        type=float,
        default=None,
        help="seconds to wait for an answer before the request is made again; default: 120",
    )


def _add_ask_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompt",
        type=str,
        default=None,
        help="what the model is asked about each image or clip; default: to describe it in one paragraph",
    )
    group.add_argument("--system_prompt", type=str, default=None, help="system message before the prompt")
    group.add_argument(
        "--num_frames", type=int, default=8, help="frames of a clip to show, evenly spaced over all of it"
    )
    group.add_argument(
        "--max_pixels",
        type=int,
        default=262_144,
        help="most pixels of a frame; larger ones are scaled down; default: 262144, as 512 x 512",
    )
    group.add_argument("--max_new_tokens", type=int, default=256, help="most tokens of a caption")
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="0 takes the most probable word every time; above 0 words are drawn; default: 0",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="seed of drawn words, with --temperature above 0; default: 0"
    )


def _add_wording_arguments(group: argparse._ArgumentGroup) -> None:
    keys = "the key of this name in the dataset's TOML does the same without touching files"
    group.add_argument(
        "--trigger_word",
        type=str,
        default="",
        help=f"put before each caption that does not hold it; {keys}",
    )
    group.add_argument(
        "--caption_prefix",
        type=str,
        default="",
        help=f"put before each caption that does not begin with it; {keys}",
    )
    group.add_argument(
        "--caption_suffix",
        type=str,
        default="",
        help=f"put behind each caption that does not end with it; {keys}",
    )
    group.add_argument(
        "--replace",
        type=str,
        nargs=2,
        action="append",
        default=[],
        metavar=("OLD", "NEW"),
        help="replace a text in each caption, before anything is put around it; may be given several times",
    )
    group.add_argument(
        "--replace_regex",
        type=str,
        nargs=2,
        action="append",
        default=[],
        metavar=("PATTERN", "NEW"),
        help="the same with a regular expression of Python, after all of --replace",
    )
