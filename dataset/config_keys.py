"""Types of the keys in dataset configurations, and reading of files and values.

A key is declared once: keys of a `[[datasets]]` table are fields of `DatasetTable` (dataset/table.py), keys
of the layout of sd-scripts are in `SUBSET_KEYS` (dataset/subset_options.py). Standard library only.
"""

import dataclasses
import difflib
import enum
import logging
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from modules import paths
from modules.command import did_you_mean, quote_command
from modules.errors import DatasetError
from modules.text_encodings import guess_encoding
from modules.text_files import bad_character, parse_json, parse_toml, read_text

logger = logging.getLogger(__name__)

# values of frame_extraction; see dataset/sources/frames.py
MODES = ("head", "chunk", "slide", "uniform", "full")
CACHE_FORMATS = ("files", "shards", "npz")
# values of `audio`: clips without audio are an error or are silent, or audio is ignored
REQUIRED, IF_PRESENT, IGNORE = "required", "if_present", "ignore"
AUTO = "auto"  # value of source_fps: use the timestamps in each file
# limits that catch typing errors and values that would exhaust memory
FAR = 10_000  # latent frames; real positions in time are far below
MAX_COUNT = 10**9
MAX_REPEATS = 100_000
MAX_SAMPLES = 10_000  # spans of a clip
MAX_WEIGHT = 100
MAX_MULTIPLIER = 10
MAX_WORDS = 2000  # characters of trigger_word, caption_prefix and caption_suffix
LONGEST_SIDE = 16_384  # pixels
MAX_PIXELS = 7680 * 4320  # of `resolution`; models are trained on up to 2 million
RATES = (0.001, 1_000_000)  # frames a second


class InvalidValue(Exception):
    """Raised for a value that is not allowed; the message, if any, gives the reason."""


class ValueType(NamedTuple):
    """Type of a key's value: a function that parses the value, and a text about the allowed values."""

    read: Callable[[Any], Any]  # converts a value from the file, or raises InvalidValue
    allowed: str  # describes valid values, for messages


def make_value_type(
    kinds: type | tuple[type, ...],
    fits: Callable[[Any], bool],
    allowed: str,
    convert: Callable[[Any], Any] = lambda value: value,
) -> ValueType:
    """Return the type of a key's values, with a function that checks and converts a value of the file.

    Args:
        kinds: Python types of values in the file.
        fits: Returns whether a value of these types is allowed.
        allowed: Describes valid values, for messages.
        convert: Converts an allowed value.
    """

    def read(value: Any) -> Any:
        """Return the value in the type that tables store. Raises InvalidValue if it is not allowed."""
        is_wrong_bool = isinstance(value, bool) and kinds is not bool  # bool is a subclass of int
        if is_wrong_bool or not isinstance(value, kinds) or not fits(value):
            raise InvalidValue
        return convert(value)

    return ValueType(read, allowed)


def whole(minimum: int, maximum: int, allowed: str = "") -> ValueType:
    """Return the value type of integers from `minimum` to `maximum`."""
    limit = f"{minimum} or more"
    if maximum < MAX_COUNT:
        limit += f", at most {maximum}"
    return make_value_type(
        int, lambda value: minimum <= value <= maximum, allowed or f"a whole number, {limit}"
    )


def number(fits: Callable[[float], bool], allowed: str) -> ValueType:
    """Return the value type of numbers that `fits` accepts; they are parsed as float."""
    return make_value_type((int, float), fits, allowed, float)


def one_of(values: tuple[str, ...]) -> ValueType:
    """Return the value type of these words only."""
    quoted = ", ".join(f'"{value}"' for value in values)
    return make_value_type(str, lambda value: value in values, f"one of {quoted}")


def _list_of(item_type: ValueType, allowed: str, or_one: bool = False) -> ValueType:
    """Return the value type of lists with at least one item."""
    # `or_one` also allows a single value without a list.

    def read(value: Any) -> tuple[Any, ...]:
        """Return the list's values as a tuple. Raises InvalidValue."""
        values = [value] if or_one and not isinstance(value, list) else value
        if not isinstance(values, list) or not values:
            raise InvalidValue
        return tuple(map(item_type.read, values))

    return ValueType(read, allowed)


def _path(value: str) -> Path:
    """Return the value as a path. Raises InvalidValue, with the reason, if it cannot be used."""
    try:
        path = paths.expand_path(value)
    except ValueError as error:
        raise InvalidValue(str(error)) from None
    if not paths.path_exists(path):
        reason = paths.explain_path(paths.strip_quotes(value))
        if reason is not None:
            raise InvalidValue(reason)
    return path


