"""Options of cutting footage into clips. Standard library only."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from modules.errors import OptionError
from modules.media.options import FormatOptions, holds_depth, suffix_of
from modules.option_values import check_at_least, check_at_most
from modules.parser import add_options

OWN, CONTENT, ADAPTIVE = "own", "pyscenedetect", "pyscenedetect-adaptive"
PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")
# of each detector: its usual threshold, and the largest that means something
THRESHOLDS = {OWN: (0.25, 1.0), CONTENT: (27.0, 255.0), ADAPTIVE: (3.0, 255.0)}
MOST_AT_ONCE = 64  # files
LIST_NAME = "clips.jsonl"


@dataclass(frozen=True)
class SceneOptions:
    """How scenes are found."""

    detector: str
    scene_threshold: float | None  # None: the usual one of the detector

    def __post_init__(self) -> None:
        if self.scene_threshold is not None:
            most = THRESHOLDS[self.detector][1]
            if not 0 < self.scene_threshold <= most:
                raise OptionError(
                    f"--scene_threshold {self.scene_threshold:g}: --detector {self.detector} takes numbers "
                    f"above 0 and up to {most:g}; {self.threshold_usual:g} is usual, a lower one finds more"
                )

    @property
    def threshold_usual(self) -> float:
        """The detector's usual threshold."""
        return THRESHOLDS[self.detector][0]

    @property
    def threshold(self) -> float:
        """The threshold to use."""
        return self.threshold_usual if self.scene_threshold is None else self.scene_threshold


