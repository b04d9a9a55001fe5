"""Options of the run and of the network, which all tools have, and of each tool. Standard library only."""

import argparse
import os
from fractions import Fraction
from pathlib import Path

from modules.errors import OptionError
from modules.media.options import FormatOptions
from modules.option_values import to_path
from modules.options import Options, option


class ToolRunOptions(Options, title="input and output"):
    """Which file a tool reads, and where it writes the result."""

    input: Path = option(
        "a video, an image, or a folder: then each video and each image in it is worked on by itself",
        place="there",
        hint="a video, an image, or a folder",
        required=True,
        by_place=True,
    )
    output: str | None = option(  # str, because Path drops a trailing /
        "file of the result, whose ending is that of --container or .png, or folder for results "
        "(default: next to the input, with the name of the network added)",
        metavar="PATH",
    )
    yes: bool = option("overwrite results that exist, and ask nothing", flags=("-y",))
    device: str | None = option("cuda, cuda:1, mps or cpu (default: the best there is)")
    format: FormatOptions = option(defaults={"codec": "prores", "container": "mkv"})

    def __post_init__(self) -> None:
        if self.output is not None and not self.output.strip():
            raise OptionError("--output is empty: pass a file or a folder, or omit the option")

    @property
    def output_path(self) -> Path | None:
        """Return --output as a path.

        Raises:
            OptionError: If no file can have this name.
        """
        return None if self.output is None else to_path("--output", self.output)

    @property
    def is_output_folder(self) -> bool:
        """Whether --output ends like a folder, so that it counts as one even before it exists."""
        ends = ("/", os.sep) if os.altsep is None else ("/", os.sep, os.altsep)
        return self.output is not None and self.output.endswith(ends)


class ToolNetworkOptions(Options, title="network"):
    """The network to use, its device and dtype."""

    model: Path = option("the network's file", required=True)
    dtype: str = option(
        "fp32 (float32), bf16 (bfloat16) or fp16 (float16): the halves take half the memory", default="fp32"
    )
    seed: str | None = option("seed of random values; most of these networks use none")
    compile: bool = option("compile the network with torch: slow to start, then faster")


AUTO = "auto"


def auto_or_number(text: str) -> int | None:
    """Parse an integer; `auto` becomes None."""
    if text.lower() == AUTO:
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor {AUTO}") from None


class UpscalerOptions(Options, title="upscaling"):
    """Upscaling mode, scale and tiles."""

    network: ToolNetworkOptions = option(
        settings={"model": {"help": "a SwinIR, ESRGAN, BSRGAN or Real-ESRGAN file (.pth, .safetensors)"}}
    )
    mode: str = option(  # only the output's name; the network is recognized from the file
        "the kind of network", default="swinir", choices=("swinir", "esrgan")
    )
    scale: float = option("size of the result: width and height times this", default=2, above=0)
    tile: int | None = option(
        "size of the pieces that images are cut into, in pixels of the input; 0: never; auto, the "
        "default: only if memory does not hold the whole image",
        type=auto_or_number,
        minimum=0,
    )
    tile_overlap: int = option("pixels that pieces share; they are blended there", default=32, minimum=0)
    batch_size: int | None = option(
        "images that are computed at once; auto, the default: one on a CPU, several small ones on a GPU",
        type=auto_or_number,
        minimum=1,
    )

    def __post_init__(self) -> None:
        if self.tile and 2 * self.tile_overlap > self.tile:
            raise OptionError(
                f"--tile_overlap {self.tile_overlap} is more than half of --tile {self.tile}. Use larger "
                "tiles or a smaller overlap"
            )


WITH_RAFT, WITH_FLOWFORMER = "gimmvfi_r", "gimmvfi_f"
MAX_FACTOR = 16
SMALLEST_PART = 8  # largest denominator of --ds_factor
ROUNDED = 0.004  # tolerance within which 0.33 and 0.67 count as one third and two thirds
ALIGNMENT = 32  # the networks need sides that are multiples of this


class InterpolationOptions(Options, title="interpolation"):
    """How many images to generate between two frames, and how."""

    network: ToolNetworkOptions = option(
        settings={"model": {"help": "folder with the GIMM-VFI files and those of its optical flow"}}
    )
    mode: str = option("gimmvfi_r (RAFT) or gimmvfi_f (FlowFormer: better, slower)", default=WITH_FLOWFORMER)
    factor: int = option(
        f"how many times as many images a second: usually 2 to 8, at most {MAX_FACTOR}",
        default=2,
        minimum=1,
        maximum=MAX_FACTOR,
        hint="1 leaves the images as they are",
    )
    ds_factor: float = option(
        "compute flow at this part of the size: 0.5 for 2K, 0.25 for 4K", default=1.0, above=0, maximum=1
    )
    scene_threshold: float = option(
        "from this distance of two images on, 0 to 1, a new scene begins: the image before it is "
        "repeated instead of mixed with it. The distance is sqrt(structure * colors): 1 minus the best "
        "correlation of small gray copies moved against each other, and the part of colors that "
        "changes. Lower finds more cuts; 0 turns it off",
        default=0.25,
        minimum=0,
        maximum=1,
    )

    def __post_init__(self) -> None:
        if (WITH_RAFT in self.mode.lower()) == (WITH_FLOWFORMER in self.mode.lower()):
            raise OptionError(f"--mode {self.mode}: use {WITH_RAFT} or {WITH_FLOWFORMER}")
        if not self.motion_scale or abs(float(self.motion_scale) - self.ds_factor) > ROUNDED:
            raise OptionError(
                f"--ds_factor {self.ds_factor}: pass a simple fraction, such as 1, 0.75, 0.5 or 0.25"
            )

    @property
    def kind(self) -> str:
        """Network that estimates the optical flow, according to --mode."""
        return WITH_RAFT if WITH_RAFT in self.mode.lower() else WITH_FLOWFORMER

    @property
    def motion_scale(self) -> Fraction:
        """Scale at which motion is estimated (--ds_factor), as an exact fraction."""
        return Fraction(self.ds_factor).limit_denominator(SMALLEST_PART)

    @property
    def alignment(self) -> int:
        """Number that image sides must be divisible by, so that --ds_factor yields multiples of 32."""
        step = ALIGNMENT / self.motion_scale
        return step.numerator  # the smallest whole multiple of the step


