"""Options of image trainers that describe a data set without a TOML file, or complete one."""

from pathlib import Path

from dataset.config_keys import FACES, Unfit
from modules.errors import OptionError
from modules.option_values import JOINED, require
from modules.options import Options, option, unsupported

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area")
MOST_SIDE = 65_536  # pixels
A_SHARE = "a share from 0 to 1"


class SubsetOptions(Options, title="data sets without a TOML file"):
    """Data sets from folders or a JSON file, and values for whatever a subset does not say itself."""

    train_data_dir: Path | None = option(
        "folder with folders REPEATS_CLASS of pictures, or the pictures of --in_json",
        place="folder",
        often=True,
    )
    reg_data_dir: Path | None = option(
        "folder with folders REPEATS_CLASS of regularisation pictures",
        place="folder",
        needs="train_data_dir",
    )
    in_json: Path | None = option(
        "JSON file with caption and tags of each picture", place="file", needs="train_data_dir"
    )
    conditioning_data_dir: Path | None = option(
        "control pictures, named like the pictures of --train_data_dir",
        place="folder",
        needs="train_data_dir",
    )
    dataset_repeats: int = option("repeats of the pictures of --in_json", default=1, least=1)
    dataset_class = unsupported(
        "it names code to run; describe the data in --dataset_config", "Python class of a data set", type=str
    )
    resolution: str | None = option("size in pixels: 512, or WIDTH,HEIGHT", often=True)
    train_batch_size: int = option("pictures of a batch", default=1, least=1)
    enable_bucket: bool = option("sort pictures into sizes by their shape", often=True)
    min_bucket_reso: int = option("shortest side of a bucket, pixels", default=256, least=1, most=MOST_SIDE)
    max_bucket_reso: int = option("longest side of a bucket, pixels", default=1024, least=1, most=MOST_SIDE)
    bucket_reso_steps: int = option("sides are multiples of this", default=64, least=1)
    bucket_no_upscale: bool = option("make buckets that enlarge nothing")
    resize_interpolation: str | None = option(
        "default: area to shrink, lanczos to enlarge", choices=INTERPOLATIONS
    )
    cache_info: bool = option("remember captions and sizes in the folders")
    caption_extension: str = option("ending of caption files", default=".caption", often=True)
    caption_separator: str = option("what separates the parts of a caption", default=",")
    caption_prefix: str | None = option("text in front of every caption")
    caption_suffix: str | None = option("text behind every caption")
    shuffle_caption: bool = option("shuffle the parts of captions")
    keep_tokens: int = option("parts in front that stay in place", default=0, least=0)
    keep_tokens_separator: str = option("separates what stays from what is shuffled", default="")
    secondary_separator: str | None = option("joins what is shuffled and dropped as one part")
    enable_wildcard: bool = option("draw one of {a|b} and of several lines")
    token_warmup_min: int = option("parts that are there from the start", default=1, least=1)
    token_warmup_step: float = option(
        "until when all parts are there: a step, or a share of the run below 1", default=0, least=0
    )
    caption_dropout_rate: float = option(
        "share of empty captions", default=0.0, least=0, most=1, hint=A_SHARE
    )
    caption_dropout_every_n_epochs: int = option(
        "every so many epochs have empty captions", default=0, least=0, hint="0: none"
    )
    caption_tag_dropout_rate: float = option(
        "share of a caption's parts left out", default=0.0, least=0, most=1, hint=A_SHARE
    )
    color_aug: bool = option("vary hue and gamma; not with cached latents")
    flip_aug: bool = option("mirror half of the pictures")
    random_crop: bool = option("crop at a random place; not with cached latents")
    face_crop_aug_range: str | None = option(
        "crop to a multiple of the face, as 2.0,4.0; faces stand in file names"
    )
    alpha_mask: bool = option("transparent parts are not learned")
    masked_loss: bool = option("the control picture says which parts are learned")
    prior_loss_weight: float = option(
        "factor on the loss of regularisation pictures", default=1.0, least=0, hint="1 is usual"
    )
    debug_dataset: bool = option(
        "show each picture and caption as it may be trained, in windows or else as files; train nothing"
    )

    def __post_init__(self) -> None:
        if self.min_bucket_reso > self.max_bucket_reso:
            raise OptionError(
                f"--min_bucket_reso {self.min_bucket_reso} is above --max_bucket_reso {self.max_bucket_reso}"
            )
        _ = self.size  # which may be wrong
        try:
            if self.face_crop_aug_range is not None:
                FACES.read(self.face_crop_aug_range)
        except Unfit:
            raise OptionError(
                f"--face_crop_aug_range {self.face_crop_aug_range}: give two numbers, the smaller one first, "
                "as 2.0,4.0"
            ) from None
        if self.replaces_toml:
            require(self.resolution, "--resolution", "the size of the pictures, such as 1024 or 768,1024")

    @property
    def replaces_toml(self) -> bool:
        return self.train_data_dir is not None

    @property
    def size(self) -> tuple[int, int] | None:
        """Return width and height of --resolution; None if it is not given."""
        if self.resolution is None:
            return None
        sides = [text.strip() for text in self.resolution.split(",")]
        if not all(side.isdecimal() and 0 < int(side) <= MOST_SIDE for side in sides) or len(sides) > 2:
            joined = JOINED.fullmatch(self.resolution)
            example = f"{joined[1]},{joined[3]}" if joined is not None else "768,1024"
            raise OptionError(f"--resolution {self.resolution}: give 512, or width and height, as {example}")
        return int(sides[0]), int(sides[-1])