def _size(value: Any) -> tuple[int, int]:
    """Parse a resolution: one side, or width and height. Raises InvalidValue."""
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2:
        raise InvalidValue
    width, height = map(SIDE.read, sides)
    if width * height > MAX_PIXELS:
        raise InvalidValue
    return width, height


def _is_text(value: str) -> bool:
    """Return whether a text has visible characters and no unprintable ones."""
    return bool(value.strip()) and not bad_character(value)


# extensions of files that systems, shells, Python or browsers execute: captions never get these
PROGRAMS = frozenset(
    [
        "py", "pyc", "pyw", "pth", "so", "sh", "bash", "zsh", "bat", "cmd", "ps1", "exe", "com", "dll",
        "scr", "vbs", "js", "lnk", "desktop", "html", "svg",
    ]
)  # fmt: skip


def _is_safe_extension(extension: str) -> bool:
    """Return whether a text is a file extension without a path, and not one of files that can be executed."""
    has_separators = bool(set(extension) & set("/\\\0"))
    is_program = extension.rpartition(".")[2].strip().lower() in PROGRAMS
    return _is_text(extension) and "." in extension and not has_separators and not is_program


def is_short(value: str) -> bool:
    """Return whether a text is short and has no control characters."""
    return len(value) <= MAX_WORDS and not bad_character(value)


YES_NO = make_value_type(bool, lambda _: True, "true or false, without quotes")
COUNT = whole(1, MAX_COUNT)
REPEATS = whole(1, MAX_REPEATS)
SAMPLES = whole(1, MAX_SAMPLES)
FROM_ZERO = whole(0, MAX_REPEATS, "a whole number, 0 or more")
SIDE = whole(1, LONGEST_SIDE, "a whole number of pixels, 1 or more")
PLACE = whole(1 - FAR, FAR - 1, f"a whole number below {FAR}")
PLACES = _list_of(PLACE, f"a list of whole numbers below {FAR}, such as [0, 10]")
COUNTS = _list_of(COUNT, "a list of whole numbers, each 1 or more, such as [1, 25, 49]")
FRAME = whole(-1, FAR - 1, "a frame of the clip from 0, or -1, right before the first")
FRAME_INDICES = _list_of(FRAME, "a list of frames from 0, or -1, such as [-1, 48]")
STRENGTH = number(lambda value: 0 < value <= 1, "a number above 0, at most 1, such as 0.7")
STRENGTHS = _list_of(STRENGTH, "a list of numbers above 0, at most 1, such as [1, 0.7]")
SHARE = number(lambda value: 0 <= value <= 1, "a number from 0 to 1, such as 0.1")
WEIGHT = number(lambda value: 0 < value <= MAX_WEIGHT, f"a number above 0, at most {MAX_WEIGHT}, such as 0.5")
MULTIPLIER = number(
    lambda value: value != 0 and abs(value) <= MAX_MULTIPLIER,
    f"a number from -{MAX_MULTIPLIER} to {MAX_MULTIPLIER} other than 0, such as -0.5",
)
RATE = number(
    lambda value: RATES[0] <= value <= RATES[1],
    f'"{AUTO}", or a number above 0, such as 30 or 29.97 ({RATES[0]} to {RATES[1]})',
)
TARGET_FPS = number(
    lambda value: RATES[0] <= value <= RATES[1], f"a number above 0, such as 25 ({RATES[0]} to {RATES[1]})"
)
SOURCE_FPS = ValueType(lambda value: AUTO if value == AUTO else RATE.read(value), RATE.allowed)


def _is_region(value: list[Any]) -> bool:
    """Return whether a list is a rectangle in pixels: top, left, bottom, right."""
    if len(value) != 4 or not all(type(side) is int and 0 <= side <= LONGEST_SIDE for side in value):
        return False
    top, left, bottom, right = value
    return bool(top < bottom and left < right)


