"""Recognize pairs of images and control images, which train ControlNets but not LoRAs."""

import re
from collections.abc import Sequence
from pathlib import Path

from dataset.sources.folders import ControlFolder
from modules.console import list_some
from modules.errors import DatasetError
from modules.line_kinds import warning
from project.kinds.contract import RunKind

# folders of control images
CONTROLS = re.compile(r"(controls?|conditions?|conditioning)([-_ ]?(images?|pictures?))?", re.IGNORECASE)


def _has_control_image(controls: ControlFolder, stem: str) -> bool:
    """Return whether an image has a control image; False if it is ambiguous which files belong to it."""
    try:
        controls.for_image(stem, 1)
    except DatasetError:
        return False
    return True


def describe_control_pairs(
    control_folder: Path, pictures: Sequence[Path], kind: RunKind, control_kind: RunKind
) -> str | None:
    """Return a line about unused control images, with the kind of run that could train on them.

    Args:
        control_folder: The folder that may contain control images.
        pictures: Images that the control images may belong to.
        kind: The kind of this run, which does not use control images.
        control_kind: The kind of run that trains on control images.

    Returns:
        The line; None if the folder has another name, cannot be listed, or has no control image of any image.
    """
    if not CONTROLS.fullmatch(control_folder.name):
        return None
    try:
        controls = ControlFolder(control_folder, {path.stem for path in pictures})
    except DatasetError:
        return None
    without_control = [path.name for path in pictures if not _has_control_image(controls, path.stem)]
    if len(without_control) == len(pictures):
        return None
    errors = ""
    if without_control:
        errors += f". Without a control image: {list_some(without_control)}"
    if controls.unmatched:
        errors += f". Without an image: {list_some([path.name for path in controls.unmatched])}"
    return warning(
        f"{control_folder}: left out, as {kind.title} does not use control images. "
        f"{len(pictures) - len(without_control)} of {len(pictures)} images have one there{errors}. --train "
        f"{control_kind.name} trains {control_kind.title} on such pairs (docs/control.md)"
    )
