"""Options of blurring. Standard library only."""

from modules.errors import OptionError
from modules.options import Options, option
from post.run_options import ToolNetworkOptions

METHODS = ("blur", "fill")
MOST_HELD = 300  # pictures that are kept in memory for the sake of those before them
_BLUR = "blur"


class BlurOptions(Options, title="what is blurred"):
    """Things to blur, and the form of the blur."""

    network: ToolNetworkOptions = option(
        settings={"model": {"help": "a detector: YuNet or YOLO as .onnx, RetinaFace as .pth or .safetensors"}}
    )
    strength: int = option(
        "size of the blur in pixels, made odd; at least half of the box, and at most the whole of it",
        title=_BLUR,
        default=51,
        least=1,
        most=9999,
    )
    sigmax: int = option(
        "standard deviation of a blur of that size; at least a quarter of it",
        title=_BLUR,
        default=40,
        least=1,
    )
    conf: float = option(
        "least score of what is blurred, 0 to 1: whatever scores less stays visible, unless --hold or "
        "--lookback covers it; lower is safer",
        default=0.5,
        least=0,
        most=1,
    )
    method: str = option("blur, or fill with black", title=_BLUR, default="blur", choices=METHODS)
    margin: float = option(
        "how much larger than what was found the blur is on each side, as part of its width and height; 0 "
        "for exactly what was found",
        title=_BLUR,
        default=0.1,
        least=0,
        most=5,
        hint="a part of the box, such as 0.1",
    )
    ellipse: bool = option("blur the ellipse that fits into the box, not all of it", title=_BLUR)
    feather: float = option(
        "width of a soft edge outside of the blur, as part of the box's shorter side",
        title=_BLUR,
        default=0.0,
        least=0,
        most=1,
    )
    hold: int = option(
        "frames for which something stays blurred after it was last found; frames in which it was missed are "
        "blurred where it has moved through. So many frames wait in memory",
        default=15,
        least=0,
        most=MOST_HELD,
    )
    lookback: int = option(
        "frames that are blurred before something is first found", default=10, least=0, most=MOST_HELD
    )
    detection_size: int = option(
        "pictures are looked at in a copy with at most this short side (YuNet: long side; YOLO: if its file "
        "leaves it open), 0 for their full size: larger finds smaller faces and takes longer",
        default=640,
    )
    allow_none: bool = option(
        "write the result even if nothing was found in it; without it that is an error (exit code 3)"
    )

    def __post_init__(self) -> None:
        if self.detection_size != 0 and self.detection_size < 64:
            raise OptionError(
                f"--detection_size {self.detection_size}: give at least 64 pixels, or 0 for the full size"
            )