REGION = make_value_type(
    list, _is_region, "[top, left, bottom, right] in pixels, such as [0, 0, 512, 384]", tuple
)
SIZE = ValueType(
    _size,
    f"a whole number or [width, height], such as 512 or [960, 544], each at most {LONGEST_SIDE}, "
    f"together at most {MAX_PIXELS:,} pixels",
)
MODE, CACHE_FORMAT = one_of(MODES), one_of(CACHE_FORMATS)
AUDIO = one_of((REQUIRED, IF_PRESENT, IGNORE))
PATH = make_value_type(str, _is_text, "a path in quotes", _path)
LIST_PATH = make_value_type(
    str,
    lambda value: _is_text(value) and not paths.is_address(value),
    "a path in quotes, not an address: download the list or table itself first",
    _path,
)
PATHS = _list_of(PATH, 'a list of paths in quotes, such as ["styles"]')
COLUMN = make_value_type(str, _is_text, "the name of a column in quotes")
TARS = _list_of(
    make_value_type(str, _is_text, ""),
    'a path in quotes, such as "clips-*.tar", or a list of them',
    or_one=True,
)
EXTENSION = make_value_type(
    str,
    _is_safe_extension,
    'an extension with its dot, such as ".txt"; no folder, and none of programs or pages',
)
# may be empty, to override [general]
WORDS = make_value_type(
    str,
    lambda value: is_short(value) and len(value.splitlines()) < 2,
    f"text in quotes, one line of at most {MAX_WORDS} characters",
    str.strip,
)
TEXT = make_value_type(str, is_short, f"text in quotes, at most {MAX_WORDS} characters")


# --- keys of a [[datasets]] table
# ------------------------------------------------------------------------------------------------------------

BOTH = ("image", "video")


class Stale(enum.Flag):
    """Which caches (or other results) become stale if a key's value changes.

    Each key has to declare it; there is no default, so that no key is forgotten. Changes of captions and
    images themselves are detected by comparing their contents.
    """

    NOTHING = 0
    FRAMES = enum.auto()  # latents: other frames of a clip are used
    LATENTS = enum.auto()  # latents: their size, mask or source changes
    SECTIONS = enum.auto()  # latents of a family with sections
    REFERENCES = enum.auto()  # latents of images that have references
    TEXTS = enum.auto()  # embeddings of captions
    LEARNING = enum.auto()  # no cache, but the training state from which a run resumes


NOTHING, FRAMES, LATENTS, SECTIONS = Stale.NOTHING, Stale.FRAMES, Stale.LATENTS, Stale.SECTIONS
REFERENCES, TEXTS, LEARNING = Stale.REFERENCES, Stale.TEXTS, Stale.LEARNING


class Indexed(enum.Enum):
    """Which parts of a cache folder's index (`dataset.cache.index`) become stale if a field's value changes.

    A field of a table affects both parts unless it is declared otherwise.
    """

    LATENTS_AND_TEXTS = enum.auto()  # for a folder, also if files are added to it or removed
    PATH_ONLY = enum.auto()  # both parts; the files in the folder do not matter, or a list names them
    LATENTS_ONLY = enum.auto()  # `for_family` sets it, and text caches do not depend on it
    NEITHER = enum.auto()  # says how items are learned, not how they are cached


@dataclasses.dataclass(frozen=True)
class TableKey:
    """One key of a [[datasets]] table.

    Attributes:
        value_type: Type of its value in the file.
        default: Value in tables without the key.
        kinds: Kinds of tables that may have the key.
        in_general: Whether [general] may have the key, too.
        is_form_specific: Whether only tables of some source formats, which list the key, may have it.
        stale: Which caches become stale if the value changes.
        rank: Order among LEARNING keys; lower ranks come first in states and metadata.
    """

    value_type: ValueType
    default: Any
    kinds: tuple[str, ...] = BOTH
    in_general: bool = False
    is_form_specific: bool = False
    stale: Stale = NOTHING
    rank: int = 0


def key(
    value_type: ValueType,
    default: Any = None,
    *,
    stale: Stale,
    indexed: Indexed = Indexed.LATENTS_AND_TEXTS,
    **settings: Any,
) -> Any:
    """Declare a dataclass field that is also a dataset file key of the same name.

    `settings` are further fields of `TableKey`.
    """
    table_key = TableKey(value_type, default, stale=stale, **settings)
    return dataclasses.field(default=default, metadata={"key": table_key, "indexed": indexed})


def source_field(value_type: ValueType) -> Any:
    """Declare a dataclass field that is set by the table key `image_<field>` or `video_<field>`."""
    return dataclasses.field(default=None, metadata={"source": value_type})


# spellings of other trainers -> our keys
OTHER_SPELLINGS: Mapping[str, str] = {
    "loss_mask_directory": "mask_directory",
    "loss_mask_use_alpha": "alpha_mask",
    "flux_kontext_no_resize_control": "no_resize_control",
    "qwen_image_edit_no_resize_control": "no_resize_control",
    "qwen_image_edit_control_resolution": "control_resolution",
}


