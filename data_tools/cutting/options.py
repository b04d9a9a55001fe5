"""Options for cutting footage into clips. Standard library only."""

from pathlib import Path

from modules.errors import OptionError
from modules.media.options import CodecOptions
from modules.options import Options, not_needed, option
from modules.text_files import real_path

PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")
LIST_NAME = "clips.jsonl"
NO_LIMIT = "0 for no limit"


class SceneOptions(Options, title="scenes"):
    """Options for detecting scene changes."""

    scene_threshold: float = option(
        "how much has to change at a cut; a lower one finds more", default=0.25, above=0, maximum=1
    )
    detector = not_needed(
        "scenes are always found by this tool's own measure, which also finds dissolves.",
        "what finds scenes",
        values=("own",),
        default="own",
        choices=("own", "pyscenedetect", "pyscenedetect-adaptive"),
    )


class LengthOptions(Options, title="lengths"):
    """Minimum and maximum length of clips in seconds and in frames; all limits apply."""

    min_seconds: float = option("shorter clips are left out; 0: none are", default=1.0, minimum=0)
    max_seconds: float = option(
        "longer scenes are cut into equal clips; 0: at any length they stay whole",
        default=10.0,
        minimum=0,
        hint=NO_LIMIT,
    )
    min_frames: int = option("the same, in frames; both limits hold", default=0, minimum=0, hint=NO_LIMIT)
    max_frames: int = option("the same, in frames; both limits hold", default=0, minimum=0, hint=NO_LIMIT)
    trim_frames: int = option(
        "frames to omit at both ends of each scene, of transitions", default=0, minimum=0
    )

    def __post_init__(self) -> None:
        for unit in ("seconds", "frames"):
            minimum, maximum = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if 0 < maximum < minimum:
                raise OptionError(
                    f"--max_{unit} {maximum:g} is less than --min_{unit} {minimum:g}: "
                    "no clip could be that long"
                )


class ChoiceOptions(Options, title="what is left out"):
    """Options that exclude clips by their content."""

    static_threshold: float = option(
        "a clip is static if no part of the image changes its brightness (0 to 1) by that much",
        default=0.012,
        above=0,
        maximum=1,
    )
    black_threshold: float = option(
        "a clip is black if in half of its images nearly all pixels are darker than that (0 to 1)",
        default=0.1,
        above=0,
        maximum=1,
    )
    blur_threshold: float = option(
        "with --drop_blurred: a clip is blurred if most of its images are less sharp than that",
        default=0.002,
        above=0,
        maximum=1,
        ignored_without="drop_blurred",
    )
    keep_static: bool = option("keep static clips, which are otherwise left out")
    keep_black: bool = option("keep black clips, which are otherwise left out")
    drop_blurred: bool = option("omit blurred clips, which are otherwise kept")


class ClipFormat(CodecOptions, title="video format"):
    """File format and codec of the clips."""

    crf: int = option(
        "quality of h264 and h265, 0 to 51: a lower one is better and larger",
        default=12,
        minimum=0,
        maximum=51,
        hint="0 is lossless except for the conversion of colors",
    )
    preset: str = option("speed of h264 and h265; slower is smaller", default="medium", choices=PRESETS)
    no_audio: bool = option("write no audio; without this option the main audio of a source is cut with it")


class CuttingOptions(Options, title="input and output"):
    """Options for cutting: the videos, the output folder and the list of clips."""

    input: Path = option(
        "a video, or a folder: then all videos in it, and in the folders inside it",
        place="there",
        hint="a video, or a folder of videos",
        required=True,
        by_place=True,
    )
    output: Path = option(
        "folder for the clips; all go into it, without subfolders",
        place="new folder",
        required=True,
        by_place=True,
    )
    jsonl: Path | None = option(f"list of the clips (default: {LIST_NAME} in --output)")
    dry_run: bool = option("print the scenes and what becomes of them, and write nothing")
    num_workers: int = option("number of files processed in parallel", default=1, minimum=1, maximum=64)
    scenes: SceneOptions
    lengths: LengthOptions
    choice: ChoiceOptions
    clip_format: ClipFormat

    def __post_init__(self) -> None:
        if self.input.is_dir() and real_path(self.input) == real_path(self.output):
            raise OptionError(
                f"--output {self.output} is --input too. Pass another folder, such as one in it"
            )
        if self.list_path.is_dir():
            raise OptionError(f"--jsonl {self.list_path} is a folder. Pass the name of a file")
        if self.list_path.suffix.lower() not in {".jsonl", ".json"}:
            raise OptionError(f"--jsonl {self.list_path}: name a file that ends in .jsonl")

    @property
    def list_path(self) -> Path:
        """Path of the list of clips: given by an option, or in the output folder."""
        return self.output / LIST_NAME if self.jsonl is None else self.jsonl