@dataclass(frozen=True)
class LengthOptions:
    """How long clips are."""

    min_seconds: float
    max_seconds: float  # 0: no limit
    min_frames: int
    max_frames: int  # 0: no limit
    trim_frames: int

    def __post_init__(self) -> None:
        for name in ("min_seconds", "max_seconds", "min_frames", "max_frames", "trim_frames"):
            check_at_least(f"--{name}", getattr(self, name), 0, "0 for no limit")
        for unit in ("seconds", "frames"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if 0 < most < least:
                raise OptionError(
                    f"--max_{unit} {most:g} is less than --min_{unit} {least:g}: no clip could be that long"
                )


@dataclass(frozen=True)
class ChoiceOptions:
    """Which clips are left out for what they show."""

    static_threshold: float
    black_threshold: float
    blur_threshold: float
    keep_static: bool
    keep_black: bool
    drop_blurred: bool

    def __post_init__(self) -> None:
        for name in ("static_threshold", "black_threshold", "blur_threshold"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise OptionError(f"--{name} {value:g}: give a number above 0 and up to 1")


@dataclass(frozen=True)
class ClipFormat:
    """How clips are written."""

    codec: str
    container: str
    crf: int
    preset: str
    no_audio: bool

    def __post_init__(self) -> None:
        check_at_least("--crf", self.crf, 0, "0 is lossless but for the conversion of colours")
        check_at_most("--crf", self.crf, 51, "a lower one is better")

    @property
    def suffix(self) -> str:
        """Suffix of a clip."""
        return suffix_of(self.codec, self.container)

    @property
    def is_deep(self) -> bool:
        """Whether clips hold more than 8 bits a channel."""
        return holds_depth(self.codec)


@dataclass(frozen=True)
class CuttingOptions:
    """What to cut, how, and where clips and their list go."""

    input: Path
    output: Path
    jsonl: Path | None
    dry_run: bool
    num_workers: int
    scenes: SceneOptions
    lengths: LengthOptions
    choice: ChoiceOptions
    form: ClipFormat

    def __post_init__(self) -> None:
        if not self.input.exists():
            raise OptionError(f"--input {self.input} does not exist. Give a video, or a folder of videos")
        if self.output.exists() and not self.output.is_dir():
            raise OptionError(f"--output {self.output} is a file. Give a folder, which is made if needed")
        if self.input.is_dir() and self.input.resolve() == self.output.resolve():
            raise OptionError(
                f"--output {self.output} is --input too. Give another folder, such as one in it"
            )
        if self.list_path.is_dir():
            raise OptionError(f"--jsonl {self.list_path} is a folder. Give the name of a file")
        if self.list_path.suffix.lower() not in {".jsonl", ".json"}:
            raise OptionError(f"--jsonl {self.list_path}: name a file that ends in .jsonl")
        check_at_least("--num_workers", self.num_workers, 1, "files at once")
        check_at_most("--num_workers", self.num_workers, MOST_AT_ONCE, "files at once")

    @property
    def list_path(self) -> Path:
        """Where the list of clips is written."""
        return self.output / LIST_NAME if self.jsonl is None else self.jsonl


def add_cutting_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `CuttingOptions`."""
    group = parser.add_argument_group("input and output")
    group.add_argument(
        "--input",
        type=str,
        required=True,
        help="a video, or a folder: then all videos in it, and in the folders inside it",
    )
    group.add_argument(
        "--output", type=str, required=True, help="folder for the clips; all go into it, without subfolders"
    )
    group.add_argument(
        "--jsonl", type=str, default=None, help=f"list of the clips (default: {LIST_NAME} in --output)"
    )
    group.add_argument(
        "--dry_run", action="store_true", help="print the scenes and what becomes of them, and write nothing"
    )
    group.add_argument("--num_workers", type=int, default=1, help="files that are worked on at once")
    _add_scene_arguments(parser)
    _add_length_arguments(parser)
    _add_choice_arguments(parser)
    group = parser.add_argument_group("video format")
    add_options(parser, FormatOptions, without=("keep_pngs",))
    group.add_argument(
        "--crf",
        type=int,
        default=12,
        help="quality of h264 and h265, 0 to 51: a lower one is better and larger",
    )
    group.add_argument(
        "--preset",
        type=str,
        default="medium",
        choices=PRESETS,
        help="speed of h264 and h265; slower is smaller",
    )
    group.add_argument(
        "--no_audio",
        action="store_true",
        help="write no sound; else the main sound of a source is cut with it",
    )


def _add_scene_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scenes")
    group.add_argument(
        "--detector",
        type=str,
        default=OWN,
        choices=list(THRESHOLDS),
        help="what finds scenes: our own measure (hard cuts, dissolves, black or plain pictures between), or "
        "PySceneDetect with its ContentDetector or AdaptiveDetector (hard cuts), a package to install: "
        "pip install scenedetect-headless (the package scenedetect brings opencv-python, which clashes with "
        "opencv-python-headless)",
    )
    group.add_argument(
        "--scene_threshold",
        type=float,
        default=None,
        help="how much has to change at a cut; a lower one finds more. Default: "
        + ", ".join(f"{usual:g} ({name})" for name, (usual, _) in THRESHOLDS.items()),
    )


def _add_length_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("lengths", "In seconds, in frames, or both: then both limits hold.")
    group.add_argument(
        "--min_seconds", type=float, default=1.0, help="shorter clips are left out; 0: none are"
    )
    group.add_argument(
        "--max_seconds",
        type=float,
        default=10.0,
        help="longer scenes are cut into equal clips; 0: at any length they stay whole",
    )
    group.add_argument("--min_frames", type=int, default=0, help="likewise, in frames")
    group.add_argument("--max_frames", type=int, default=0, help="likewise, in frames")
    group.add_argument(
        "--trim_frames",
        type=int,
        default=0,
        help="frames to leave out at both ends of each scene, of transitions",
    )


def _add_choice_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is left out")
    group.add_argument(
        "--static_threshold",
        type=float,
        default=0.012,
        help="a clip is static if no part of the picture changes its brightness (0 to 1) by that much",
    )
    group.add_argument(
        "--black_threshold",
        type=float,
        default=0.1,
        help="a clip is black if in half of its pictures nearly all pixels are darker than that (0 to 1)",
    )
    group.add_argument(
        "--blur_threshold",
        type=float,
        default=0.002,
        help="with --drop_blurred: a clip is blurred if most of its pictures are less sharp than that",
    )
    group.add_argument(
        "--keep_static", action="store_true", help="keep static clips, which are left out else"
    )
    group.add_argument("--keep_black", action="store_true", help="keep black clips, which are left out else")
    group.add_argument(
        "--drop_blurred", action="store_true", help="leave out blurred clips, which are kept else"
    )
