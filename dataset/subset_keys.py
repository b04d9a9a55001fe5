"""The keys of the image guides' dataset configuration: allowed values, defaults, and where they may stand.

Standard library only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dataset.config_keys import (
    CACHE_FORMATS,
    MOST_REPEATS,
    MOST_WEIGHT,
    MOST_WORDS,
    Unfit,
    read_cache_format,
    read_caption_extension,
    read_count,
    read_path,
    read_repeats,
    read_resolution,
    read_share,
    read_side,
    read_whole,
    read_words,
    read_yes_no,
)
from modules.text_files import bad_character

# where a key may stand: in a subset alone, in all of them, in [general] and [[datasets]]
SUBSET, ANYWHERE, DATASET = "subset", "anywhere", "dataset"
INTERPOLATIONS = (
    *("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"),
    *("box", "lanczos4"),  # of configurations; the option has the others
)
MOST_ATTRIBUTES = 100


@dataclass(frozen=True)
class SubsetKey:
    """One key.

    read: converts its value, or raises Unfit. allowed: the allowed values, in words. option: of the command
    line, whose value counts if no table has the key; "": there is none.
    """

    read: Callable[[Any], Any]
    allowed: str
    default: Any
    place: str = ANYWHERE
    option: str | None = None  # None: that of its name

    @property
    def in_general(self) -> bool:
        return self.place != SUBSET


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MOST_WORDS or bad_character(value):
        raise Unfit
    return value


def _separator(value: Any) -> str:
    if not _text(value):
        raise Unfit
    return str(value)


def _from_zero(value: Any) -> int:
    number = read_whole(value)
    if not 0 <= number <= MOST_REPEATS:
        raise Unfit
    return number


def _not_negative(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 10**9:
        raise Unfit
    return float(value)


def _loss_weight(value: Any) -> float:
    if _not_negative(value) > MOST_WEIGHT:
        raise Unfit
    return float(value)


def _one(value: Any) -> float:
    if isinstance(value, bool) or value != 1:
        raise Unfit
    return 1.0


def _interpolation(value: Any) -> str:
    if value not in INTERPOLATIONS:
        raise Unfit
    return str(value)


def _range(value: Any) -> tuple[float, float]:
    """Return two ascending numbers of "1.5,4.0" or [1.5, 4.0]."""
    parts = value.split(",") if isinstance(value, str) else value
    try:
        low, high = (float(part) for part in parts)
    except (TypeError, ValueError):
        raise Unfit from None
    if not 0 < low <= high <= 1000:
        raise Unfit
    return low, high


def _attributes(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict) or len(value) > MOST_ATTRIBUTES:
        raise Unfit
    return value


def _number(value: Any) -> int:
    if not -(2**63) <= read_whole(value) < 2**64:
        raise Unfit
    return int(value)


_YES = "true or false, without quotes"
_RATE = "a number from 0 to 1, such as 0.1"
_COUNT = "a whole number, 0 or more"
_PATH = "a path in quotes"
_TEXT = f"text in quotes, at most {MOST_WORDS} characters"
_WORDS = f"text in quotes, one line of at most {MOST_WORDS} characters"
_SIDE = "a whole number of pixels, 1 or more"

SUBSET_KEYS: Mapping[str, SubsetKey] = {
    # where pictures are
    "image_dir": SubsetKey(read_path, _PATH, None, SUBSET, ""),
    "metadata_file": SubsetKey(read_path, f"{_PATH}, of a JSON file", None, SUBSET, ""),
    "conditioning_data_dir": SubsetKey(read_path, _PATH, None, SUBSET),
    "mask_directory": SubsetKey(read_path, _PATH, None, SUBSET, ""),
    "cache_directory": SubsetKey(read_path, _PATH, None, SUBSET, ""),
    "cache_format": SubsetKey(
        read_cache_format,
        "one of " + ", ".join(f'"{one}"' for one in CACHE_FORMATS),
        "files",
        ANYWHERE,
        "",
    ),
    "is_reg": SubsetKey(read_yes_no, _YES, False, SUBSET, ""),
    "class_tokens": SubsetKey(_text, _TEXT, None, SUBSET, ""),
    "cache_info": SubsetKey(read_yes_no, _YES, False),
    "custom_attributes": SubsetKey(_attributes, "a table of keys", {}, ANYWHERE, ""),
    "num_repeats": SubsetKey(
        read_repeats,
        f"a whole number from 1 to {MOST_REPEATS}",
        1,
        ANYWHERE,
        "",  # --dataset_repeats is of --in_json alone
    ),
    # sizes
    "resolution": SubsetKey(
        read_resolution, "a whole number or [width, height], such as 1024 or [1024, 768]", None, DATASET
    ),
    "batch_size": SubsetKey(read_count, "a whole number, 1 or more", 1, DATASET, "train_batch_size"),
    "enable_bucket": SubsetKey(read_yes_no, _YES, False, DATASET),
    "min_bucket_reso": SubsetKey(read_side, _SIDE, 256, DATASET),
    "max_bucket_reso": SubsetKey(read_side, _SIDE, 1024, DATASET),
    "bucket_reso_steps": SubsetKey(read_side, _SIDE, 64, DATASET),
    "bucket_no_upscale": SubsetKey(read_yes_no, _YES, False, DATASET),
    "resize_interpolation": SubsetKey(
        _interpolation, "one of " + ", ".join(f'"{one}"' for one in INTERPOLATIONS), None
    ),
    "network_multiplier": SubsetKey(
        _one, "1.0; another strength of the LoRA for one dataset is not supported", 1.0, DATASET, ""
    ),
    # losses and validation
    "prior_loss_weight": SubsetKey(_loss_weight, f"a number from 0 to {MOST_WEIGHT}", 1.0),
    "alpha_mask": SubsetKey(read_yes_no, _YES, False),
    "validation_split": SubsetKey(read_share, _RATE, None, ANYWHERE, ""),
    "validation_seed": SubsetKey(_number, "a whole number", None, ANYWHERE, ""),
    # captions
    "caption_extension": SubsetKey(read_caption_extension, 'an extension, such as ".txt"', ".caption"),
    "shuffle_caption": SubsetKey(read_yes_no, _YES, False),
    "caption_separator": SubsetKey(_separator, _TEXT, ","),
    "keep_tokens": SubsetKey(_from_zero, _COUNT, 0),
    "keep_tokens_separator": SubsetKey(_text, _TEXT, ""),
    "secondary_separator": SubsetKey(_text, _TEXT, ""),
    "enable_wildcard": SubsetKey(read_yes_no, _YES, False),
    "caption_prefix": SubsetKey(read_words, _WORDS, ""),
    "caption_suffix": SubsetKey(read_words, _WORDS, ""),
    "caption_dropout_rate": SubsetKey(read_share, _RATE, 0.0),
    "caption_dropout_every_n_epochs": SubsetKey(_from_zero, _COUNT, 0),
    "caption_tag_dropout_rate": SubsetKey(read_share, _RATE, 0.0),
    "token_warmup_min": SubsetKey(_from_zero, _COUNT, 1),
    "token_warmup_step": SubsetKey(_not_negative, "a number of steps, or below 1 a share of all steps", 0.0),
    # pictures that change
    "color_aug": SubsetKey(read_yes_no, _YES, False),
    "flip_aug": SubsetKey(read_yes_no, _YES, False),
    "random_crop": SubsetKey(read_yes_no, _YES, False),
    "face_crop_aug_range": SubsetKey(
        _range, 'two ascending numbers above 0, such as "2.0,4.0": sides of the crop in faces', None
    ),
}
# other names of keys, as the guides, or their scripts, spell them
OTHER_NAMES: Mapping[str, str] = {
    "interpolation_type": "resize_interpolation",
    "caption_extention": "caption_extension",
}
