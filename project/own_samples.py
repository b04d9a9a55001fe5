"""Use images that a model generated as data for a training adapter: `new --train adapter`."""

from dataclasses import replace
from pathlib import Path

from dataset.sources.captions import caption_path
from modules.media.reading import read_tags
from project.media import FolderContent, Media

OWN, REAL, MIXED = "own", "real", "mixed"  # values of --make_adapter
OWN_FOLDER, OWN_PROMPTS = "own", "own_prompts.txt"
PROMPT = "bt_prompt"  # metadata key of generated files


def use_prompts_as_captions(content: FolderContent) -> None:
    """Take the prompts of generated images and clips as their captions, where these have none."""
    media = []
    count = 0
    for item in content.media:
        prompt = "" if item.caption is not None else _read_prompt(content, item)
        if prompt:
            content.new_captions[caption_path(item.path, content.captions)] = prompt
            item = replace(item, caption=" ".join(prompt.split()))
            count += 1
        media.append(item)
    content.media = media
    if count:
        content.lines.append(
            f"{count} generated files: their prompts are written into {content.captions} files, as captions"
        )


def balance_origins(content: FolderContent) -> None:
    """Repeat real files or generated files, whichever are fewer, until each kind fills half of the steps.

    Nothing changes if a folder holds both kinds.
    """
    by_folder: dict[Path, list[bool]] = {}
    for item in content.media:
        by_folder.setdefault(item.path.parent, []).append(bool(_read_prompt(content, item)))
    generated = {folder: len(files) for folder, files in by_folder.items() if all(files)}
    real = {folder: len(files) for folder, files in by_folder.items() if not any(files)}
    # a folder with both kinds is in neither dictionary
    if not generated or not real or len(generated) + len(real) < len(by_folder):
        return
    fewer, more = sorted((generated, real), key=lambda counts: sum(counts.values()))
    repeats = round(sum(more.values()) / sum(fewer.values()))
    if repeats > 1:
        content.repeats = dict.fromkeys(fewer, repeats)
        kind = "the model's own" if fewer is generated else "the real ones"
        content.lines.append(
            f"{kind} are fewer: num_repeats = {repeats} of their tables gives both kinds half of the steps"
        )


def find_origin(content: FolderContent) -> str:
    """Return whether a model generated all media, none or some: "own", "real" or "mixed"."""
    generated = [bool(_read_prompt(content, item)) for item in content.media]
    if all(generated):
        return OWN
    return MIXED if any(generated) else REAL


def _read_prompt(content: FolderContent, item: Media) -> str:
    """Return the prompt that a file was generated from; "" if its metadata has none."""
    path = content.first_frames.get(item.path, item.path)  # the first frame of a clip is written later
    return read_tags(path).get(PROMPT, "")
