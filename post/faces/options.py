"""Options of restoring faces. Standard library only."""

from modules.errors import OptionError
from modules.options import Options, option
from post.run_options import ToolNetworkOptions

GFPGAN, CODEFORMER = "gfpgan", "codeformer"
USUAL_WEIGHT = 0.5
# names of the known command line -> names of files, without suffix
RETINAFACES = {
    "retinaface_resnet50": "detection_Resnet50_Final",
    "retinaface_mobile0.25": "detection_mobilenet0.25_Final",
}
YUNET = "yunet"


class FacefixOptions(Options, title="faces"):
    """Which faces are restored, and how."""

    network: ToolNetworkOptions = option(
        settings={
            "model": {
                "help": "a GFPGAN (v1.3, v1.4) or CodeFormer file, or its folder; the detector and "
                "parsing_parsenet.pth lie beside it"
            }
        }
    )
    mode: str = option("which network --model is", default=GFPGAN, choices=(GFPGAN, CODEFORMER))
    weight: float = option(
        "fidelity of CodeFormer: 0 is the most beautiful face, 1 the most alike",
        default=USUAL_WEIGHT,
        least=0,
        most=1,
    )
    strength: float = option(
        "how much of the restored face is shown, 0 to 1; the rest is the original",
        default=1.0,
        least=0,
        most=1,
    )
    smooth: float = option(
        "keep faces of a video steady against trembling detections: 0 (off) to below 1",
        default=0.5,
        least=0,
        below=1,
    )
    upscale: float = option(
        "size of the result: width and height times this", default=1, above=0, most=16, flags=("-s",)
    )
    only_center: bool = option("restore only the face nearest the centre")
    detection_model: str = option(
        f"what finds faces: {', '.join(RETINAFACES)} or {YUNET} (a file beside --model), or a file",
        default=next(iter(RETINAFACES)),
    )
    detection_threshold: float | None = option(
        "least score of a face, 0 to 1 (default: 0.97, for an .onnx file 0.8)", above=0, below=1
    )

    def __post_init__(self) -> None:
        if self.mode == GFPGAN and self.weight != USUAL_WEIGHT:
            raise OptionError(
                f"--weight {self.weight:g} is for --mode codeformer: GFPGAN has no such setting. "
                "Use --strength to show less of its faces."
            )
