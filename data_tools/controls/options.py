"""Options of tools/control_pictures.py."""

from pathlib import Path

from modules.errors import OptionError
from modules.media.options import EDGE_THRESHOLDS
from modules.options import Options, option

FOLDER_NAME = "conditioning"  # of the control pictures, in the folder of the pictures


class ControlPictureOptions(Options, title="what to make"):
    """Pictures, the kind of their control pictures, and the folder of these."""

    folder: Path = option("folder of pictures", positional=True, place="folder")
    canny: tuple[int, ...] | None = option(
        "draw edges; behind the folder. Two numbers are Canny's thresholds, low and high; default: "
        f"{EDGE_THRESHOLDS[0]} {EDGE_THRESHOLDS[1]}, as --control_net_preps canny of gen_img.py",
        nargs="*",
        metavar="LOW HIGH",
        least=0,
        most=99_999,
        excludes="depth",
    )
    depth: Path | None = option(
        "draw depth maps, near is white, with the model in this folder: one that transformers loads for "
        "depth estimation, such as Depth Anything V2 or DPT. Code that comes with it is never run",
        place="folder",
        hint="the folder of such a model; python tools/download.py --family tools --task "
        "depth_anything_v2_small --to models downloads one, after its size and licence",
    )
    output: Path | None = option(
        f"folder for the control pictures; default: {FOLDER_NAME}, in the folder of pictures",
        place="new folder",
    )
    overwrite: bool = option("make again what this program has made; files of other programs always stay")
    device: str | None = option(
        "of --depth: cuda, cuda:1, mps or cpu; default: the best one available", only_with="depth"
    )

    def __post_init__(self) -> None:
        if self.canny is None and self.depth is None:
            raise OptionError("Say what to draw: --canny for edges, or --depth FOLDER with a model of depth")
        if self.canny is not None and len(self.canny) not in (0, 2):
            raise OptionError(f"--canny takes two numbers, LOW and HIGH, or none; it has {len(self.canny)}")
        if self.canny and self.canny[0] > self.canny[1]:
            raise OptionError(f"--canny {self.canny[0]} {self.canny[1]}: the first is the lower threshold")

    @property
    def thresholds(self) -> tuple[int, int]:
        """Return the thresholds of edges, low and high."""
        if not self.canny:
            return EDGE_THRESHOLDS
        low, high = self.canny
        return low, high
