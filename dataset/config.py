"""The dataset configuration: a TOML or JSON file -> frozen tables. Standard library only."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class DatasetTable:
    """One `[[datasets]]` entry with everything filled in."""

    config_path: Path
    index: int  # place in the file, from 0
    kind: Literal["image", "video"]
    directory: Path | None  # image_directory or video_directory
    jsonl_file: Path | None  # image_jsonl_file or video_jsonl_file; exactly one of the two is set
    control_directory: Path | None
    cache_directory: Path
    resolution: tuple[int, int]  # width, height
    caption_extension: str | None
    batch_size: int
    num_repeats: int
    enable_bucket: bool
    bucket_no_upscale: bool  # False where enable_bucket is
    validation: bool  # held back from training
    target_frames: tuple[int, ...]  # ascending, each 4n + 1
    frame_extraction: str
    frame_stride: int
    frame_sample: int
    max_frames: int
    source_fps: float | None
    fp_latent_window_size: int
    fp_1f_clean_indices: tuple[int, ...] | None
    fp_1f_target_index: int | None
    fp_1f_no_post: bool

    @property
    def name(self) -> str:
        """For messages: `data.toml, [[datasets]] 2 (clips)`."""
        raise NotImplementedError

    @property
    def source(self) -> Path:
        """The folder or list the items come from."""
        raise NotImplementedError

    @property
    def control_count(self) -> int:
        """How many control images an image has where it has any."""
        raise NotImplementedError

    def describe(self, has_control: bool | None = None) -> dict[str, Any]:
        """The entry of the metadata list `ss_datasets`. has_control: default: whether there is a control_directory."""
        raise NotImplementedError


@dataclass(frozen=True)
class DatasetConfig:
    """A dataset file that has been read and checked."""

    path: Path
    datasets: tuple[DatasetTable, ...]


def load_dataset_config(path: Path) -> DatasetConfig:
    """Read `path` (.toml or .json). Folders are not looked for: training needs only the caches (`sources.find_sources` looks).

    Raises DatasetError naming file, table, key, the value found and the values allowed.
    """
    raise NotImplementedError
