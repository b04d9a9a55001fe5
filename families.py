"""The list of families, and how to identify their files."""

from importlib import import_module
from pathlib import Path

# name -> the module with `identify` for its files; Wan's is last: it also recognises files of no family
FAMILIES = {
    "framepack": "frame_pack.checkpoints",
    "hunyuan_video": "hunyuan_model.checkpoints",
    "wan": "wan.checkpoints",
}
# name -> its generation script
GENERATION_SCRIPTS = {
    "framepack": "fpack_generate_video",
    "hunyuan_video": "hv_generate_video",
    "wan": "wan_generate_video",
}


def identify(path: Path) -> str | None:
    """Return one line about what a checkpoint or LoRA file really is, for a hint below an error.

    Returns None if no family knows the file. Families are imported only here: a script that only prints its
    help loads none of them.
    """
    for module in FAMILIES.values():
        found: str | None = import_module(module).identify(path)
        if found is not None:
            return found
    return None
