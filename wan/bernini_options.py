"""Options of Bernini-R: the sentence in front of prompts, and how the passes of a step are combined.

Source: the released code and its documentation (bytedance/Bernini).
"""

import json
from pathlib import Path
from typing import NamedTuple

from modules.options import IDENTITY, Options, make_request_facts, option

SENTENCE_START = "You are a helpful assistant"
# The model's own inputs, byte for byte: in front of a prompt, without a space
SENTENCES = {
    **{
        topic: f"{SENTENCE_START} specialized in {use}."
        for topic, use in (
            ("t2i", "text-to-image generation"),
            ("t2v", "text-to-video generation"),
            ("i2i", "image editing"),
            ("i2v", "image-to-video generation"),
            ("r2i", "subject-to-image generation"),
            ("r2v", "subject-to-video generation"),
            ("v2v", "video editing"),
            ("vi2v", "video editing on content propagation"),
            ("rv2v", "video editing with reference"),
            ("vr2v", "video editing with reference"),
            ("ads2v", "ads insertion"),
        )
    },
    "vrc2v": f"{SENTENCE_START} for editing. You may need to adjust the subject's action or position.",
    "mv2v": f"{SENTENCE_START} for editing. You might need to adjust the video's style, lighting, colors, "
    "textures, and the subject's pose or action.",
    "other": f"{SENTENCE_START}.",
    "none": "",
}
AUTO = "auto"
DEFAULT_TOPIC = "v2v"  # of a training


class GuidanceMode(NamedTuple):
    """The passes of a step, from the plainest to the one with all sources and the prompt, and their weights.

    The passes with the negative prompt see no sources (0), the first video alone (1), or all of them (None).
    """

    sources: tuple[int | None, ...]
    weights: tuple[str, ...] = ()  # of the links between them: options; that of the prompt's link is missing
    is_projected: bool = False  # the links are projected as in `ReferenceGuidance`


VIDEO_SCALE, IMAGE_SCALE = "guidance_scale_video", "guidance_scale_images"
MODES = {
    "v2v": GuidanceMode((None,)),
    "rv2v": GuidanceMode((0, 1, None), (VIDEO_SCALE, IMAGE_SCALE)),
    "v2v_chain": GuidanceMode((0, 1), (VIDEO_SCALE,)),
    "v2v_apg": GuidanceMode((None,), is_projected=True),
    "r2v_apg": GuidanceMode((0, None), (IMAGE_SCALE,), is_projected=True),
    "t2v": GuidanceMode((0,)),
    "t2v_apg": GuidanceMode((0,), is_projected=True),
}
PROMPT_KEY, MODE_KEY = "bernini_prompt", "bernini_guidance"
BERNINI_EXTRAS = (PROMPT_KEY, MODE_KEY, VIDEO_SCALE, IMAGE_SCALE)  # keys of `Request.extra`
# as the release's command line
DEFAULT_SCALES = {VIDEO_SCALE: 1.25, IMAGE_SCALE: 4.5}
MAX_WEIGHT = 100
LOW_NOISE_FACTOR = 0.8  # on all weights, from the first step of the low-noise expert on


MODEL_TYPE = "bernini_renderer"  # in config.json of the release's folder for diffusers


def find_named_sign(dit: Path | None) -> str:
    """Return what, beside the tensors, shows that a transformer's file is Bernini-R's; "" if nothing does."""
    if dit is None:
        return ""
    folders = [dit, dit.absolute().parent]
    if folders[-1].name.startswith("transformer"):  # a release has a folder for each network
        folders.append(folders[-1].parent)
    for folder in folders:
        try:
            settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(settings, dict) and settings.get("model_type") == MODEL_TYPE:
            return f"{folder / 'config.json'} says {MODEL_TYPE}"
    named = next((path.name for path in folders if "bernini" in path.name.lower()), None)
    return "" if named is None else f"its name says so ({named})"


def choose_topic(is_still: bool, num_videos: int, num_images: int) -> str:
    """Return the topic of a request with these sources; `is_still`: it makes an image."""
    if num_videos:
        return "rv2v" if num_images else "v2v"
    if num_images:
        return "i2i" if is_still else "r2v"
    return "t2i" if is_still else "t2v"


def choose_mode(topic: str, num_videos: int, num_images: int) -> str:
    """Return the release's guidance mode for a request with these sources."""
    if topic == "i2i":
        return "v2v"
    if num_videos:
        return "rv2v" if num_images else "v2v_apg"
    return "r2v_apg" if num_images else "t2v_apg"


_SENTENCE = "Bernini: what the sentence in front of captions says that they are for"


class BerniniTextCachingOptions(Options, title="Bernini"):
    """The sentence with which captions are encoded."""

    bernini_prompt: str | None = option(
        f"{_SENTENCE}; default: no sentence, as captions of Wan have it", choices=tuple(SENTENCES)
    )


class BerniniTrainingOptions(Options, title="Bernini"):
    """The sentence that cached captions have, and samples get."""

    bernini_prompt: str | None = option(
        f"{_SENTENCE}, as they were cached; samples get it too; default: {DEFAULT_TOPIC}",
        choices=tuple(SENTENCES),
        facts=IDENTITY,
    )


class BerniniGenerationOptions(Options, title="Bernini"):
    """The sentence in front of the prompt, and guidance by sources."""

    bernini_prompt: str | None = option(
        "Bernini: what the sentence in front of the prompt says that it is for; default: auto, by sources",
        choices=(AUTO, *SENTENCES),
        facts=make_request_facts(PROMPT_KEY),
    )
    bernini_guidance: str | None = option(
        "Bernini: which passes a step has, and how they are combined; t2v is a preview in two "
        "passes; default: auto, as the release",
        choices=(AUTO, *MODES),
        facts=make_request_facts(MODE_KEY),
    )
    guidance_scale_video: float | None = option(
        f"Bernini: weight of the first source video; default: {DEFAULT_SCALES[VIDEO_SCALE]:g}",
        minimum=-MAX_WEIGHT,
        maximum=MAX_WEIGHT,
        facts=make_request_facts(VIDEO_SCALE),
    )
    guidance_scale_images: float | None = option(
        f"Bernini: weight of the source images; default: {DEFAULT_SCALES[IMAGE_SCALE]:g}",
        minimum=-MAX_WEIGHT,
        maximum=MAX_WEIGHT,
        facts=make_request_facts(IMAGE_SCALE),
    )
