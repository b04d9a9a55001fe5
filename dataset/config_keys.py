"""The keys of a dataset configuration: allowed values, defaults, and the tables that may have them.

Standard library only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.paths import expand_path, explain_path, is_address, path_exists
from modules.text_files import bad_character

# of frame_extraction; what they do: dataset/sources/frames.py
MODES = ("head", "chunk", "slide", "uniform", "full")
FAR = 10_000  # latent frames; places in time stay far below
# beyond these a number is a slip of the finger, or meant to fill the memory
MOST_COUNT = 10**9
MOST_REPEATS = 100_000
MOST_SAMPLES = 10_000  # spans of a clip
MOST_WEIGHT = 100
MOST_WORDS = 2000  # characters of trigger_word, caption_prefix and caption_suffix
LONGEST_SIDE = 16_384  # pixels
MOST_PIXELS = 7680 * 4320  # of `resolution`; models are trained on up to 2 million
RATES = (0.001, 1_000_000)  # frames a second
AUTO = "auto"  # as source_fps: the times of the frames in each clip's file


CACHE_FORMATS = ("files", "shards", "npz")


class Unfit(Exception):
    """The value is not allowed; the text, if there is one, says why."""


def read_whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Unfit
    return value


def read_count(value: Any) -> int:
    return _counted(value, MOST_COUNT)


def _counted(value: Any, most: int) -> int:
    if not 1 <= read_whole(value) <= most:
        raise Unfit
    return int(value)


def read_repeats(value: Any) -> int:
    return _counted(value, MOST_REPEATS)


def _samples(value: Any) -> int:
    return _counted(value, MOST_SAMPLES)


def read_side(value: Any) -> int:
    return _counted(value, LONGEST_SIDE)


def _rate(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not RATES[0] <= value <= RATES[1]:
        raise Unfit
    return float(value)


def _source_fps(value: Any) -> float | str:
    return AUTO if value == AUTO else _rate(value)


def read_yes_no(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Unfit
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or bad_character(value):
        raise Unfit
    return value


def read_path(value: Any) -> Path:
    try:
        path = expand_path(_text(value))
    except ValueError as error:
        raise Unfit(str(error)) from None
    why = None if path_exists(path) else explain_path(value)
    if why is not None:
        raise Unfit(why)
    return path


def _table_path(value: Any) -> Path:
    if is_address(_text(value)):
        raise Unfit
    return read_path(value)


def read_resolution(value: Any) -> tuple[int, int]:
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2:
        raise Unfit
    width, height = read_side(sides[0]), read_side(sides[1])
    if width * height > MOST_PIXELS:
        raise Unfit
    return width, height


def _counts(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise Unfit
    return tuple(read_count(item) for item in value)


def _indices(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise Unfit
    return tuple(_place(item) for item in value)


def _place(value: Any) -> int:
    if not -FAR < read_whole(value) < FAR:
        raise Unfit
    return int(value)


def read_caption_extension(value: Any) -> str:
    if "." not in _text(value):
        raise Unfit
    return str(value)


def read_words(value: Any) -> str:
    """Return a part of captions; an empty one overrides [general]."""
    if (
        not isinstance(value, str)
        or len(value) > MOST_WORDS
        or len(value.splitlines()) > 1
        or bad_character(value)
    ):
        raise Unfit
    return value.strip()


def read_share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise Unfit
    return float(value)


def read_weight(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MOST_WEIGHT:
        raise Unfit
    return float(value)


def _mode(value: Any) -> str:
    if value not in MODES:
        raise Unfit
    return str(value)


def read_cache_format(value: Any) -> str:
    if value not in CACHE_FORMATS:
        raise Unfit
    return str(value)


def _patterns(value: Any) -> tuple[str, ...]:
    """Return paths, globs or addresses: one, or a list of them."""
    patterns = value if isinstance(value, list) else [value]
    if not patterns:
        raise Unfit
    return tuple(_text(pattern) for pattern in patterns)


@dataclass(frozen=True)
class TableKey:
    """One key of a table.

    read: converts its value to the field, or raises Unfit. allowed: the allowed values, in words.
    """

    read: Callable[[Any], Any]
    allowed: str
    default: Any
    kinds: tuple[str, ...] = ("image", "video")
    in_general: bool = False


_POSITIVE = "a whole number, 1 or more"
_PIXELS = (
    f"a whole number or [width, height], such as 512 or [960, 544], each at most {LONGEST_SIDE}, "
    f"together at most {MOST_PIXELS:,} pixels"
)
_RATE = f'"{AUTO}", or a number above 0, such as 30 or 29.97 ({RATES[0]} to {RATES[1]})'
_BOOL = "true or false, without quotes"
_FOLDER = "a path in quotes"
_TABLE = "a path in quotes, not an address: download the list or table itself first"
_TARS = 'a path in quotes, such as "clips-*.tar", or a list of them'
_COLUMN = "the name of a column in quotes"
_WORDS = f"text in quotes, one line of at most {MOST_WORDS} characters"

KEYS: Mapping[str, TableKey] = {
    "resolution": TableKey(read_resolution, _PIXELS, (960, 544), in_general=True),
    "caption_extension": TableKey(
        read_caption_extension, 'an extension with its dot, such as ".txt"', None, in_general=True
    ),
    "trigger_word": TableKey(read_words, _WORDS, "", in_general=True),
    "caption_prefix": TableKey(read_words, _WORDS, "", in_general=True),
    "caption_suffix": TableKey(read_words, _WORDS, "", in_general=True),
    "multi_caption": TableKey(read_yes_no, _BOOL, False, in_general=True),
    "caption_dropout_rate": TableKey(read_share, "a number from 0 to 1, such as 0.1", 0.0, in_general=True),
    "batch_size": TableKey(read_count, _POSITIVE, 1, in_general=True),
    "num_repeats": TableKey(read_repeats, f"{_POSITIVE}, at most {MOST_REPEATS}", 1, in_general=True),
    "enable_bucket": TableKey(read_yes_no, _BOOL, False, in_general=True),
    "bucket_no_upscale": TableKey(read_yes_no, _BOOL, False, in_general=True),
    "cache_format": TableKey(
        read_cache_format,
        "one of " + ", ".join(f'"{one}"' for one in CACHE_FORMATS),
        "files",
        in_general=True,
    ),
    "cache_directory": TableKey(read_path, _FOLDER, None),
    "image_directory": TableKey(read_path, _FOLDER, None, ("image",)),
    "image_jsonl_file": TableKey(_table_path, _TABLE, None, ("image",)),
    "image_table_file": TableKey(_table_path, _TABLE, None, ("image",)),
    "image_tars": TableKey(_patterns, _TARS, None, ("image",)),
    "video_directory": TableKey(read_path, _FOLDER, None, ("video",)),
    "video_jsonl_file": TableKey(_table_path, _TABLE, None, ("video",)),
    "video_table_file": TableKey(_table_path, _TABLE, None, ("video",)),
    "video_tars": TableKey(_patterns, _TARS, None, ("video",)),
    "cogvideox_root": TableKey(read_path, _FOLDER, None, ("video",)),
    "dataset_file": TableKey(read_path, "a path in quotes", None, ("video",)),
    "path_column": TableKey(_text, _COLUMN, None),
    "caption_column": TableKey(_text, _COLUMN, None),
    "video_column": TableKey(_text, _COLUMN, None, ("video",)),
    "id_token": TableKey(read_words, _WORDS, "", ("video",)),
    "load_tensors": TableKey(read_yes_no, _BOOL, False, ("video",)),
    "allow_urls": TableKey(read_yes_no, _BOOL, False),
    "download_directory": TableKey(read_path, _FOLDER, None),
    "control_directory": TableKey(read_path, _FOLDER, None),
    "mask_directory": TableKey(read_path, _FOLDER, None),
    "alpha_mask": TableKey(read_yes_no, _BOOL, False),
    "validation": TableKey(read_yes_no, _BOOL, False),
    "prior_loss_weight": TableKey(read_weight, f"a number above 0, at most {MOST_WEIGHT}, such as 0.5", 1.0),
    "target_frames": TableKey(
        _counts, "a list of whole numbers, each 1 or more, such as [1, 25, 45]", (1,), ("video",)
    ),
    "frame_extraction": TableKey(
        _mode, "one of " + ", ".join(f'"{mode}"' for mode in MODES), "head", ("video",)
    ),
    "frame_stride": TableKey(read_count, _POSITIVE, 1, ("video",)),
    "frame_sample": TableKey(_samples, f"{_POSITIVE}, at most {MOST_SAMPLES}", 1, ("video",)),
    "max_frames": TableKey(read_count, _POSITIVE, 129, ("video",)),
    "source_fps": TableKey(_source_fps, _RATE, None, ("video",)),
    "fp_latent_window_size": TableKey(read_count, _POSITIVE, 9),
    "fp_1f_clean_indices": TableKey(
        _indices, f"a list of whole numbers below {FAR}, such as [0, 10]", None, ("image",)
    ),
    "fp_1f_target_index": TableKey(_place, f"a whole number below {FAR}", None, ("image",)),
    "fp_1f_no_post": TableKey(read_yes_no, _BOOL, False, ("image",)),
}
# what the latents of a family with sections depend on besides the frames
SECTION_DEFAULTS = {name: key.default for name, key in KEYS.items() if name.startswith("fp_")}
# which frames of a clip are taken
FRAME_KEYS = ("target_frames", "frame_extraction", "frame_stride", "frame_sample", "max_frames", "source_fps")
# what text caches depend on besides the caption files
CAPTION_DEFAULTS = {
    name: KEYS[name].default for name in ("trigger_word", "caption_prefix", "caption_suffix", "multi_caption")
}
# what a run depends on besides names, sizes and order of its items
LEARNING_DEFAULTS = {
    **CAPTION_DEFAULTS,
    **{name: KEYS[name].default for name in ("caption_dropout_rate", "prior_loss_weight", "alpha_mask")},
}
# `mask` of a latent record: where the mask of its loss is from
FROM_FILE, FROM_ALPHA = "file", "alpha"
# of these a table has one; it says what kind of source the others of the table must fit
SOURCES = (
    *("image_directory", "image_jsonl_file", "image_table_file", "image_tars"),
    *("video_directory", "video_jsonl_file", "video_table_file", "video_tars", "cogvideox_root"),
)
# keys that only tables of some sources have, by the end of the source's key
ONLY_WITH: Mapping[str, tuple[str, ...]] = {
    "dataset_file": ("cogvideox_root",),
    "video_column": ("cogvideox_root",),
    "id_token": ("cogvideox_root",),
    "load_tensors": ("cogvideox_root",),
    "path_column": ("table_file",),
    "caption_column": ("table_file", "tars", "cogvideox_root"),
    "allow_urls": ("table_file", "tars", "jsonl_file"),
    "download_directory": ("table_file", "tars", "jsonl_file"),
    "control_directory": ("directory", "jsonl_file"),
    "mask_directory": ("directory", "jsonl_file"),
}
