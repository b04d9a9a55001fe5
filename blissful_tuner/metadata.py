"""Metadata of outputs: `bt_*` texts in latent files, PNG and Matroska, with the keys of existing tools."""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modules.atomic_write import storable
from modules.contract.generation import Request

TUNER_VERSION = "reelsmith 0.1.0"
NOT_SET = "N/A"

# options of generation scripts that are not recorded, because they change no pixel
NO_PIXELS = frozenset(
    {
        # what is written and to which path
        *("save_path", "output_type", "no_metadata", "no_progressive_save", "keep_pngs"),
        *("codec", "container"),  # the file itself stores its compression
        *("from_file", "interactive", "latent_path", "plan", "save_merged_model"),  # the mode of the run
        # memory: the result is equal to the bit
        *("blocks_to_swap", "img_in_txt_in_offloading", "vae_cache_cpu", "vae_chunk_size"),
        *("lycoris", "dit_in_channels"),  # not needed; a check
    }
)
# options recorded under these names with the value of the one video: a prompt line, an image or the task may
# override the command line
OF_REQUEST: Mapping[str, tuple[str, ...]] = {
    **{
        name: (name,)
        for name in ("prompt", "negative_prompt", "fps", "infer_steps", "guidance_scale", "cfg_schedule")
    },
    **{
        name: (name,)
        for name in ("flow_shift", "embedded_cfg_scale", "video_length", "video_seconds", "video_sections")
    },
    **{name: (name,) for name in ("image_path", "end_image_path", "control_path", "video_path", "strength")},
    **{
        name: (name,)
        for name in (
            "control_image_path",
            "control_image_mask_path",
            "task",
            "device",
            "f1",
            "latent_window_size",
        )
    },
    "seed": ("seeds",),
    "video_size": ("height", "width"),
    "one_frame_inference": ("one_frame",),
    "lora_weight": ("lora_0",),
    "lora_multiplier": ("lora_0",),
}
# settings of decoding; a run that only decodes records its own
OF_DECODING = frozenset(
    {
        "vae",
        "vae_dtype",
        "vae_tiling",
        "vae_spatial_tile_sample_min_size",
        "bulk_decode",
        "trim_tail_frames",
        "ckpt_dir",
    }
)


def output_metadata(
    request: Request,
    model: Mapping[str, str],
    loras: Sequence[tuple[str, float]] = (),
    settings: Mapping[str, Any] | None = None,
    device: str | None = None,
) -> dict[str, str]:
    """Return the metadata of one output: all that its pixels depend on; files by name, without folders.

    model: `Family.metadata`. loras: file name and multiplier of each LoRA. settings: options of the script,
    by name, whose values differ from their defaults. device: the type of device, such as cuda.
    """
    values: dict[str, object] = {
        "model_type": model.get("model_type"),
        "task": model.get("task"),
        "tunerver": TUNER_VERSION,
        "seeds": request.seed,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "infer_steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "cfg_schedule": request.cfg_schedule,
        "flow_shift": request.flow_shift,
        "height": request.height,
        "width": request.width,
        "video_length": request.frames,
        "fps": None if request.fps is None else f"{request.fps:g}",
    }
    optional: dict[str, object] = {
        "embedded_cfg_scale": request.embedded_guidance,
        "strength": None if request.video_path is None else request.strength,
        "device": device,
    }
    media = ("image_path", "end_image_path", "control_path", "video_path")
    optional |= {name: path.name for name in media if (path := getattr(request, name)) is not None}
    values |= {name: value for name, value in optional.items() if value is not None}
    values |= {
        name: _without_folders(text) if name.endswith("_path") else text
        for name, text in request.extra.items()
    }
    values |= {f"lora_{index}": f"{name}: {multiplier}" for index, (name, multiplier) in enumerate(loras)}
    values |= _recorded(settings or {})
    return {
        f"bt_{name}": NOT_SET if value is None else storable(str(value)) for name, value in values.items()
    }


def decoded_metadata(saved: Mapping[str, str], settings: Mapping[str, Any], fps: float) -> dict[str, str]:
    """Return the metadata of pixels decoded from a latent file: the file's own and this run's settings."""
    kept = {
        name: text for name, text in saved.items() if name.removeprefix("bt_") not in OF_DECODING | {"fps"}
    }
    values = {name: text for name, text in _recorded(settings).items() if name in OF_DECODING}
    return kept | {f"bt_{name}": storable(text) for name, text in {**values, "fps": f"{fps:g}"}.items()}


def _recorded(settings: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: _as_text(value)
        for name, value in settings.items()
        if name not in NO_PIXELS and name not in OF_REQUEST and value is not None
    }


def _as_text(value: Any) -> str:
    if isinstance(value, Path):
        return value.name
    return shlex.join(map(str, value)) if isinstance(value, tuple) else str(value)


def _without_folders(text: str) -> str:
    """Reduce paths, one per line or by section (`0:a/first.png;;;1-2:b/then.png`), to file names."""
    return re.sub(r"((?:^|;;;|\n)(?:\s*-?\d+(?:-\d+)?:)?)(?:(?!;;;|\n).)*[/\\]", r"\1", text)


def as_tags(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return metadata for PNG and Matroska, whose values are one line: a line break becomes a `\\n`."""
    return {key: value.replace("\r\n", "\n").replace("\n", "\\n") for key, value in metadata.items()}


def value_in(metadata: Mapping[str, str], name: str) -> str | None:
    """Return the value of `bt_{name}`, or of `name` as some existing tools write it; None if missing."""
    return metadata.get(f"bt_{name}", metadata.get(name))


def seed_in(metadata: Mapping[str, str]) -> int:
    """Return the stored seed, 0 if there is none. Not read as a float, which would round seeds above 2^53."""
    text = (value_in(metadata, "seeds") or "").strip()
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,20}", text) else 0


def frame_rate_in(metadata: Mapping[str, str]) -> float | None:
    """Return the stored frame rate, or None."""
    try:
        rate = float(value_in(metadata, "fps") or "")
    except ValueError:
        return None
    return rate if 0 < rate < math.inf else None
