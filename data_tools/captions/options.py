"""Options of tools/caption_dataset.py."""

import re
from pathlib import Path
from urllib.parse import urlsplit

from dataset.config_keys import MAX_WORDS
from dataset.options import DATASET_FILE
from modules.errors import OptionError
from modules.options import SENDS, Options, option
from modules.text_files import bad_character
from protocols.families import caption_formats

MAX_FRAMES = 1024
MAX_TOKENS = 32_768
DEFAULT_MAX_TOKENS, DEFAULT_MAX_JSON_TOKENS = 256, 2048  # defaults of --max_new_tokens
Pairs = tuple[tuple[str, str], ...]
KEY = "the key of this name in the dataset's TOML does the same without touching files"


class CaptionModelOptions(Options, title="a model that runs here"):
    """Options of a captioning model that runs on this machine."""

    model: str | None = option(
        "folder of a vision-language model for transformers (config.json, safetensors), or the name of "
        "its repository on Hugging Face; code that comes with a model is never run"
    )
    batch_size: int | None = option("images or clips described together; default: 1", minimum=1, maximum=1024)
    dtype: str | None = option(
        "bfloat16, float16 or float32; default: that of the model's files, on a CPU float32"
    )
    device: str | None = option("cuda, cuda:1, mps or cpu; default: the best one available")


class ApiOptions(Options, title="a server of your own, OpenAI-compatible"):
    """Address, model and limits of an OpenAI-compatible caption server."""

    api_base: str | None = option(
        "address of the server, such as http://localhost:8000/v1; frames are sent there as JPEG. A key, "
        "if the server wants one, is read from the environment variable OPENAI_API_KEY",
        needs="api_model",
        facts=SENDS,
    )
    api_model: str | None = option("name of the model on the server", needs="api_base")
    api_workers: int | None = option(
        "requests at a time; default: 4", minimum=1, maximum=256, needs="api_base"
    )
    api_timeout: float | None = option(
        "seconds to wait for an answer before the request is made again; default: 120",
        minimum=1,
        needs="api_base",
    )

    def __post_init__(self) -> None:
        """Raise OptionError if --api_base is not a plain http or https address."""
        if self.api_base is None:
            return
        try:
            url = urlsplit(self.api_base)
            is_address = url.scheme in {"http", "https"} and bool(url.hostname) and url.port != 0
        except ValueError:  # such as a port that is not a number
            is_address = False
            url = urlsplit("")
        if "@" in url.netloc or url.query or url.fragment:
            raise OptionError(
                "--api_base contains a user's name, a password, or what follows ? or #. Pass the address "
                "alone, such as http://localhost:8000/v1, and a key in the environment variable "
                "OPENAI_API_KEY"
            )
        if not is_address:
            raise OptionError(f"--api_base {self.api_base}: pass an address such as http://localhost:8000/v1")


class AskOptions(Options, title="what is asked"):
    """Prompt, frames and sampling settings for captioning."""

    prompt: str | None = option(
        "what the model is asked about each image or clip; default: to describe it in one paragraph"
    )
    system_prompt: str | None = option("system message before the prompt")
    num_frames: int = option(
        "frames of a clip to show, evenly spaced over all of it", default=8, minimum=1, maximum=MAX_FRAMES
    )
    max_pixels: int = option(
        "most pixels of a frame; larger ones are scaled down; default: 262144, as 512 x 512",
        default=262_144,
        minimum=1024,
    )
    max_new_tokens: int | None = option(
        f"most tokens of a caption; default: {DEFAULT_MAX_TOKENS}, with --caption_format "
        f"{DEFAULT_MAX_JSON_TOKENS}",
        minimum=1,
        maximum=MAX_TOKENS,
    )
    temperature: float = option(
        "0 always selects the most probable token; above 0, tokens are sampled",
        default=0.0,
        minimum=0,
        maximum=10,
        hint="1 samples from the probabilities of the model",
    )
    seed: int = option(
        "seed of drawn words, with --temperature above 0",
        default=0,
        minimum=-(2**63),
        below=2**64,
        ignored_without="temperature",
    )

    def __post_init__(self) -> None:
        if self.prompt is not None and not self.prompt.strip():
            raise OptionError("--prompt is empty: say what to describe, or omit it for the usual one")


