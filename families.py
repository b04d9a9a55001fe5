"""The one list of families, and what a file of theirs is."""

from importlib import import_module
from pathlib import Path

# name -> the module that knows its files, with `identify`; Wan's is asked last, as it also knows files of no
# family
FAMILIES = {
    "framepack": "frame_pack.checkpoints",
    "hunyuan_video": "hunyuan_model.checkpoints",
    "wan": "wan.checkpoints",
}


def identify(path: Path) -> str | None:
    """One line about what a checkpoint or LoRA file really is, for a hint below an error; None where nobody
    knows it.

    The families are imported when they are asked: a script that only prints its help loads none of them.
    """
    for module in FAMILIES.values():
        found: str | None = import_module(module).identify(path)
        if found is not None:
            return found
    return None
