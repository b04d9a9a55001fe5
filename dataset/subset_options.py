"""Keys of dataset files in the layout of sd-scripts, and the options that replace keys or the whole file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dataset import config_keys as forms
from dataset import timestep_keys as levels
from modules.errors import OptionError
from modules.option_values import JOINED, require
from modules.options import Options, option, unsupported

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area")
MAX_SIDE = 65_536  # pixels
A_SHARE = "a share from 0 to 1"
MAX_ATTRIBUTES = 100

# common value of keep_tokens_separator, behind tags that stay in front, and before those that stay at the end
KEEP_TOKENS_SEPARATOR = "|||"


def _two_numbers(value: Any) -> tuple[float, float]:
    """Read "1.5,4.0" or [1.5, 4.0] as two ascending numbers. Raises InvalidValue for other values."""
    parts = value.split(",") if isinstance(value, str) else value
    try:
        low, high = (float(part) for part in parts)
    except (TypeError, ValueError):
        raise forms.InvalidValue from None
    if not 0 < low <= high <= 1000:
        raise forms.InvalidValue
    return low, high


# where a key may be: in a subset; in a subset, [[datasets]] or [general]; in [[datasets]] or [general]
SUBSET, ANYWHERE, DATASET = "subset", "anywhere", "dataset"
SAME = "same"  # the table's field has the name of the key


class SubsetKey(NamedTuple):
    """A key of the sd-scripts dataset layout with subsets."""

    value_type: forms.ValueType  # type of its value
    default: Any
    level: str = ANYWHERE  # SUBSET, ANYWHERE or DATASET
    # field of the `DatasetTable` that gets the value: `name`, `changes.name`, `augmentation.name`,
    # `rule.name`, or SAME; "": the value is converted first
    field: str = ""
    # command-line option whose value is used if no table has the key; None: the option of the same name;
    # "": there is none
    option: str | None = None


# dataset files allow more values than the option
_INTERPOLATION = forms.one_of((*INTERPOLATIONS, "box", "lanczos4"))
_SEPARATOR = forms.make_value_type(
    str, lambda value: bool(value) and forms.is_short(value), forms.TEXT.allowed
)
_SEED = forms.make_value_type(int, lambda value: -(2**63) <= value < 2**64, "a whole number")
_LOSS_WEIGHT = forms.number(
    lambda value: 0 <= value <= forms.MAX_WEIGHT, f"a number from 0 to {forms.MAX_WEIGHT}"
)
_UNTIL = forms.number(lambda value: 0 <= value < 10**9, "a number of steps, or below 1 a share of all steps")
_STRENGTH = forms.number(
    lambda value: value == 1, "1.0; another strength of the LoRA for one dataset is not supported"
)
_ATTRIBUTES = forms.make_value_type(dict, lambda value: len(value) <= MAX_ATTRIBUTES, "a table of keys")
FACES = forms.ValueType(
    _two_numbers, 'two ascending numbers above 0, such as "2.0,4.0": sides of the crop in faces'
)

SUBSET_KEYS: Mapping[str, SubsetKey] = {
    # where images are
    "image_dir": SubsetKey(forms.PATH, None, SUBSET, field="", option=""),
    "metadata_file": SubsetKey(forms.PATH, None, SUBSET, field=SAME, option=""),
    "conditioning_data_dir": SubsetKey(forms.PATH, None, SUBSET, "conditioning_directory"),
    "mask_directory": SubsetKey(forms.PATH, None, SUBSET, field=SAME, option=""),
    "cache_directory": SubsetKey(forms.PATH, None, SUBSET, field=SAME, option=""),
    "cache_format": SubsetKey(forms.CACHE_FORMAT, "files", ANYWHERE, field=SAME, option=""),
    "is_reg": SubsetKey(forms.YES_NO, False, SUBSET, field=SAME, option=""),
    "class_tokens": SubsetKey(forms.TEXT, None, SUBSET, field=SAME, option=""),
    "cache_info": SubsetKey(forms.YES_NO, False),
    "custom_attributes": SubsetKey(_ATTRIBUTES, {}, ANYWHERE, field="", option=""),
    # --dataset_repeats is of --in_json alone
    "num_repeats": SubsetKey(forms.REPEATS, 1, ANYWHERE, field=SAME, option=""),
    # sizes
    "resolution": SubsetKey(forms.SIZE, None, DATASET, SAME),
    "batch_size": SubsetKey(forms.COUNT, 1, DATASET, field=SAME, option="train_batch_size"),
    "enable_bucket": SubsetKey(forms.YES_NO, False, DATASET, SAME),
    "min_bucket_reso": SubsetKey(forms.SIDE, 256, DATASET, "rule.minimum"),
    "max_bucket_reso": SubsetKey(forms.SIDE, 1024, DATASET, "rule.maximum"),
    "bucket_reso_steps": SubsetKey(forms.SIDE, 64, DATASET, "rule.step"),
    "bucket_no_upscale": SubsetKey(forms.YES_NO, False, DATASET, SAME),
    "resize_interpolation": SubsetKey(_INTERPOLATION, None, ANYWHERE, "rule.interpolation"),
    "network_multiplier": SubsetKey(_STRENGTH, 1.0, DATASET, field="", option=""),
    # loss and validation
    "prior_loss_weight": SubsetKey(_LOSS_WEIGHT, 1.0, ANYWHERE, SAME),
    "alpha_mask": SubsetKey(forms.YES_NO, False, ANYWHERE, SAME),
    # for all subsets of a dataset, because they share batches, and a batch has one range of noise levels
    "min_timestep": SubsetKey(levels.LOW, None, DATASET, field=SAME, option=""),
    "max_timestep": SubsetKey(levels.HIGH, None, DATASET, field=SAME, option=""),
    "discrete_flow_shift": SubsetKey(levels.SHIFT, None, DATASET, field=SAME, option=""),
    "validation_split": SubsetKey(forms.SHARE, None, ANYWHERE, field=SAME, option=""),
    "validation_seed": SubsetKey(_SEED, None, ANYWHERE, field=SAME, option=""),
    # captions
    "caption_extension": SubsetKey(forms.EXTENSION, ".caption", ANYWHERE, SAME),
    "shuffle_caption": SubsetKey(forms.YES_NO, False, ANYWHERE, "changes.shuffle"),
    "caption_separator": SubsetKey(_SEPARATOR, ",", ANYWHERE, "changes.separator"),
    "keep_tokens": SubsetKey(forms.FROM_ZERO, 0, ANYWHERE, "changes.keep_tokens"),
    "keep_tokens_separator": SubsetKey(forms.TEXT, "", ANYWHERE, "changes.keep_tokens_separator"),
    "secondary_separator": SubsetKey(forms.TEXT, "", ANYWHERE, "changes.secondary_separator"),
    "enable_wildcard": SubsetKey(forms.YES_NO, False, ANYWHERE, "changes.wildcards"),
    "trigger_word": SubsetKey(forms.WORDS, "", ANYWHERE, field=SAME, option=""),
    "caption_prefix": SubsetKey(forms.WORDS, "", ANYWHERE, SAME),
    "caption_suffix": SubsetKey(forms.WORDS, "", ANYWHERE, SAME),
    "caption_dropout_rate": SubsetKey(forms.SHARE, 0.0, ANYWHERE, SAME),
    "caption_dropout_every_n_epochs": SubsetKey(
        forms.FROM_ZERO, 0, ANYWHERE, "changes.dropout_every_n_epochs"
    ),
    "caption_tag_dropout_rate": SubsetKey(forms.SHARE, 0.0, ANYWHERE, "changes.part_dropout_rate"),
    "token_warmup_min": SubsetKey(forms.FROM_ZERO, 1, ANYWHERE, "changes.warmup_min"),
    "token_warmup_step": SubsetKey(_UNTIL, 0.0, ANYWHERE, "changes.warmup_step"),
    # images that change
    "flip_aug": SubsetKey(forms.YES_NO, False, ANYWHERE, "augmentation.flip"),
    "color_aug": SubsetKey(forms.YES_NO, False, ANYWHERE, "augmentation.color"),
    "random_crop": SubsetKey(forms.YES_NO, False, ANYWHERE, "augmentation.random_crop"),
    "face_crop_aug_range": SubsetKey(FACES, None, ANYWHERE, "augmentation.face_crop_range"),
}
# other spellings of keys in sd-scripts and in guides -> our keys
OTHER_NAMES: Mapping[str, str] = {
    "interpolation_type": "resize_interpolation",
    "caption_extention": "caption_extension",
}


# --- options
# ------------------------------------------------------------------------------------------------------------


class SubsetOptions(Options, title="data sets without a TOML file"):
    """Options that replace a dataset file (folders or a JSON file), or set keys that it lacks."""

    train_data_dir: Path | None = option(
        "folder with folders REPEATS_CLASS of images, or the images of --in_json",
        place="folder",
        often=True,
    )
    reg_data_dir: Path | None = option(
        "folder with folders REPEATS_CLASS of regularization images", place="folder", needs="train_data_dir"
    )
    in_json: Path | None = option(
        "JSON file with caption and tags of each image", place="file", needs="train_data_dir"
    )
    conditioning_data_dir: Path | None = option(
        "control images, named like the images of --train_data_dir",
        place="folder",
        needs="train_data_dir",
    )
    dataset_repeats: int = option(
        "repeats of the images of --in_json", default=1, minimum=1, ignored_without="in_json"
    )
    dataset_class = unsupported(
        "it names code to run; describe the data in --dataset_config", "Python class of a data set", type=str
    )
    resolution: str | None = option("size in pixels: 512, or WIDTH,HEIGHT", often=True)
    train_batch_size: int = option("number of images in a batch", default=1, minimum=1)
    enable_bucket: bool = option("sort images into buckets by aspect ratio", often=True)
    min_bucket_reso: int = option(
        "shortest side of a bucket, pixels", default=256, minimum=1, maximum=MAX_SIDE
    )
    max_bucket_reso: int = option(
        "longest side of a bucket, pixels", default=1024, minimum=1, maximum=MAX_SIDE
    )
    bucket_reso_steps: int = option("sides are multiples of this", default=64, minimum=1)
    bucket_no_upscale: bool = option("create buckets that do not enlarge images")
    resize_interpolation: str | None = option(
        "default: area to shrink, lanczos to enlarge", choices=INTERPOLATIONS
    )
    cache_info: bool = option("remember captions and sizes in the folders")
    caption_extension: str = option("ending of caption files", default=".caption", often=True)
    caption_separator: str = option("what separates the parts of a caption", default=",")
    caption_prefix: str | None = option("text in front of every caption")
    caption_suffix: str | None = option("text behind every caption")
    shuffle_caption: bool = option("shuffle the parts of captions")
    keep_tokens: int = option("number of tags at the start that keep their position", default=0, minimum=0)
    keep_tokens_separator: str = option("separator between the fixed and the shuffled tags", default="")
    secondary_separator: str | None = option("joins what is shuffled and dropped as one part")
    enable_wildcard: bool = option("draw one of {a|b} and of several lines")
    token_warmup_min: int = option("parts that are there from the start", default=1, minimum=1)
    token_warmup_step: float = option(
        "when all tags are present: a step, or a fraction of the run below 1", default=0, minimum=0
    )
    caption_dropout_rate: float = option(
        "fraction of empty captions", default=0.0, minimum=0, maximum=1, hint=A_SHARE
    )
    caption_dropout_every_n_epochs: int = option(
        "one epoch in every N has empty captions", default=0, minimum=0, hint="0: none"
    )
    caption_tag_dropout_rate: float = option(
        "fraction of the tags of a caption that is dropped", default=0.0, minimum=0, maximum=1, hint=A_SHARE
    )
    color_aug: bool = option("vary hue and gamma; not with cached latents")
    flip_aug: bool = option("flip half of the images horizontally")
    random_crop: bool = option("crop at a random position; not with cached latents")
    face_crop_aug_range: str | None = option(
        "crop to a multiple of the face, as 2.0,4.0; faces are in file names"
    )
    alpha_mask: bool = option("transparent parts are not learned")
    masked_loss: bool = option("use the control image as the mask of the loss")
    prior_loss_weight: float = option(
        "factor on the loss of regularization images", default=1.0, minimum=0, hint="1 is usual"
    )
    debug_dataset: bool = option(
        "show each image and caption as it may be trained, in windows or else as files; train nothing"
    )

    def __post_init__(self) -> None:
        if self.min_bucket_reso > self.max_bucket_reso:
            raise OptionError(
                f"--min_bucket_reso {self.min_bucket_reso} is above --max_bucket_reso {self.max_bucket_reso}"
            )
        _ = self.size  # a property that raises OptionError if --resolution cannot be read
        try:
            if self.face_crop_aug_range is not None:
                FACES.read(self.face_crop_aug_range)
        except forms.InvalidValue:
            raise OptionError(
                f"--face_crop_aug_range {self.face_crop_aug_range}: use two numbers, the smaller one first, "
                "as 2.0,4.0"
            ) from None
        # without a dataset file, the resolution has to come from the option
        if self.replaces_toml:
            require(self.resolution, "--resolution", "the size of the images, such as 1024 or 768,1024")

    @property
    def replaces_toml(self) -> bool:
        """Whether the options replace the dataset file: they name the folders or the JSON file themselves."""
        return self.train_data_dir is not None

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height from --resolution; None if it is not given."""
        if self.resolution is None:
            return None
        sides = [text.strip() for text in self.resolution.split(",")]
        are_valid = all(side.isdecimal() and 0 < int(side) <= MAX_SIDE for side in sides)
        if not are_valid or len(sides) > 2:
            joined = JOINED.fullmatch(self.resolution)  # such as 768x1024
            example = f"{joined[1]},{joined[3]}" if joined is not None else "768,1024"
            raise OptionError(f"--resolution {self.resolution}: pass 512, or width and height, as {example}")
        return int(sides[0]), int(sides[-1])  # a single number is both
