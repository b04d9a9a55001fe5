"""Options of image trainers that describe a data set without a TOML file, or what a TOML file leaves out."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from modules.errors import OptionError
from modules.option_values import check_at_least, check_at_most, require
from modules.parser import add_unsupported

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area")
MOST_SIDE = 65_536  # pixels


@dataclass(frozen=True)
class SubsetOptions:
    """Data sets from folders or a JSON file, and values for whatever a subset does not say itself."""

    train_data_dir: Path | None  # with folders REPEATS_CLASS, or with the pictures of --in_json
    reg_data_dir: Path | None  # likewise, of regularisation pictures
    in_json: Path | None  # captions and tags by picture
    conditioning_data_dir: Path | None  # control pictures, by the names of those of --train_data_dir
    dataset_repeats: int  # of the pictures of --in_json
    resolution: str | None  # "512", or "WIDTH,HEIGHT"
    train_batch_size: int
    enable_bucket: bool
    min_bucket_reso: int
    max_bucket_reso: int
    bucket_reso_steps: int
    bucket_no_upscale: bool
    resize_interpolation: str | None  # None: area when shrinking, else lanczos
    cache_info: bool
    caption_extension: str
    caption_separator: str
    caption_prefix: str | None
    caption_suffix: str | None
    shuffle_caption: bool
    keep_tokens: int
    keep_tokens_separator: str
    secondary_separator: str | None
    enable_wildcard: bool
    token_warmup_min: int
    token_warmup_step: float  # steps, below 1 a share of the run
    caption_dropout_rate: float
    caption_dropout_every_n_epochs: int
    caption_tag_dropout_rate: float
    color_aug: bool
    flip_aug: bool
    random_crop: bool
    face_crop_aug_range: str | None  # "1.0,4.0"
    alpha_mask: bool
    masked_loss: bool  # the control picture is the mask of the loss
    prior_loss_weight: float
    debug_dataset: bool  # show the pictures and captions, and train nothing

    def __post_init__(self) -> None:
        for name in ("train_data_dir", "reg_data_dir", "conditioning_data_dir"):
            folder = getattr(self, name)
            if folder is not None and not folder.is_dir():
                raise OptionError(f"--{name} {folder}: no such folder")
        if self.in_json is not None and not self.in_json.is_file():
            raise OptionError(f"--in_json {self.in_json}: no such file")
        if self.train_data_dir is None:
            for name in ("reg_data_dir", "in_json", "conditioning_data_dir"):
                if getattr(self, name) is not None:
                    raise OptionError(f"--{name} goes with --train_data_dir: give the folder of the pictures")
        for name in ("dataset_repeats", "train_batch_size", "bucket_reso_steps", "token_warmup_min"):
            check_at_least(f"--{name}", getattr(self, name), 1, "leave it out for the default")
        for name in ("min_bucket_reso", "max_bucket_reso"):
            check_at_least(f"--{name}", getattr(self, name), 1, "pixels of a side")
            check_at_most(f"--{name}", getattr(self, name), MOST_SIDE, "pixels of a side")
        if self.min_bucket_reso > self.max_bucket_reso:
            raise OptionError(
                f"--min_bucket_reso {self.min_bucket_reso} is above --max_bucket_reso {self.max_bucket_reso}"
            )
        for name in ("keep_tokens", "token_warmup_step", "caption_dropout_every_n_epochs"):
            check_at_least(f"--{name}", getattr(self, name), 0, "0 turns it off")
        for name in ("caption_dropout_rate", "caption_tag_dropout_rate"):
            check_at_least(f"--{name}", getattr(self, name), 0, "a share from 0 to 1")
            check_at_most(f"--{name}", getattr(self, name), 1, "a share from 0 to 1")
        check_at_least("--prior_loss_weight", self.prior_loss_weight, 0, "1 is usual")
        _ = self.size, self.face_crop_range
        if self.replaces_toml:
            require(self.resolution, "--resolution", "the size of the pictures, such as 1024 or 768,1024")

    @property
    def replaces_toml(self) -> bool:
        """Return whether the options say where the pictures are."""
        return self.train_data_dir is not None

    @property
    def size(self) -> tuple[int, int] | None:
        """Return width and height of --resolution; None if it is not given."""
        if self.resolution is None:
            return None
        sides = [text.strip() for text in self.resolution.split(",")]
        if not all(side.isdecimal() and 0 < int(side) <= MOST_SIDE for side in sides) or len(sides) > 2:
            raise OptionError(f"--resolution {self.resolution}: give 512, or width and height, as 768,1024")
        return int(sides[0]), int(sides[-1])

    @property
    def face_crop_range(self) -> tuple[float, float] | None:
        """Return both numbers of --face_crop_aug_range; None if it is not given."""
        if self.face_crop_aug_range is None:
            return None
        try:
            least, most = (float(text) for text in self.face_crop_aug_range.split(","))
        except ValueError:
            least, most = 1.0, 0.0
        if not 0 < least <= most:
            raise OptionError(
                f"--face_crop_aug_range {self.face_crop_aug_range}: give two numbers, the smaller one first, "
                "as 2.0,4.0"
            )
        return least, most


def add_subset_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `SubsetOptions`."""
    group = parser.add_argument_group("data sets without a TOML file")
    group.add_argument(
        "--train_data_dir", help="folder with folders REPEATS_CLASS of pictures, or the pictures of --in_json"
    )
    group.add_argument("--reg_data_dir", help="folder with folders REPEATS_CLASS of regularisation pictures")
    group.add_argument("--in_json", help="JSON file with caption and tags of each picture")
    group.add_argument(
        "--conditioning_data_dir", help="control pictures, named like the pictures of --train_data_dir"
    )
    group.add_argument("--dataset_repeats", type=int, default=1, help="repeats of the pictures of --in_json")
    add_unsupported(
        group,
        "--dataset_class",
        reason="it names code to run; describe the data in --dataset_config",
        help="Python class of a data set",
    )
    group = parser.add_argument_group("what a TOML file of data sets does not say")
    group.add_argument("--resolution", help="size in pixels: 512, or WIDTH,HEIGHT")
    group.add_argument("--train_batch_size", type=int, default=1, help="pictures of a batch")
    _add_bucket_arguments(group)
    _add_caption_arguments(group)
    group.add_argument("--color_aug", action="store_true", help="vary hue and gamma; not with cached latents")
    group.add_argument("--flip_aug", action="store_true", help="mirror half of the pictures")
    group.add_argument(
        "--random_crop", action="store_true", help="crop at a random place; not with cached latents"
    )
    group.add_argument(
        "--face_crop_aug_range", help="crop to a multiple of the face, as 2.0,4.0; faces stand in file names"
    )
    group.add_argument("--alpha_mask", action="store_true", help="transparent parts are not learned")
    group.add_argument(
        "--masked_loss", action="store_true", help="the control picture says which parts are learned"
    )
    group.add_argument(
        "--prior_loss_weight", type=float, default=1.0, help="factor on the loss of regularisation pictures"
    )
    group.add_argument(
        "--debug_dataset",
        action="store_true",
        help="show each picture and caption as it may be trained, in windows or else as files; train nothing",
    )
    group.add_argument("--cache_info", action="store_true", help="remember captions and sizes in the folders")


