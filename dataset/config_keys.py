"""The keys of dataset configurations: how a value is read, which are allowed, and the keys of subsets.

A key is declared once: those of a `[[datasets]]` table as fields of `DatasetTable` (dataset/table.py), those
of the image guides' form in `SUBSET_KEYS` below. Standard library only.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from modules.paths import expand_path, explain_path, is_address, path_exists
from modules.text_files import bad_character

# of frame_extraction; what they do: dataset/sources/frames.py
MODES = ("head", "chunk", "slide", "uniform", "full")
CACHE_FORMATS = ("files", "shards", "npz")
# of audio: a clip without sound is a fault, or silent; or sound is of no interest
REQUIRED, IF_PRESENT, IGNORE = "required", "if_present", "ignore"
INTERPOLATIONS = (
    *("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"),
    *("box", "lanczos4"),  # of configurations; the option has the others
)
AUTO = "auto"  # as source_fps: the times of the frames in each clip's file
# beyond these a number is a slip of the finger, or meant to fill the memory
FAR = 10_000  # latent frames; places in time stay far below
MOST_COUNT = 10**9
MOST_REPEATS = 100_000
MOST_SAMPLES = 10_000  # spans of a clip
MOST_WEIGHT = 100
MOST_WORDS = 2000  # characters of trigger_word, caption_prefix and caption_suffix
MOST_ATTRIBUTES = 100
LONGEST_SIDE = 16_384  # pixels
MOST_PIXELS = 7680 * 4320  # of `resolution`; models are trained on up to 2 million
RATES = (0.001, 1_000_000)  # frames a second


class Unfit(Exception):
    """The value is not allowed; the text, if there is one, says why."""


class Form(NamedTuple):
    """What a key may be. read: converts the value, or raises Unfit. allowed: the allowed values, in words."""

    read: Callable[[Any], Any]
    allowed: str


def _form(
    kinds: type | tuple[type, ...],
    fits: Callable[[Any], bool],
    allowed: str,
    convert: Callable[[Any], Any] = lambda value: value,
) -> Form:
    """Return the form of values of some types. fits: whether one of them is allowed."""

    def read(value: Any) -> Any:
        is_switch = isinstance(value, bool) and kinds is not bool
        if is_switch or not isinstance(value, kinds) or not fits(value):
            raise Unfit
        return convert(value)

    return Form(read, allowed)


def _whole(least: int, most: int, allowed: str = "") -> Form:
    limit = f"{least} or more" + (f", at most {most}" if most < MOST_COUNT else "")
    return _form(int, lambda value: least <= value <= most, allowed or f"a whole number, {limit}")


def _number(fits: Callable[[float], bool], allowed: str) -> Form:
    return _form((int, float), fits, allowed, float)


def _one_of(values: tuple[str, ...]) -> Form:
    return _form(str, lambda value: value in values, "one of " + ", ".join(f'"{one}"' for one in values))


def _list_of(form: Form, allowed: str, or_one: bool = False) -> Form:
    """Return the form of a list of at least one value. or_one: a single value may stand without its list."""

    def read(value: Any) -> tuple[Any, ...]:
        value = [value] if or_one and not isinstance(value, list) else value
        if not isinstance(value, list) or not value:
            raise Unfit
        return tuple(map(form.read, value))

    return Form(read, allowed)


def _path(value: str) -> Path:
    try:
        path = expand_path(value)
    except ValueError as error:
        raise Unfit(str(error)) from None
    why = None if path_exists(path) else explain_path(value)
    if why is not None:
        raise Unfit(why)
    return path


def _size(value: Any) -> tuple[int, int]:
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2:
        raise Unfit
    width, height = map(SIDE.read, sides)
    if width * height > MOST_PIXELS:
        raise Unfit
    return width, height


def _two_numbers(value: Any) -> tuple[float, float]:
    """Return two ascending numbers of "1.5,4.0" or [1.5, 4.0]."""
    parts = value.split(",") if isinstance(value, str) else value
    try:
        low, high = (float(part) for part in parts)
    except (TypeError, ValueError):
        raise Unfit from None
    if not 0 < low <= high <= 1000:
        raise Unfit
    return low, high


def _is_text(value: str) -> bool:
    return bool(value.strip()) and not bad_character(value)


def _is_short(value: str) -> bool:
    return len(value) <= MOST_WORDS and not bad_character(value)


YES_NO = _form(bool, lambda _: True, "true or false, without quotes")
NO_LAYERS = _form(bool, lambda value: not value, "false; the layers of Qwen-Image-Layered are not supported")
COUNT = _whole(1, MOST_COUNT)
REPEATS = _whole(1, MOST_REPEATS)
SAMPLES = _whole(1, MOST_SAMPLES)
FROM_ZERO = _whole(0, MOST_REPEATS, "a whole number, 0 or more")
SIDE = _whole(1, LONGEST_SIDE, "a whole number of pixels, 1 or more")
PLACE = _whole(1 - FAR, FAR - 1, f"a whole number below {FAR}")
PLACES = _list_of(PLACE, f"a list of whole numbers below {FAR}, such as [0, 10]")
COUNTS = _list_of(COUNT, "a list of whole numbers, each 1 or more, such as [1, 25, 49]")
SHARE = _number(lambda value: 0 <= value <= 1, "a number from 0 to 1, such as 0.1")
WEIGHT = _number(
    lambda value: 0 < value <= MOST_WEIGHT, f"a number above 0, at most {MOST_WEIGHT}, such as 0.5"
)
RATE = _number(
    lambda value: RATES[0] <= value <= RATES[1],
    f'"{AUTO}", or a number above 0, such as 30 or 29.97 ({RATES[0]} to {RATES[1]})',
)
SOURCE_FPS = Form(lambda value: AUTO if value == AUTO else RATE.read(value), RATE.allowed)
SIZE = Form(
    _size,
    f"a whole number or [width, height], such as 512 or [960, 544], each at most {LONGEST_SIDE}, "
    f"together at most {MOST_PIXELS:,} pixels",
)
MODE, CACHE_FORMAT = _one_of(MODES), _one_of(CACHE_FORMATS)
AUDIO = _one_of((REQUIRED, IF_PRESENT, IGNORE))
PATH = _form(str, _is_text, "a path in quotes", _path)
LIST_PATH = _form(
    str,
    lambda value: _is_text(value) and not is_address(value),
    "a path in quotes, not an address: download the list or table itself first",
    _path,
)
COLUMN = _form(str, _is_text, "the name of a column in quotes")
TARS = _list_of(
    _form(str, _is_text, ""), 'a path in quotes, such as "clips-*.tar", or a list of them', or_one=True
)
EXTENSION = _form(
    str, lambda value: _is_text(value) and "." in value, 'an extension with its dot, such as ".txt"'
)
# an empty one overrides [general]
WORDS = _form(
    str,
    lambda value: _is_short(value) and len(value.splitlines()) < 2,
    f"text in quotes, one line of at most {MOST_WORDS} characters",
    str.strip,
)
TEXT = _form(str, _is_short, f"text in quotes, at most {MOST_WORDS} characters")


# --- keys of a [[datasets]] table
# ------------------------------------------------------------------------------------------------------------

BOTH = ("image", "video")


@dataclasses.dataclass(frozen=True)
class TableKey:
    """One key of a table. kinds: of tables that may have it. only_with: ends of the keys of sources that its
    table has to have; (): any.
    """

    form: Form
    default: Any
    kinds: tuple[str, ...] = BOTH
    in_general: bool = False
    only_with: tuple[str, ...] = ()


def key(form: Form, default: Any = None, **facts: Any) -> Any:
    """Return a field of `DatasetTable` that is a key of its own name. facts: of `TableKey`."""
    return dataclasses.field(default=default, metadata={"key": TableKey(form, default, **facts)})


def of_kind(form: Form) -> Any:
    """Return a field that is set by `image_<name>` or `video_<name>`."""
    return dataclasses.field(default=None, metadata={"source": form})


# keys as other tuners spell them, mostly for one model
SPELLINGS: Mapping[str, str] = {
    "loss_mask_directory": "mask_directory",
    "loss_mask_use_alpha": "alpha_mask",
    "flux_kontext_no_resize_control": "no_resize_control",
    "qwen_image_edit_no_resize_control": "no_resize_control",
    "qwen_image_edit_control_resolution": "control_resolution",
}


# keys of musubi-tuner's fork for LTX-2 that have no counterpart, and why
SOUND_ALONE = "sound alone is not built. In a table of clips, audio_directory or audio_path names their sound"
_REFERENCES = (
    "clips, pictures and sounds as references (IC-LoRA) are not built. control_directory holds what "
    "Fun-Control follows, or the pictures that a model edits"
)
NO_KEYS: Mapping[str, str] = {
    "target_fps": 'clips are learned at the rate of their model: source_fps = "auto" takes the frames that '
    "are shown at it; without source_fps all frames are used, and LTX-2 is told the rate of each clip. --fps "
    "is the rate of what is generated",
    **dict.fromkeys(("audio_jsonl_file", "audio_bucket_strategy", "audio_bucket_interval"), SOUND_ALONE),
    **dict.fromkeys(
        (
            *("reference_directory", "reference_cache_directory", "reference_audio_directory"),
            "reference_audio_cache_directory",
        ),
        _REFERENCES,
    ),
    "separate_audio_buckets": "clips without sound leave the sound of others in their batch alone",
    "bucket_batch_sizes": "batch_size is that of all sizes; make a [[datasets]] table for each",
    **dict.fromkeys(
        ("default_loss_mask_path", "loss_mask_invert"),
        "masks are files in mask_directory, white is learned; an item without one is learned whole",
    ),
}


# --- keys of the image guides' form
# ------------------------------------------------------------------------------------------------------------

# where a key may stand: in a subset alone, in all of them, in [general] and [[datasets]]
SUBSET, ANYWHERE, DATASET = "subset", "anywhere", "dataset"
SAME = "same"  # the table's field has the name of the key


class SubsetKey(NamedTuple):
    """One key.

    field: where its value goes: of the table, or `changes.`, `augmentation.` or `buckets.` and its name;
    "": nowhere as it is. option: of the command line, whose value counts if no table has the key; None: that
    of its name, "": there is none.
    """

    form: Form
    default: Any
    place: str = ANYWHERE
    field: str = ""
    option: str | None = None


_INTERPOLATION = _one_of(INTERPOLATIONS)
_SEPARATOR = _form(str, lambda value: bool(value) and _is_short(value), TEXT.allowed)
_SEED = _form(int, lambda value: -(2**63) <= value < 2**64, "a whole number")
_LOSS_WEIGHT = _number(lambda value: 0 <= value <= MOST_WEIGHT, f"a number from 0 to {MOST_WEIGHT}")
_UNTIL = _number(lambda value: 0 <= value < 10**9, "a number of steps, or below 1 a share of all steps")
_STRENGTH = _number(
    lambda value: value == 1, "1.0; another strength of the LoRA for one dataset is not supported"
)
_ATTRIBUTES = _form(dict, lambda value: len(value) <= MOST_ATTRIBUTES, "a table of keys")
FACES = Form(_two_numbers, 'two ascending numbers above 0, such as "2.0,4.0": sides of the crop in faces')

SUBSET_KEYS: Mapping[str, SubsetKey] = {
    # where pictures are
    "image_dir": SubsetKey(PATH, None, SUBSET, "", ""),
    "metadata_file": SubsetKey(PATH, None, SUBSET, SAME, ""),
    "conditioning_data_dir": SubsetKey(PATH, None, SUBSET, "conditioning_directory"),
    "mask_directory": SubsetKey(PATH, None, SUBSET, SAME, ""),
    "cache_directory": SubsetKey(PATH, None, SUBSET, SAME, ""),
    "cache_format": SubsetKey(CACHE_FORMAT, "files", ANYWHERE, SAME, ""),
    "is_reg": SubsetKey(YES_NO, False, SUBSET, SAME, ""),
    "class_tokens": SubsetKey(TEXT, None, SUBSET, SAME, ""),
    "cache_info": SubsetKey(YES_NO, False),
    "custom_attributes": SubsetKey(_ATTRIBUTES, {}, ANYWHERE, SAME, ""),
    "num_repeats": SubsetKey(REPEATS, 1, ANYWHERE, SAME, ""),  # --dataset_repeats is of --in_json alone
    # sizes
    "resolution": SubsetKey(SIZE, None, DATASET, SAME),
    "batch_size": SubsetKey(COUNT, 1, DATASET, SAME, "train_batch_size"),
    "enable_bucket": SubsetKey(YES_NO, False, DATASET, SAME),
    "min_bucket_reso": SubsetKey(SIDE, 256, DATASET, "buckets.minimum"),
    "max_bucket_reso": SubsetKey(SIDE, 1024, DATASET, "buckets.maximum"),
    "bucket_reso_steps": SubsetKey(SIDE, 64, DATASET, "buckets.step"),
    "bucket_no_upscale": SubsetKey(YES_NO, False, DATASET, SAME),
    "resize_interpolation": SubsetKey(_INTERPOLATION, None, ANYWHERE, "buckets.interpolation"),
    "network_multiplier": SubsetKey(_STRENGTH, 1.0, DATASET, "", ""),
    # losses and validation
    "prior_loss_weight": SubsetKey(_LOSS_WEIGHT, 1.0, ANYWHERE, SAME),
    "alpha_mask": SubsetKey(YES_NO, False, ANYWHERE, SAME),
    "validation_split": SubsetKey(SHARE, None, ANYWHERE, SAME, ""),
    "validation_seed": SubsetKey(_SEED, None, ANYWHERE, SAME, ""),
    # captions
    "caption_extension": SubsetKey(EXTENSION, ".caption", ANYWHERE, SAME),
    "shuffle_caption": SubsetKey(YES_NO, False, ANYWHERE, "changes.shuffle"),
    "caption_separator": SubsetKey(_SEPARATOR, ",", ANYWHERE, "changes.separator"),
    "keep_tokens": SubsetKey(FROM_ZERO, 0, ANYWHERE, "changes.keep_tokens"),
    "keep_tokens_separator": SubsetKey(TEXT, "", ANYWHERE, "changes.keep_tokens_separator"),
    "secondary_separator": SubsetKey(TEXT, "", ANYWHERE, "changes.secondary_separator"),
    "enable_wildcard": SubsetKey(YES_NO, False, ANYWHERE, "changes.wildcards"),
    "caption_prefix": SubsetKey(WORDS, "", ANYWHERE, SAME),
    "caption_suffix": SubsetKey(WORDS, "", ANYWHERE, SAME),
    "caption_dropout_rate": SubsetKey(SHARE, 0.0, ANYWHERE, SAME),
    "caption_dropout_every_n_epochs": SubsetKey(FROM_ZERO, 0, ANYWHERE, "changes.dropout_every_n_epochs"),
    "caption_tag_dropout_rate": SubsetKey(SHARE, 0.0, ANYWHERE, "changes.part_dropout_rate"),
    "token_warmup_min": SubsetKey(FROM_ZERO, 1, ANYWHERE, "changes.warmup_min"),
    "token_warmup_step": SubsetKey(_UNTIL, 0.0, ANYWHERE, "changes.warmup_step"),
    # pictures that change
    "flip_aug": SubsetKey(YES_NO, False, ANYWHERE, "augmentation.flip"),
    "color_aug": SubsetKey(YES_NO, False, ANYWHERE, "augmentation.color"),
    "random_crop": SubsetKey(YES_NO, False, ANYWHERE, "augmentation.random_crop"),
    "face_crop_aug_range": SubsetKey(FACES, None, ANYWHERE, "augmentation.face_crop_range"),
}
# other names of keys, as the guides, or their scripts, spell them
OTHER_NAMES: Mapping[str, str] = {
    "interpolation_type": "resize_interpolation",
    "caption_extention": "caption_extension",
}
