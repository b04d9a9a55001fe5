"""Find the files that restoring faces takes: the model, and beside it the detector and ParseNet."""

from collections.abc import Sequence
from pathlib import Path

from modules.checkpoints.opening import SUFFIXES
from modules.command import as_typed
from modules.errors import CheckpointError
from post.options import GFPGAN, RETINAFACES, YUNET

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
    """Return the model's file for the value of --model. Raises CheckpointError if a folder has none."""
    if not given.is_dir():
        return given  # a file that is not there is reported when it is opened
    found = _first(given, MODELS[mode])
    if found is not None:
        return found
    raise CheckpointError(
        f"--model {given}: no {MODELS[mode][0]}.pth is in this folder.\n  Give the path of the file, or "
        f"download it with {_command(mode)}, or from {ORIGINS[mode]}.",
        given,
    )


def find_parsenet(model: Path, mode: str) -> Path:
    """Return ParseNet's file beside the model's. Raises CheckpointError if there is none."""
    what = "ParseNet, which finds the parts of a face,"
    return _find_helper(model, PARSENET, what, f"download it with {_command(mode)}, or")


def find_detector(model: Path, mode: str, named: str) -> Path:
    """Return the detector's file: one of the known names beside the model's, else the path itself.

    Raises CheckpointError if it is not there.
    """
    if named in RETINAFACES:
        stem = RETINAFACES[named]
        # tools/download.py has the larger one only
        how = f"download it with {_command(mode)}, or" if stem == next(iter(RETINAFACES.values())) else "or"
        more = f"Give another file to --detection_model, {how}"
        return _find_helper(model, stem, f"the detector {named}", more)
    if named != YUNET:
        path = Path(named)
        if path.exists():
            return path
        names = ", ".join([*RETINAFACES, YUNET])
        raise CheckpointError(
            f"--detection_model {named}: there is no such file. Give the path of one, or one of {names}.",
            path,
        )
    files = [path for path in sorted(model.parent.glob("*.onnx")) if "yunet" in path.name.lower()]
    if files:
        return files[-1]  # their names end with a date
    raise CheckpointError(
        f"--detection_model yunet: no .onnx file with yunet in its name is in {model.parent}.\n  Give its "
        f"path, or download it with {_command(YUNET)}, or from {ORIGINS[YUNET]}.",
        model.parent,
    )


def _command(task: str) -> str:
    return as_typed(["python", "tools/download.py", "--family", "tools", "--task", task])


def _find_helper(model: Path, stem: str, what: str, how: str) -> Path:
    folder = model.parent
    found = _first(folder, (stem,))
    if found is not None:
        return found
    how = how[0].upper() + how[1:]
    raise CheckpointError(
        f"{what} is missing: no {stem}.pth is in {folder}, the folder of --model.\n  {how} put it there from "
        f"{ORIGINS[stem]}.",
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