class WordingOptions(Options, title="the text that is written"):
    """Options for text that is added to captions or replaced in them."""

    trigger_word: str = option(f"put before each caption that does not hold it; {KEY}", default="")
    caption_prefix: str = option(f"put before each caption that does not begin with it; {KEY}", default="")
    caption_suffix: str = option(f"put behind each caption that does not end with it; {KEY}", default="")
    replace: Pairs = option(
        "replace a text in each caption, before anything is put around it; may be given several times",
        default=(),
        nargs=2,
        action="append",
        metavar=("OLD", "NEW"),
    )
    replace_regex: Pairs = option(
        "the same with a regular expression of Python, after all of --replace",
        default=(),
        nargs=2,
        action="append",
        metavar=("PATTERN", "NEW"),
    )

    def __post_init__(self) -> None:
        """Check the texts to add and the replacements; raise OptionError for an invalid one."""
        for name in ("trigger_word", "caption_prefix", "caption_suffix"):
            text = getattr(self, name)
            if len(text) > MAX_WORDS or len(text.splitlines()) > 1:
                raise OptionError(f"--{name}: pass one line of at most {MAX_WORDS} characters")
        for name in ("replace", "replace_regex"):
            for old, new in getattr(self, name):
                character = bad_character(old + new)
                if character is not None:
                    raise OptionError(f"--{name} contains {character}: set the terminal to UTF-8")
                if not old:
                    raise OptionError(f'--{name} "" {new!r}: say what to replace')
        for pattern, new in self.replace_regex:
            try:
                re.compile(pattern).sub(new, "")  # called only to raise errors in the pattern or in `new`
            except (re.error, IndexError, OverflowError, RecursionError) as error:
                raise OptionError(
                    f"--replace_regex {pattern!r} {new!r}: {error}. Use the syntax of re.sub in Python"
                ) from None

    @property
    def changes_something(self) -> bool:
        """Whether any of the wording options is set."""
        return any(
            (self.trigger_word, self.caption_prefix, self.caption_suffix, self.replace, self.replace_regex)
        )


class WritingOptions(Options, title="what to do"):
    """Which captions are written and how they are reworded; shared by all captioning programs."""

    dry_run: bool = option(
        "name the captions that are missing and where they would be written; load and write nothing"
    )
    try_on: int | None = option(
        "make the captions of the first N files that lack one, print them, and write none; of any files if "
        "none lacks one",
        minimum=1,
        maximum=1000,
        metavar="N",
        excludes="dry_run",
    )
    overwrite: bool = option(
        "also write again the captions that this program wrote and nobody has edited since"
    )
    overwrite_all: bool = option(
        "replace all captions, also hand-written ones; these are kept next to the new ones as .bak"
    )
    fill_empty: bool = option("also write captions where the existing one is empty")


class CaptioningOptions(WritingOptions, title="what to do"):
    """Which captions are written, by which model, and how they are reworded."""

    key_files = (DATASET_FILE,)

    dataset_config: Path = option("dataset configuration, .toml or .json", required=True, by_place=True)
    caption_format: str | None = option(
        "write JSON objects with the keys that the model of this family was trained with, such as fibo_2. "
        "Each answer is checked, and requested again if it is invalid; --trigger_word and the like change "
        "the texts in the objects"
    )
    convert_plain: bool = option(
        "also turn captions that are sentences into such objects, from the image and the sentences; "
        "these are kept next to the new ones as .bak",
        needs="caption_format",
    )
    edit_only: bool = option(
        "make no captions: apply --replace, --replace_regex, --trigger_word, --caption_prefix and "
        "--caption_suffix to existing captions; the old ones are kept as .bak",
        excludes=("overwrite", "overwrite_all", "fill_empty", "try_on", "convert_plain"),
        hint="it makes no captions",
    )
    model: CaptionModelOptions
    api: ApiOptions
    ask: AskOptions
    wording: WordingOptions

    def __post_init__(self) -> None:
        if self.caption_format is not None and self.caption_format not in caption_formats():
            raise OptionError(
                f"--caption_format {self.caption_format} is not a format of JSON captions. Choose from "
                f"{', '.join(caption_formats())}, or omit it for sentences"
            )
        self._check_model_or_server()
        if self.edit_only:
            for name, value in (
                ("model", self.model.model),
                ("api_base", self.api.api_base),
                ("prompt", self.ask.prompt),
            ):
                if value is not None:
                    raise OptionError(f"--edit_only makes no captions: omit --{name}")
            if not self.wording.changes_something:
                raise OptionError(
                    "--edit_only changes nothing by itself: add --replace, --replace_regex, --trigger_word, "
                    "--caption_prefix or --caption_suffix"
                )

    def _check_model_or_server(self) -> None:
        """Raise OptionError if --model and --api_base are both given, or neither although one is needed."""
        has_model = self.model.model is not None
        has_server = self.api.api_base is not None
        if has_model and has_server:
            raise OptionError("--model and --api_base exclude each other: pass one of the two")
        if has_server:
            for name in ("batch_size", "dtype", "device"):
                if getattr(self.model, name) is not None:
                    raise OptionError(f"--{name} is for --model: omit it with --api_base")
        makes_captions = not (self.edit_only or self.dry_run)
        if makes_captions and not has_model and not has_server:
            raise OptionError(
                "--model or --api_base is missing: pass the folder of a model, or a server and --api_model. "
                "--dry_run and --edit_only need neither"
            )