METHODS = ("blur", "fill")
MAX_HELD = 300  # maximum number of images that wait in memory for later images
_BLUR = "blur"


class BlurOptions(Options, title="what is blurred"):
    """What is blurred, in which shape and how strongly."""

    network: ToolNetworkOptions = option(
        settings={"model": {"help": "a detector: YuNet or YOLO as .onnx, RetinaFace as .pth or .safetensors"}}
    )
    strength: int = option(
        "size of the blur in pixels, made odd; at least half of the box, and at most the whole of it",
        title=_BLUR,
        default=51,
        minimum=1,
        maximum=9999,
    )
    sigmax: int = option(
        "standard deviation of a blur of that size; at least a quarter of it",
        title=_BLUR,
        default=40,
        minimum=1,
    )
    conf: float = option(
        "minimum score of what is blurred, 0 to 1: anything with a lower score stays visible, unless --hold "
        "or --lookback covers it; lower is safer",
        default=0.5,
        minimum=0,
        maximum=1,
    )
    method: str = option("blur, or fill with black", title=_BLUR, default="blur", choices=METHODS)
    margin: float = option(
        "how much larger than what was found the blur is on each side, as part of its width and height; 0 "
        "for exactly what was found",
        title=_BLUR,
        default=0.1,
        minimum=0,
        maximum=5,
        hint="a part of the box, such as 0.1",
    )
    ellipse: bool = option("blur the ellipse that fits into the box, not all of it", title=_BLUR)
    feather: float = option(
        "width of a soft edge outside of the blur, as part of the box's shorter side",
        title=_BLUR,
        default=0.0,
        minimum=0,
        maximum=1,
    )
    hold: int = option(
        "frames for which something stays blurred after it was last found; frames in which it was missed are "
        "blurred where it has moved through. This many frames wait in memory",
        default=15,
        minimum=0,
        maximum=MAX_HELD,
    )
    lookback: int = option(
        "frames that are blurred before something is first found", default=10, minimum=0, maximum=MAX_HELD
    )
    detection_size: int = option(
        "images are looked at in a copy with at most this short side (YuNet: long side; YOLO: if its "
        "file leaves it open), 0 for their full size: a larger side finds smaller faces and is slower",
        default=640,
    )
    allow_none: bool = option(
        "write the result even if nothing was found in it; without it that is an error (exit code 3)"
    )

    def __post_init__(self) -> None:
        if self.detection_size != 0 and self.detection_size < 64:
            raise OptionError(
                f"--detection_size {self.detection_size}: use at least 64 pixels, or 0 for the full size"
            )


GFPGAN, CODEFORMER = "gfpgan", "codeformer"
DEFAULT_WEIGHT = 0.5
# detector names of the original command line -> file names without suffix
RETINAFACES = {
    "retinaface_resnet50": "detection_Resnet50_Final",
    "retinaface_mobile0.25": "detection_mobilenet0.25_Final",
}
YUNET = "yunet"


class FacefixOptions(Options, title="faces"):
    """Which faces are restored, with which network and how strongly."""

    network: ToolNetworkOptions = option(
        settings={
            "model": {
                "help": "a GFPGAN (v1.3, v1.4) or CodeFormer file, or its folder; the detector and "
                "parsing_parsenet.pth are next to it"
            }
        }
    )
    mode: str = option("which network --model is", default=GFPGAN, choices=(GFPGAN, CODEFORMER))
    weight: float = option(
        "fidelity of CodeFormer: 0 is the most beautiful face, 1 the most alike",
        default=DEFAULT_WEIGHT,
        minimum=0,
        maximum=1,
    )
    strength: float = option(
        "how much of the restored face is shown, 0 to 1; the rest is the original",
        default=1.0,
        minimum=0,
        maximum=1,
    )
    smooth: float = option(
        "keep faces of a video steady against trembling detections: 0 (off) to below 1",
        default=0.5,
        minimum=0,
        below=1,
    )
    upscale: float = option(
        "size of the result: width and height times this", default=1, above=0, maximum=16, flags=("-s",)
    )
    only_center: bool = option("restore only the face nearest the center")
    detection_model: str = option(
        f"what finds faces: {', '.join(RETINAFACES)} or {YUNET} (a file next to --model), or a file",
        default=next(iter(RETINAFACES)),
    )
    detection_threshold: float | None = option(
        "least score of a face, 0 to 1 (default: 0.97, for an .onnx file 0.8)", above=0, below=1
    )

    def __post_init__(self) -> None:
        if self.mode == GFPGAN and self.weight != DEFAULT_WEIGHT:
            raise OptionError(
                f"--weight {self.weight:g} is for --mode codeformer: GFPGAN has no such setting. "
                "Use --strength to show less of its faces."
            )
