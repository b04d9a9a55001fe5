"""Metadata of outputs: `bt_*` texts in latent files, images and videos, with the keys of existing tools."""

import json
import math
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from modules.atomic_write import replace_surrogates
from modules.version import VERSION
from protocols.requests import Box, Prepared
from protocols.rules import ONE_EXPERT, Expert

TUNER_VERSION = f"reelsmith {VERSION}"
NOT_SET = "N/A"
CREATED = "creation_timestamp"
SHOWN = "shown_part"  # region of the decoded pixels that is the result: left, top, width and height

# keys that the known FramePack tools write into latent files without a prefix, and read from there
PLAIN = (
    "seeds",
    "prompt",
    "negative_prompt",
    "height",
    "width",
    "video_seconds",
    "fps",
    "infer_steps",
    "guidance_scale",
    "embedded_cfg_scale",
    "guidance_rescale",
    "latent_window_size",
    "sample_solver",
)


# the folders in a list of paths, one path per line or by section: `0:a/first.png;;;1-2:b/then.png`
_FOLDERS = re.compile(r"((?:^|;;;|\n)(?:\s*-?\d+(?:-\d+)?:)?)(?:(?!;;;|\n).)*[/\\]")


def output_metadata(
    prepared: Prepared,
    model: Mapping[str, str],
    loras: Mapping[str, Sequence[tuple[str, float]]] | None = None,
    settings: Mapping[str, Any] | None = None,
    device: str | None = None,
    created: datetime | None = None,
    experts: Sequence[Expert] = ONE_EXPERT,
) -> dict[str, str]:
    """Return the metadata of one output: everything its pixels depend on, with file names, not paths.

    1. Record the request: prompts, seed, size and guidance.
    2. Add the LoRAs, and what only some models have, such as several transformers.
    3. Add the other options of the run and of the prompt line, and prefix all names with bt_.

    Args:
        prepared: The request.
        model: `Family.metadata`.
        loras: File name and strength of each LoRA, by expert; "" is the only or the low-noise expert.
        settings: Other options that were given to the script, by name.
        device: Type of the device that computed the output.
        created: Time of creation.
        experts: `Family.experts`.
    """
    values: dict[str, object] = {
        "model_type": model.get("model_type"),
        "task": model.get("task"),
        "tunerver": TUNER_VERSION,
        "seeds": prepared.seed,
        "prompt": prepared.request.prompt,
        "negative_prompt": prepared.negative_prompt,
        "infer_steps": prepared.steps,
        # a number would say that the last steps have it too
        "guidance_scale": None if prepared.rules.final_steps else prepared.guidance_scale[0],
        "cfg_schedule": prepared.request.cfg_schedule,
        "flow_shift": prepared.flow_shift,
        "height": prepared.height,
        "width": prepared.width,
        "video_length": prepared.frames,
        "fps": f"{prepared.fps:g}",
    }
    values |= _list_optional(prepared, device, created)
    if len(experts) > 1 or prepared.request.expert_guidance:
        values |= _describe_experts(prepared, experts)
    if prepared.visible_region is not None:
        values[SHOWN] = " ".join(map(str, prepared.visible_region))
    for name, text in prepared.extra_metadata.items():
        values[name] = _FOLDERS.sub(r"\1", text) if name.endswith("_path") else text  # without folders
    for expert_name, files in (loras or {}).items():
        for index, (name, multiplier) in enumerate(files):
            values[f"{lora_name(expert_name)}_{index}"] = f"{name}: {multiplier}"
    # the run's options, then the prompt line's, override the values above
    values |= _record({**(settings or {}), **prepared.request.settings})
    return {
        f"bt_{name}": NOT_SET if value is None else replace_surrogates(str(value))
        for name, value in values.items()
    }


def _describe_experts(prepared: Prepared, experts: Sequence[Expert]) -> dict[str, object]:
    """Return metadata for models with several experts: guidance scales, and where the later ones begin."""
    values: dict[str, object] = {}
    for name, scale in prepared.request.expert_guidance.items():
        values[f"guidance_scale_{name}"] = scale
    boundaries = []
    for expert, scale in list(zip(experts, prepared.guidance_scale, strict=True))[1:]:
        values[f"guidance_scale_{expert.name}"] = scale
        boundaries.append(f"{expert.min_timestep:g}")
    if boundaries:
        values["timestep_boundary"] = ", ".join(boundaries)
    return values


def _list_optional(prepared: Prepared, device: str | None, created: datetime | None) -> dict[str, object]:
    """Return the metadata values that only some outputs have."""
    request = prepared.request
    values: dict[str, object] = {
        "embedded_cfg_scale": prepared.embedded_guidance,
        "nag_prompt": request.nag_prompt,
        "prompt_2": request.second_prompt,
        "device": device,
        CREATED: None if created is None else created.isoformat(timespec="seconds"),
    }
    if request.source is not None:
        values |= request.source.to_metadata()
    # original prompts, before wildcards were drawn
    values |= {f"original_{name}": text for name, text in request.typed_texts.items()}
    for name in ("image_path", "end_image_path", "control_path"):
        path = getattr(request, name)
        if path is not None:
            values[name] = path.name
    values["control_image_path"] = "\n".join(path.name for path in request.control_images) or None
    return {name: value for name, value in values.items() if value is not None}


def lora_name(expert: str) -> str:
    """Return the metadata key of an expert's LoRAs: `lora_high_noise`, or `lora` without an expert name."""
    return f"lora_{expert}" if expert else "lora"