# keys about lengths of audio
LENGTHS = ("audio_bucket_strategy", "audio_bucket_interval")
# keys of musubi-tuner's fork for LTX-2 that have no counterpart, and the reason
NO_KEYS: Mapping[str, str] = {
    "audio_jsonl_file": "it lists audio without clips. audio_path in a list of clips names their audio",
    **dict.fromkeys(LENGTHS, "audio is as long as its clip"),
    **dict.fromkeys(
        (
            *("reference_audio_directories", "reference_audio_cache_directories"),
            *("reference_directories",),
        ),
        "a clip has one audio reference, from reference_audio_directory; several clips and images are "
        "numbered in reference_directory: cat_0.mp4, cat_1.mp4",
    ),
    "separate_audio_buckets": "clips without audio do not affect the audio of other clips in their batch",
    "bucket_batch_sizes": "batch_size is for all sizes; make a [[datasets]] table for each",
    **dict.fromkeys(
        ("default_loss_mask_path", "loss_mask_invert"),
        "masks are files in mask_directory, white is learned; an item without one is learned whole",
    ),
}


# keys of the same fork that are ignored because they are not needed, and the reason
UNNEEDED: Mapping[str, str] = dict.fromkeys(
    (
        *("reference_cache_directory", "reference_cache_directories", "latent_idx_guide_cache_directory"),
        *("keyframe_guide_cache_directory", "keyframe_guide_extra_cache_directories"),
        "reference_audio_cache_directory",
    ),
    "caches of references and guides are with those of their clips, in cache_directory",
)


def without_unneeded(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Return a dataset file's content without the keys in UNNEEDED; the removed keys are logged."""
    datasets = content.get("datasets")
    tables = [content.get("general")]
    if isinstance(datasets, list):
        tables += datasets
    unneeded_names: set[str] = set()
    for table in tables:
        if isinstance(table, dict):
            unneeded_names |= table.keys() & UNNEEDED.keys()
    if not unneeded_names:
        return content
    for name in unneeded_names:
        logger.info("%s: %s is not needed: %s", path, name, UNNEEDED[name])
    cleaned = dict(content)
    if "general" in content:
        cleaned["general"] = _without_keys(content["general"], unneeded_names)
    if isinstance(datasets, list):
        cleaned["datasets"] = [_without_keys(table, unneeded_names) for table in datasets]
    return cleaned


def _without_keys(table: Any, names: Container[str]) -> Any:
    """Return a table without some keys; other values than tables are returned unchanged."""
    if not isinstance(table, dict):
        return table
    return {name: value for name, value in table.items() if name not in names}


# --- reading keys, and explaining invalid ones
# ------------------------------------------------------------------------------------------------------------

KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a table",
}


class HasValueType(Protocol):
    """Protocol of a dataset key, of this program or another trainer, whose values have a `ValueType`."""

    @property
    def value_type(self) -> ValueType:
        """Type of the key's value."""


INVALID = object()  # in place of an invalid value, which has been reported


def parse_config(path: Path) -> dict[str, Any]:
    """Return the content of a .toml or .json file.

    Raises:
        DatasetError: If the file cannot be read or parsed.
    """
    if path.is_dir():
        default = path / "dataset.toml"
        if default.is_file():
            advice = f"Pass {default}"
        else:
            command = quote_command(["python", "new_project.py", str(path)])
            advice = f"Pass a .toml or .json file: {command} makes one"
        raise DatasetError(f"{path} is a folder. {advice}")
    if path.suffix.lower() not in {".toml", ".json"}:
        hint = other_trainers().explain_yaml_suffix(path.suffix)
        raise DatasetError(
            f"{path}: a dataset configuration ends in .toml or .json, but this ends in "
            f"{path.suffix or 'nothing'}{hint}"
        )
    try:
        text = read_text(path)
    except UnicodeDecodeError as error:
        guess = guess_encoding(error.object)
        seems = "" if guess is None else f"; it looks like {guess.name}"
        raise DatasetError(
            f"{path} is not UTF-8 text (byte {error.start}{seems}). Save it as UTF-8 in your editor."
        ) from None
    except OSError as error:
        raise DatasetError(
            f"{path} cannot be read: {error.strerror}{paths.describe_lookup(path)}."
            f"{paths.explain_missing(path)} Pass the file's path to --dataset_config."
        ) from error
    try:
        content = parse_toml(text) if path.suffix.lower() == ".toml" else parse_json(text, no_repeats=True)
    except ValueError as error:  # both parsers' errors are ValueErrors with line and column
        raise DatasetError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(content, dict):
        hint = other_trainers().find_trainer_hint(content)
        raise DatasetError(f'{path}: the top level must be an object with "datasets". {hint}'.rstrip())
    return content


