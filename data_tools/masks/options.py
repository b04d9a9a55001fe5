"""Options of tools/mask.py."""

import re
from pathlib import Path

from modules.errors import OptionError
from modules.options import Options, option
from modules.text_files import bad_character

FOLDER_NAME = "masks"  # folder of the masks, inside the folder of the images
MODEL_FOLDER = Path("models/clipseg")  # tools/download.py writes these files
BACKGROUND_FILE = Path("models/background/u2net.onnx")
FACE_FILE = Path("models/facefix/face_detection_yunet_2023mar.onnx")
WATERMARK = ("a watermark", "a logo", "text")
MAX_WORDS = 300  # maximum characters of a prompt
NETWORK_SMOOTH = 5  # default --smooth_pixels for networks, which find edges only roughly
IS_COLOR = re.compile(r"#?([0-9a-fA-F]{6})")
FINDERS = ("what", "watermark", "background", "faces", "colour")


class FinderOptions(Options, title="what to find"):
    """What the masks should cover, and how it is found."""

    what: tuple[str, ...] | None = option(
        'find this, in a few words, such as "the person"; may be given several times: what fits any of them '
        "is found (the maximum of their values, before --threshold)",
        action="append",
        nargs=None,
        metavar="WORDS",
        excludes=("watermark", "background", "faces", "colour"),
        often=True,
    )
    watermark: bool = option(
        f"find {', '.join(WATERMARK)}, and learn everything else",
        excludes=("background", "faces", "colour"),
    )
    background: Path | None = option(
        "find the foreground, with a U2Net-like ONNX file; with --invert the background; "
        f"without a file {BACKGROUND_FILE.as_posix()}",
        nargs="?",
        const=BACKGROUND_FILE,
        metavar="FILE",
        excludes=("faces", "colour"),
    )
    faces: Path | None = option(
        "find faces, with a detector: YuNet, a YOLO for faces as ONNX, or RetinaFace; without a file "
        f"{FACE_FILE.as_posix()}",
        nargs="?",
        const=FACE_FILE,
        metavar="FILE",
        excludes="colour",
    )
    colour: str | None = option(
        "find a color, such as 00ff00, green: red, green and blue in two hexadecimal digits each",
        metavar="RRGGBB",
    )
    model: Path = option(
        "of --what and --watermark: folder of a CLIPSeg or SAM 3 model, as transformers saves it",
        default=MODEL_FOLDER,
    )
    least_score: float = option(
        "of --faces, and of --what with SAM 3: how sure of a thing the network has to be",
        default=0.5,
        minimum=0,
        maximum=1,
        ignored_without=("faces", "what", "watermark"),
    )
    colour_distance: float = option(
        "of --colour: how far red, green and blue, each 0 to 1, may lie from it (root of the squares' sum)",
        default=0.1,
        minimum=0,
        maximum=2,
        ignored_without="colour",
    )
    device: str | None = option("cuda, cuda:1, mps or cpu; default: the best one available")

    def __post_init__(self) -> None:
        for words in self.what or ():
            if not words.strip():
                raise OptionError("--what is empty: describe what to find")
            character = bad_character(words)
            if character is not None:
                raise OptionError(f"--what holds {character}: set the terminal to UTF-8")
            if len(words) > MAX_WORDS or len(words.splitlines()) > 1:
                raise OptionError(f"--what: pass one line of at most {MAX_WORDS} characters")
        if self.colour is not None and not IS_COLOR.fullmatch(self.colour):
            raise OptionError(f"--colour {self.colour}: use six hexadecimal digits, such as 00ff00 for green")

    def require_one(self) -> None:
        """Raise OptionError unless some option says what the masks should cover."""
        if not any(getattr(self, name) not in (None, False) for name in FINDERS):
            raise OptionError(
                'Say what to find: --what "the person", --watermark, --background, --faces or --colour'
            )

    @property
    def prompts(self) -> tuple[str, ...]:
        """Return the prompts of --what or --watermark; none for other finders."""
        return WATERMARK if self.watermark else self.what or ()


class MaskShapeOptions(Options, title="the shape of the masks"):
    """Options that turn a finder's scores, 0..1, into a mask."""

    threshold: float | None = option(
        "a place is found where its value lies above; default: 0.3, with SAM 3 0.5", minimum=0, below=1
    )
    smooth_pixels: int | None = option(
        "average each value with those of so many neighbors on each side, counted on the network's own "
        f"grid, before the threshold; default: {NETWORK_SMOOTH}, of --faces and --colour 0",
        minimum=0,
        maximum=1000,
    )
    expand_pixels: int = option(
        "enlarge the found regions by so many pixels on each side",
        default=10,
        minimum=0,
        maximum=10_000,
    )
    feather_pixels: int = option(
        "then let the edge fade to black over so many pixels more", default=0, minimum=0, maximum=10_000
    )
    steady_frames: int = option(
        "of clips: the value of a place is the median over so many frames before and after it, before the "
        "threshold, so that the edge does not flicker; 0: each frame for itself",
        default=2,
        minimum=0,
        maximum=100,
    )
    invert: bool = option("train on everything except what is found")


class MaskOptions(Options, title="what to do"):
    """Which media get masks, where the masks are written, and what happens to existing ones."""

    folder: Path = option("folder of images and clips", positional=True, place="folder")
    recursive: bool = option("also make masks for the folders below, each in its own")
    output: Path | None = option(
        f"folder for the masks; default: {FOLDER_NAME}, in the folder of the images",
        place="new folder",
        excludes=("beside", "recursive"),
    )
    beside: bool = option("write NAME-masklabel.png next to the images, as OneTrainer does")
    mode: str = option(
        "fill: only where there is no mask; replace: in place of any mask, hand-drawn ones too; add: "
        "to what the mask shows; subtract: from it (without a mask: from the whole image); blend: the "
        "mean of both, in which the new one counts --alpha times. The mask as it was is kept in .before",
        default="fill",
        choices=("fill", "replace", "add", "subtract", "blend"),
        often=True,
    )
    alpha: float = option("brightness of what is found, 1 is white", default=1.0, above=0, maximum=1)
    overwrite: bool = option(
        "with --mode fill: make again masks that this program made in another way; what a person has drawn, "
        "accepted or removed stays"
    )
    dry_run: bool = option("say what would be made, and write nothing")
    finder: FinderOptions
    shape: MaskShapeOptions

    def __post_init__(self) -> None:
        if self.overwrite and self.mode != "fill":
            raise OptionError(f"--overwrite is for --mode fill; --mode {self.mode} changes every mask")

    @property
    def inverts(self) -> bool:
        """Return whether the found regions are excluded from the loss instead of selected for it."""
        return self.shape.invert != self.finder.watermark