def read_decoded_metadata(
    latent_metadata: Mapping[str, str],
    settings: Mapping[str, Any],
    decoding_options: Collection[str],
    fps: float,
) -> dict[str, str]:
    """Return the metadata of pixels decoded from a latent file.

    This is the latent file's own metadata plus this run's decoding options.

    Args:
        latent_metadata: Metadata of the latent file.
        settings: Options that were given to this run, by name.
        decoding_options: Names of the options that affect the decoding of latents.
        fps: Frames per second.
    """
    replaced = {*decoding_options, "fps"}
    tags = {name: text for name, text in latent_metadata.items() if name.removeprefix("bt_") not in replaced}
    # a latent file stores some bt_ values without the prefix, too: drop these copies
    tags = {name: text for name, text in tags.items() if f"bt_{name}" not in tags}
    decoding_values = {name: text for name, text in _record(settings).items() if name in decoding_options}
    decoding_values["fps"] = f"{fps:g}"
    return tags | {f"bt_{name}": replace_surrogates(text) for name, text in decoding_values.items()}


def _record(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return option values as strings, with paths reduced to file names."""
    texts = {}
    for name, value in settings.items():
        if isinstance(value, Path):
            texts[name] = value.name
        elif isinstance(value, tuple):
            texts[name] = shlex.join(item.name if isinstance(item, Path) else str(item) for item in value)
        elif value is not None:
            texts[name] = str(value)
    return texts


def with_plain_keys(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return a latent file's metadata under both keys that other tools read, such as `bt_seeds` and `seeds`.

    Only for latent files: in a PNG, `prompt` without a prefix is the workflow of another program.
    """
    texts = {name: metadata.get(f"bt_{name}", NOT_SET) for name in PLAIN}
    return {**metadata, **{name: text for name, text in texts.items() if text != NOT_SET}}


def as_tags(metadata: Mapping[str, str]) -> dict[str, str]:
    r"""Return metadata for PNG and videos, whose values are single lines: line breaks become `\n`."""
    return {key: value.replace("\r\n", "\n").replace("\n", "\\n") for key, value in metadata.items()}


NEGATIVE = "Negative prompt:"
# name in `parameters` -> key of the metadata
PARAMETERS = {
    "Steps": "infer_steps",
    "Sampler": "sample_solver",
    "CFG scale": "guidance_scale",
    "Seed": "seeds",
}


def as_png_texts(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return metadata for PNG: the tags and, if there is a prompt, `parameters` for image viewers.

    `parameters` is the format of AUTOMATIC1111's web UI: the lines of the prompt, a line with the negative
    prompt, and a line with all settings. If a line of the prompt could be mistaken for one of these, the
    prompt is joined into one line.
    """
    prompt = read_value(metadata, "prompt")
    if prompt is None:
        return as_tags(metadata)
    # readers would mistake such a prompt line for the negative prompt
    if any(line.strip().startswith(NEGATIVE) for line in prompt.splitlines()[1:]):
        prompt = " ".join(prompt.split())
    lines = [prompt.strip()]
    negative = read_value(metadata, "negative_prompt")
    if negative and negative != NOT_SET:
        lines.append(f"{NEGATIVE} {negative.strip()}")
    # The last line of the `parameters` text, which lists the generation settings
    settings = []
    for name, text in _list_parameters(metadata).items():
        if text and text != NOT_SET:
            has_separator = re.search(r"[,:\n\"]", text)
            quoted = json.dumps(text, ensure_ascii=False) if has_separator else text
            settings.append(f"{name}: {quoted}")
    lines.append(", ".join(settings))
    return as_tags(metadata) | {"parameters": "\n".join(lines)}


def _list_parameters(metadata: Mapping[str, str]) -> dict[str, str | None]:
    """Return the recorded generation settings under their names in the A1111-style `parameters` text."""
    values = {name: read_value(metadata, key) for name, key in PARAMETERS.items()}
    width = read_value(metadata, "width")
    height = read_value(metadata, "height")
    values["Size"] = f"{width}x{height}" if width and height else None
    file = read_value(metadata, "dit")
    model = [read_value(metadata, name) for name in ("model_type", "task")]
    names = " ".join(part for part in model if part and part != NOT_SET)
    values["Model"] = Path(file).stem if file else names
    values["Version"] = read_value(metadata, "tunerver")
    return values


def read_value(metadata: Mapping[str, str], name: str) -> str | None:
    """Return a setting from metadata, stored with or without the prefix `bt_`; None if it is missing."""
    return metadata.get(f"bt_{name}", metadata.get(name))


def read_stored_seed(metadata: Mapping[str, str]) -> int:
    """Return the seed in metadata, or 0. It is parsed as an integer, because floats round above 2^53."""
    text = (read_value(metadata, "seeds") or "").strip()
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,20}", text) else 0


def read_frame_rate(metadata: Mapping[str, str]) -> float | None:
    """Return the frame rate in metadata; None if it is missing or not a positive number."""
    try:
        rate = float(read_value(metadata, "fps") or "")
    except ValueError:
        return None
    return rate if 0 < rate < math.inf else None


def read_visible_region(metadata: Mapping[str, str]) -> Box | None:
    """Return the region of the decoded pixels to keep, read from the metadata; None for the whole frame."""
    text = read_value(metadata, SHOWN) or ""
    if not re.fullmatch(r"[0-9]{1,5}( [0-9]{1,5}){3}", text):
        return None
    return Box(*map(int, text.split()))