def other_trainers() -> ModuleType:
    """Import and return the module about other trainers' files, which only error messages need."""
    from dataset import other_trainers as module  # only for mistakes

    return module


def without_nulls(table: Any, name: str, errors: list[str]) -> dict[str, Any]:
    """Return a table without the keys that are null (in JSON).

    If `table` is neither a table nor None, an error is added to `errors`, and {} is returned.
    """
    if isinstance(table, dict):
        return {key: value for key, value in table.items() if value is not None}
    if table is not None:
        if name == "[general]" and isinstance(table, list):
            errors.append("[[general]] needs one pair of brackets: write [general]")
        else:
            errors.append(f"{name} = {show(table)} is not a table of keys")
    return {}


def read_keys(
    keys: Mapping[str, HasValueType],
    table: Mapping[str, Any],
    table_label: str,
    errors: list[str],
    misplaced_reasons: Mapping[str, str],
    other_spellings: Mapping[str, str] | None = None,
    ignored: tuple[str, ...] = (),
    other_layout_reasons: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Check and convert the keys in a table of a dataset file; return their values by name.

    An invalid value becomes INVALID.

    Args:
        keys: Keys that may be in the table, by name.
        table: The table.
        table_label: Name of the table, for messages.
        errors: List to which errors are added.
        misplaced_reasons: Keys that this table may not have, each with the end of its error message.
        other_spellings: Names of keys by their other spellings.
        ignored: Keys that another function reads.
        other_layout_reasons: Keys of files in the other layout, each with the end of its error message.
    """
    names_by_spelling = other_spellings or {}
    values: dict[str, Any] = {}
    spellings: dict[str, str] = {}  # name of a key -> its spelling in the table
    for spelling, value in table.items():
        if spelling in ignored:
            continue
        name = names_by_spelling.get(spelling, spelling)
        reasons = misplaced_reasons if name in keys else other_layout_reasons or {}
        if name in reasons:
            errors.append(f"{table_label}: {spelling} = {show(value)} {reasons[name]}")
        elif name not in keys:
            allowed = [*ignored, *(key for key in keys if key not in misplaced_reasons)]
            errors.append(f"{table_label}: {unknown(spelling, value, allowed)}")
        elif spellings.setdefault(name, spelling) != spelling:
            errors.append(f"{table_label}: {_describe_repeated(name, [spellings[name], spelling])}")
        else:
            value_type = keys[name].value_type
            try:
                values[name] = value_type.read(value)
            except InvalidValue as invalid:
                values[name] = INVALID
                errors.append(f"{table_label}: {_explain(name, value, value_type.allowed, str(invalid))}")
    return values


def _describe_repeated(name: str, spellings: list[str]) -> str:
    """Return the error for a key with two spellings in a table; our own spelling (`name`) comes last."""
    ours_last = sorted(spellings, key=lambda spelling: spelling == name)
    return f"{' and '.join(ours_last)} are the same key; omit one"


def _explain(name: str, value: Any, allowed: str, reason: str) -> str:
    """Return the error message for an invalid value: its type, the allowed values, and a hint."""
    hint = f"; but {reason}" if reason else ""
    if not reason and name == "frame_extraction" and isinstance(value, str):
        similar = difflib.get_close_matches(value, MODES, 1)
        hint = f'. Did you mean "{similar[0]}"?' if similar else ""
    if not hint and str(value).strip().lower() in paths.NOTHING:  # such as "none"
        hint = ". For nothing, omit the key"
    kind = KINDS.get(type(value), type(value).__name__)
    return f"{name} = {show(value)} ({kind}); allowed: {allowed}{hint}"


def unknown(name: str, value: Any, allowed: Iterable[str]) -> str:
    """Return the error message for an unknown key, with a known key of similar spelling if there is one."""
    if name in NO_KEYS:
        return f"{name} = {show(value)} is not supported: {NO_KEYS[name]}. Omit it"
    allowed = list(allowed)
    return f"unknown key {name} = {show(value)}.{did_you_mean(name, allowed)} Allowed: {', '.join(allowed)}"


def show(value: Any) -> str:
    """Format a value as JSON for messages, in at most 80 characters and without passwords."""
    import json  # only for errors: all training scripts import this module

    text = paths.hide_secrets(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 80 else text[:77] + "..."
