"""Options of restoring faces. Standard library only."""

import argparse
from dataclasses import dataclass

from modules.errors import OptionError
from post.network_options import ToolNetworkOptions, add_network_arguments

GFPGAN, CODEFORMER = "gfpgan", "codeformer"
MODES = (GFPGAN, CODEFORMER)
USUAL_WEIGHT = 0.5
MOST_UPSCALE = 16.0
# names of the known command line -> names of files, without suffix
RETINAFACES = {
    "retinaface_resnet50": "detection_Resnet50_Final",
    "retinaface_mobile0.25": "detection_mobilenet0.25_Final",
}
YUNET = "yunet"


@dataclass(frozen=True)
class FacefixOptions:
    """Which faces are restored, and how."""

    network: ToolNetworkOptions
    mode: str
    weight: float
    strength: float
    smooth: float
    upscale: float
    only_center: bool
    detection_model: str
    detection_threshold: float | None

    def __post_init__(self) -> None:
        for option, value in (("--weight", self.weight), ("--strength", self.strength)):
            if not 0 <= value <= 1:
                raise OptionError(f"{option} {value:g}: give a number from 0 to 1")
        if self.mode == GFPGAN and self.weight != USUAL_WEIGHT:
            raise OptionError(
                f"--weight {self.weight:g} is for --mode codeformer: GFPGAN has no such setting. "
                "Use --strength to show less of its faces."
            )
        if not 0 <= self.smooth < 1:
            raise OptionError(f"--smooth {self.smooth:g}: give 0 (none) or a number below 1")
        if not 0 < self.upscale <= MOST_UPSCALE:
            raise OptionError(f"--upscale {self.upscale:g}: give a number above 0, at most {MOST_UPSCALE:g}")
        if self.detection_threshold is not None and not 0 < self.detection_threshold < 1:
            raise OptionError(
                f"--detection_threshold {self.detection_threshold:g}: give a number between 0 and 1"
            )


def add_facefix_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `FacefixOptions`."""
    add_network_arguments(
        parser,
        "a GFPGAN (v1.3, v1.4) or CodeFormer file, or its folder; the detector and parsing_parsenet.pth lie "
        "beside it",
    )
    group = parser.add_argument_group("faces")
    group.add_argument("--mode", type=str, default=GFPGAN, choices=MODES, help="which network --model is")
    group.add_argument(
        "--weight",
        type=float,
        default=USUAL_WEIGHT,
        help="fidelity of CodeFormer: 0 is the most beautiful face, 1 the most alike",
    )
    group.add_argument(
        "--strength",
        type=float,
        default=1.0,
        help="how much of the restored face is shown, 0 to 1; the rest is the original",
    )
    group.add_argument(
        "--smooth",
        type=float,
        default=0.5,
        help="keep faces of a video steady against trembling detections: 0 (off) to below 1",
    )
    group.add_argument(
        "-s", "--upscale", type=float, default=1, help="size of the result: width and height times this"
    )
    group.add_argument("--only_center", action="store_true", help="restore only the face nearest the centre")
    group.add_argument(
        "--detection_model",
        type=str,
        default=next(iter(RETINAFACES)),
        help=f"what finds faces: {', '.join(RETINAFACES)} or {YUNET} (a file beside --model), or a file",
    )
    group.add_argument(
        "--detection_threshold",
        type=float,
        default=None,
        help="least score of a face, 0 to 1 (default: 0.97, for an .onnx file 0.8)",
    )
