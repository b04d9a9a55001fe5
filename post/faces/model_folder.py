"""Find the files that restoring faces takes: the model, and beside it the detector and ParseNet."""

from collections.abc import Sequence
from pathlib import Path

from modules.checkpoints.opening import SUFFIXES
from modules.errors import CheckpointError
from post.faces.options import GFPGAN, RETINAFACES, YUNET

# without suffix, the first that is there counts
MODELS = {
    GFPGAN: ("GFPGANv1.4", "GFPGANv1.3", "GFPGANCleanv1-NoCE-C2"),
    "codeformer": ("codeformer", "codeformer-v0.1.0"),
}
PARSENET = "parsing_parsenet"
ORIGINS = {
    GFPGAN: "the releases of github.com/TencentARC/GFPGAN",
    "codeformer": "the releases of github.com/sczhou/CodeFormer",
    PARSENET: "the releases of github.com/xinntao/facexlib",
    YUNET: "github.com/opencv/opencv_zoo, in models/face_detection_yunet",
    **dict.fromkeys(RETINAFACES.values(), "the releases of github.com/xinntao/facexlib"),
}


def find_model(given: Path, mode: str) -> Path:
    """Return the model's file of what --model says. Raises CheckpointError if a folder has none."""
    if not given.is_dir():
        return given  # a file that is not there is reported when it is opened
    found = _first(given, MODELS[mode])
    if found is not None:
        return found
    raise CheckpointError(
        f"--model {given}: no {MODELS[mode][0]}.pth is in this folder.\n  Download it from {ORIGINS[mode]}, "
        "or give the path of the file.",
        given,
    )


def find_parsenet(model: Path) -> Path:
    """Return ParseNet's file beside the model's. Raises CheckpointError if there is none."""
    return _find_helper(model, PARSENET, "ParseNet, which finds the parts of a face,", "")


def find_detector(model: Path, named: str) -> Path:
    """Return the detector's file: one of the known names beside the model's, else the path itself.

    Raises CheckpointError if it is not there.
    """
    more = " or give another file to --detection_model."
    if named in RETINAFACES:
        return _find_helper(model, RETINAFACES[named], f"the detector {named}", more)
    if named != YUNET:
        path = Path(named)
        if path.exists():
            return path
        names = ", ".join([*RETINAFACES, YUNET])
        raise CheckpointError(
            f"--detection_model {named}: there is no such file, and it is none of {names}.", path
        )
    files = sorted(model.parent.glob("*.onnx"))
    named_so = [path for path in files if "yunet" in path.name.lower()]
    if named_so or len(files) == 1:
        return (named_so or files)[-1]  # their names end with a date
    raise CheckpointError(
        f"--detection_model yunet: no .onnx file of YuNet is in {model.parent}.\n  Download "
        f"face_detection_yunet_2023mar.onnx from {ORIGINS[YUNET]}, into that folder,{more}",
        model.parent,
    )


def _find_helper(model: Path, stem: str, what: str, more: str) -> Path:
    folder = model.parent
    found = _first(folder, (stem,))
    if found is not None:
        return found
    ending = f" into that folder,{more}" if more else " into that folder."
    raise CheckpointError(
        f"{what} is missing: no {stem}.pth is in {folder}, the folder of --model.\n  Download it from "
        f"{ORIGINS[stem]}{ending}",
        folder,
    )


def _first(folder: Path, stems: Sequence[str]) -> Path | None:
    """Return the first of these files, whatever its suffix, in small or capital letters."""
    try:
        files = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_file()}
    except OSError:
        return None  # the folder of a file that is not there
    for stem in stems:
        for suffix in SUFFIXES:
            if f"{stem}{suffix}".lower() in files:
                return files[f"{stem}{suffix}".lower()]
    return None
