"""A dataset table: one `[[datasets]]` entry of ours, or one subset of the image guides' form.

Standard library only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dataset.config_keys import CAPTION_DEFAULTS, LEARNING_DEFAULTS, SECTION_DEFAULTS
from dataset.subset_records import (
    NO_AUGMENTATION,
    PLAIN_CAPTIONS,
    Augmentation,
    BucketRule,
    CaptionChanges,
)
from modules.paths import hide_secrets

Table = Mapping[str, Any]

# fields of the records of subsets -> keys
CHANGE_KEYS = {
    "shuffle": "shuffle_caption",
    "separator": "caption_separator",
    "keep_tokens": "keep_tokens",
    "keep_tokens_separator": "keep_tokens_separator",
    "secondary_separator": "secondary_separator",
    "wildcards": "enable_wildcard",
    "dropout_every_n_epochs": "caption_dropout_every_n_epochs",
    "part_dropout_rate": "caption_tag_dropout_rate",
    "warmup_min": "token_warmup_min",
    "warmup_step": "token_warmup_step",
}
DRAW_KEYS = {
    "flip": "flip_aug",
    "color": "color_aug",
    "random_crop": "random_crop",
    "face_crop_range": "face_crop_aug_range",
}


@dataclass(frozen=True)
class DatasetTable:
    """One `[[datasets]]` entry with all defaults filled in, also of keys for the other kind of table."""

    config_path: Path
    index: int  # place in the file, from 0
    kind: Literal["image", "video"]
    # exactly one of these five is set, or metadata_file
    directory: Path | None  # image_directory or video_directory
    jsonl_file: Path | None  # image_jsonl_file or video_jsonl_file
    table_file: Path | None  # image_table_file or video_table_file
    tars: tuple[str, ...] | None  # image_tars or video_tars: paths, globs or addresses
    cogvideox_root: Path | None
    control_directory: Path | None
    cache_directory: Path
    cache_format: Literal["files", "shards", "npz"]
    resolution: tuple[int, int]  # width, height
    caption_extension: str | None
    trigger_word: str  # these three: "" for none
    caption_prefix: str
    caption_suffix: str
    multi_caption: bool  # each line of a caption file is a caption
    caption_dropout_rate: float
    batch_size: int
    num_repeats: int
    enable_bucket: bool
    bucket_no_upscale: bool  # always False if enable_bucket is False
    mask_directory: Path | None
    alpha_mask: bool  # transparent parts are not learned
    validation: bool  # not trained on
    prior_loss_weight: float  # factor on the loss of its items in training
    target_frames: tuple[int, ...]  # ascending, each 4n + 1
    frame_extraction: str
    frame_stride: int
    frame_sample: int
    max_frames: int
    source_fps: float | str | None  # AUTO: by the times in each file
    dataset_file: Path | None  # of cogvideox_root
    path_column: str | None  # of table_file; None: the usual names
    caption_column: str | None  # of table_file and cogvideox_root; None: the usual names
    video_column: str | None  # of cogvideox_root
    id_token: str  # of cogvideox_root; "" for none
    load_tensors: bool  # of cogvideox_root: latents are computed already
    allow_urls: bool  # sources may lie elsewhere
    download_directory: Path | None  # where these are kept; None: in the cache directory
    fp_latent_window_size: int
    fp_1f_clean_indices: tuple[int, ...] | None
    fp_1f_target_index: int | None
    fp_1f_no_post: bool
    # --- of a subset of the image guides' form; our own tables have the defaults
    group: int | None = None  # index of its dataset, whose subsets share batches; None: it shares none
    subset: int | None = None  # place in its dataset, from 0
    buckets: BucketRule | None = None  # None: buckets of video trainers
    changes: CaptionChanges = PLAIN_CAPTIONS
    augmentation: Augmentation = NO_AUGMENTATION
    is_reg: bool = False  # regularisation images: as many are trained as others of the group
    class_tokens: str | None = None  # caption of pictures without a caption file; None: they need one
    metadata_file: Path | None = None  # JSON that names pictures and captions
    image_folder: Path | None = None  # that the names in metadata_file are relative to
    # conditioning_data_dir as given: what it holds are masks (mask_directory) or control images
    # (control_directory)
    conditioning_directory: Path | None = None
    validation_split: float | None = None  # share that is not trained on; None: the command line says it
    validation_seed: int | None = None  # which ones; None: likewise
    custom_attributes: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def preserves_output(self) -> bool:
        """Return whether its items are to keep the base model's prediction."""
        return bool(self.custom_attributes.get("diff_output_preservation", False))

    @property
    def name(self) -> str:
        """Return the table's name for messages: `data.toml, [[datasets]] 2 (clips)`."""
        return f"{self.config_path}, {self.place} ({self.source})"

    @property
    def place(self) -> str:
        """Return where it is in its file: `[[datasets]] 2`, or `[[datasets]] 2, subset 1`."""
        if self.group is None or self.subset is None:
            return f"[[datasets]] {self.index + 1}"
        return f"[[datasets]] {self.group + 1}, subset {self.subset + 1}"

    @property
    def batch_group(self) -> int:
        """Return the common key of tables that share batches; in a file all have a group or none."""
        return self.index if self.group is None else self.group

    @property
    def source(self) -> Path:
        """Return the folder or list that the items come from; of tars the first name, without passwords."""
        source = self.directory or self.jsonl_file or self.table_file or self.cogvideox_root
        source = source or self.metadata_file
        if source is None:
            assert self.tars is not None
            source = Path(hide_secrets(self.tars[0]))
        return source

    @property
    def drops_captions(self) -> bool:
        """Return whether the empty prompt is trained too."""
        return self.caption_dropout_rate > 0 or self.changes.dropout_every_n_epochs > 0

    @property
    def picture_folder(self) -> Path:
        """Return the folder that its items, or their list, are in."""
        return self.directory or self.image_folder or self.source.parent

    @property
    def source_key(self) -> str:
        """Return which key of SOURCES the table has."""
        if self.cogvideox_root is not None:
            return "cogvideox_root"
        if self.metadata_file is not None:
            return "metadata_file"
        ends = ("directory", "jsonl_file", "table_file", "tars")
        return f"{self.kind}_{next(end for end in ends if getattr(self, end) is not None)}"

    @property
    def control_count(self) -> int:
        """Return how many control images an image has, if it has any."""
        return len(self.fp_1f_clean_indices) if self.fp_1f_clean_indices else 1

    @property
    def stated_fps(self) -> float | None:
        """Return source_fps if it is a number."""
        return None if isinstance(self.source_fps, str) else self.source_fps

    @property
    def section_keys(self) -> dict[str, Any]:
        """Return the keys of SECTION_DEFAULTS that are set to another value, as JSON values."""
        given = self._changed(SECTION_DEFAULTS)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}

    @property
    def caption_settings(self) -> dict[str, Any]:
        """Return the keys of CAPTION_DEFAULTS that are set to another value."""
        return self._changed(CAPTION_DEFAULTS)

    @property
    def learning_keys(self) -> dict[str, Any]:
        """Return the keys of LEARNING_DEFAULTS that are set to another value, as JSON values."""
        masks = {} if self.mask_directory is None else {"mask_directory": self.mask_directory.name}
        reg = {"is_reg": True} if self.is_reg else {}
        return self._changed(LEARNING_DEFAULTS) | masks | reg | self.changing_keys

    @property
    def changing_keys(self) -> dict[str, Any]:
        """Return the names of keys that make captions and pictures differ each time."""
        records = (
            (self.changes, PLAIN_CAPTIONS, CHANGE_KEYS),
            (self.augmentation, NO_AUGMENTATION, DRAW_KEYS),
        )
        return {
            key: list(value) if isinstance(value, tuple) else value
            for record, usual, keys in records
            for name, key in keys.items()
            if (value := getattr(record, name)) != getattr(usual, name)
        }

    def _changed(self, defaults: Table) -> dict[str, Any]:
        return {name: getattr(self, name) for name, usual in defaults.items() if getattr(self, name) != usual}

    def describe(self, has_control: bool | None = None) -> dict[str, Any]:
        """Return the table's entry of the metadata list `ss_datasets`.

        has_control: None takes it from control_directory.
        """
        entry: dict[str, Any] = {
            "resolution": list(self.resolution),
            "caption_extension": self.caption_extension,
            "batch_size_per_device": self.batch_size,
            "num_repeats": self.num_repeats,
            "enable_bucket": self.enable_bucket,
            "bucket_no_upscale": self.bucket_no_upscale,
            self.source_key: self.source.name,
        }
        if self.buckets is not None:
            entry |= {
                "min_bucket_reso": self.buckets.minimum,
                "max_bucket_reso": self.buckets.maximum,
                "bucket_reso_steps": self.buckets.step,
                "resize_interpolation": self.buckets.interpolation,
                "class_tokens": self.class_tokens,
            }
        if self.control_directory is not None:
            entry["control_directory"] = self.control_directory.name
        entry["has_control"] = self.control_directory is not None if has_control is None else has_control
        if self.kind == "video":
            entry["target_frames"] = list(self.target_frames)
            names = ("frame_extraction", "frame_stride", "frame_sample", "max_frames", "source_fps")
            entry |= {name: getattr(self, name) for name in names}
        return entry | self.section_keys | self.learning_keys


@dataclass(frozen=True)
class DatasetConfig:
    """A dataset file that has been read and checked."""

    path: Path
    datasets: tuple[DatasetTable, ...]
