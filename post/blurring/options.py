"""Options of blurring. Standard library only."""

import argparse
from dataclasses import dataclass

from modules.errors import OptionError
from modules.option_values import check_at_least, check_at_most
from post.network_options import ToolNetworkOptions, add_network_arguments

METHODS = ("blur", "fill")
MOST_HELD = 300  # pictures that are kept in memory for the sake of those before them


@dataclass(frozen=True)
class BlurOptions:
    """What is blurred, and how."""

    network: ToolNetworkOptions
    strength: int
    sigmax: int
    conf: float
    method: str
    margin: float
    ellipse: bool
    feather: float
    hold: int
    lookback: int
    detection_size: int  # 0: pictures are looked at in their full size
    allow_none: bool

    def __post_init__(self) -> None:
        check_at_least("--strength", self.strength, 1, "the size of the blur in pixels")
        check_at_least("--sigmax", self.sigmax, 1, "the standard deviation of the blur in pixels")
        check_at_most("--strength", self.strength, 9999, "the size of the blur in pixels")
        for option, value in (("--conf", self.conf), ("--feather", self.feather)):
            check_at_least(option, value, 0, "from 0 to 1")
            check_at_most(option, value, 1, "from 0 to 1")
        check_at_least("--margin", self.margin, 0, "a part of the box, such as 0.1")
        check_at_most("--margin", self.margin, 5, "a part of the box, such as 0.1")
        for option, frames in (("--hold", self.hold), ("--lookback", self.lookback)):
            check_at_least(option, frames, 0, "a number of frames")
            check_at_most(option, frames, MOST_HELD, "so many frames wait in memory")
        if self.detection_size != 0:
            check_at_least("--detection_size", self.detection_size, 64, "pixels, or 0 for the full size")
        if self.method not in METHODS:
            raise OptionError(f"--method {self.method}: use one of {', '.join(METHODS)}")


def add_blur_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `BlurOptions`."""
    add_network_arguments(parser, "a detector: YuNet or YOLO as .onnx, RetinaFace as .pth or .safetensors")
    group = parser.add_argument_group("what is blurred")
    group.add_argument(
        "--conf",
        type=float,
        default=0.5,
        help="least score of what is blurred, 0 to 1: whatever scores less stays visible, unless --hold or "
        "--lookback covers it; lower is safer",
    )
    group.add_argument(
        "--hold",
        type=int,
        default=15,
        help="frames for which something stays blurred after it was last found; frames in which it was "
        "missed are blurred where it has moved through. So many frames wait in memory",
    )
    group.add_argument(
        "--lookback", type=int, default=10, help="frames that are blurred before something is first found"
    )
    group.add_argument(
        "--detection_size",
        type=int,
        default=640,
        help="pictures are looked at in a copy with at most this short side (YuNet: long side; YOLO: if its "
        "file leaves it open), 0 for their full size: larger finds smaller faces and takes longer",
    )
    group.add_argument(
        "--allow_none",
        action="store_true",
        help="write the result even if nothing was found in it; without it that is an error (exit code 3)",
    )
    _add_look(parser)


def _add_look(parser: argparse.ArgumentParser) -> None:
    """Declare how what is found is hidden."""
    group = parser.add_argument_group("blur")
    group.add_argument("--method", type=str, default="blur", choices=METHODS, help="blur, or fill with black")
    group.add_argument(
        "--strength",
        type=int,
        default=51,
        help="size of the blur in pixels, made odd; at least half of the box, and at most the whole of it",
    )
    group.add_argument(
        "--sigmax",
        type=int,
        default=40,
        help="standard deviation of a blur of that size; at least a quarter of it",
    )
    group.add_argument(
        "--margin",
        type=float,
        default=0.1,
        help="how much larger than what was found the blur is on each side, as part of its width and height; "
        "0 for exactly what was found",
    )
    group.add_argument(
        "--ellipse", action="store_true", help="blur the ellipse that fits into the box, not all of it"
    )
    group.add_argument(
        "--feather",
        type=float,
        default=0.0,
        help="width of a soft edge outside of the blur, as part of the box's shorter side",
    )
