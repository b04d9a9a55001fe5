"""Images that a model generated itself, as data for a training adapter: `new --train adapter`."""

from dataclasses import replace

from dataset.sources.captions import caption_path
from modules.media.reading import read_tags
from project.media import FolderContent, Media

OWN, REAL, MIXED = "own", "real", "mixed"  # values of --make_adapter
OWN_FOLDER, OWN_PROMPTS = "own", "own_prompts.txt"
PROMPT = "bt_prompt"  # in what a generation writes into its results


def take_prompts(content: FolderContent) -> None:
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
