"""Open the file of a detector, whichever kind it is."""

from pathlib import Path

import torch

from modules.checkpoints.opening import open_checkpoint
from modules.devices import half_where_fast
from post.faces.contract import Detector
from post.faces.retinaface import load_retinaface, read_retinaface

SHORT_SIDE = 640  # of the copy of a large picture that RetinaFace looks at


def check_detector(path: Path, option: str = "--model") -> None:
    """Read the headers of a detector's file. Raises CheckpointError if it is none, or damaged.

    option: under which it is given, for messages.
    """
    with open_checkpoint(path) as checkpoint:
        load_retinaface(
            read_retinaface(checkpoint, option), torch.device("meta"), torch.float32, None, option
        )


def load_detector(
    path: Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    side: int | None = SHORT_SIDE,
    option: str = "--model",
) -> Detector:
    """Load a detector, told by what its file holds. Raises as `check_detector`.

    dtype: to compute in. side: larger pictures are looked at in a copy of this short side, None: at their
    full size.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_retinaface(checkpoint, option)
        dtype = half_where_fast(device, dtype, "RetinaFace")
        return load_retinaface(plan, device, dtype, side, option)