def _add_bucket_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--enable_bucket", action="store_true", help="sort pictures into sizes by their shape")
    group.add_argument("--min_bucket_reso", type=int, default=256, help="shortest side of a bucket, pixels")
    group.add_argument("--max_bucket_reso", type=int, default=1024, help="longest side of a bucket, pixels")
    group.add_argument("--bucket_reso_steps", type=int, default=64, help="sides are multiples of this")
    group.add_argument("--bucket_no_upscale", action="store_true", help="make buckets that enlarge nothing")
    group.add_argument(
        "--resize_interpolation", choices=INTERPOLATIONS, help="default: area to shrink, lanczos to enlarge"
    )


def _add_caption_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--caption_extension", default=".caption", help="ending of caption files")
    group.add_argument("--caption_extention", help="another spelling of --caption_extension")
    group.add_argument("--caption_separator", default=",", help="what separates the parts of a caption")
    group.add_argument("--caption_prefix", help="text in front of every caption")
    group.add_argument("--caption_suffix", help="text behind every caption")
    group.add_argument("--shuffle_caption", action="store_true", help="shuffle the parts of captions")
    group.add_argument("--keep_tokens", type=int, default=0, help="parts in front that stay in place")
    group.add_argument(
        "--keep_tokens_separator", default="", help="separates what stays from what is shuffled"
    )
    group.add_argument("--secondary_separator", help="joins what is shuffled and dropped as one part")
    group.add_argument(
        "--enable_wildcard", action="store_true", help="draw one of {a|b} and of several lines"
    )
    group.add_argument("--token_warmup_min", type=int, default=1, help="parts that are there from the start")
    group.add_argument(
        "--token_warmup_step",
        type=float,
        default=0,
        help="until when all parts are there: a step, or a share of the run below 1",
    )
    group.add_argument("--caption_dropout_rate", type=float, default=0.0, help="share of empty captions")
    group.add_argument(
        "--caption_dropout_every_n_epochs",
        type=int,
        default=0,
        help="every so many epochs have empty captions",
    )
    group.add_argument(
        "--caption_tag_dropout_rate", type=float, default=0.0, help="share of a caption's parts left out"
    )
