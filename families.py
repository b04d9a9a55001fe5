"""The list of families, and how to identify their files."""

from pathlib import Path

from modules.installation import import_own

# name -> the module with `identify` for its files; Wan's is last: it also recognises files of no family
FAMILIES = {
    "stable_diffusion": "stable_diffusion.kinds",
    "lumina": "lumina.checkpoints",
    "flux": "flux.checkpoints",
    "framepack": "frame_pack.checkpoints",
    "hunyuan_image": "hunyuan_image.checkpoints",
    "hunyuan_video": "hunyuan_model.checkpoints",
    "wan": "wan.checkpoints",
}
# name -> its generation script, if tools/compare.py can call it: gen_img.py has options and files of its own
GENERATION_SCRIPTS = {
    "lumina": "lumina_generate_image",
    "flux": "flux_generate_image",
    "framepack": "fpack_generate_video",
    "hunyuan_image": "hunyuan_image_generate_image",
    "hunyuan_video": "hv_generate_video",
    "wan": "wan_generate_video",
}


def identify(path: Path) -> str | None:
    """Return one line about what a checkpoint or LoRA file really is, for a hint below an error.

    Returns None if no family knows the file, and for a missing file how to download it. Families and
    the list of released files are imported only here: a script that only prints its help reads none of them.
    """
    if not path.exists():
        from downloads.catalogue import download_hint

        return download_hint(path)
    for module in FAMILIES.values():
        found: str | None = import_own(module).identify(path)
        if found is not None:
            return found
    return None
