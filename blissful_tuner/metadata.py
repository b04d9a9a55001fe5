"""What an output says about how it was made: `bt_*` texts in latent files, PNG and Matroska, with the known
tools' keys.
"""

import math
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from modules.atomic_write import storable
from modules.contract.generation import Request

TUNER_VERSION = "reelsmith 0.1.0"
NOT_SET = "N/A"


def output_metadata(
    request: Request,
    model: Mapping[str, str],
    loras: Sequence[tuple[str, float]] = (),
    settings: Mapping[str, Any] | None = None,
    device: str | None = None,
) -> dict[str, str]:
    """Metadata of one output: all that its pixels depend on; of files their names, without the folders they
    lie in.

    model: `Family.metadata`. loras: file name and multiplier of each LoRA. settings: the script's options
    that were given and that nothing else here says, by name. device: the kind that made it.
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


def decoded_metadata(
    saved: Mapping[str, str], settings: Mapping[str, Any], of_decoding: Collection[str], fps: float
) -> dict[str, str]:
    """Return the metadata of pixels decoded from a latent file: what that says, and what this run decoded it
    with.

    of_decoding: the options that say how latents are decoded.
    """
    kept = {
        name: text for name, text in saved.items() if name.removeprefix("bt_") not in {*of_decoding, "fps"}
    }
    values = {name: text for name, text in _recorded(settings).items() if name in of_decoding}
    return kept | {f"bt_{name}": storable(text) for name, text in {**values, "fps": f"{fps:g}"}.items()}


def _recorded(settings: Mapping[str, Any]) -> dict[str, str]:
    return {name: _as_text(value) for name, value in settings.items() if value is not None}


def _as_text(value: Any) -> str:
    if isinstance(value, Path):
        return value.name
    return shlex.join(map(str, value)) if isinstance(value, tuple) else str(value)


def _without_folders(text: str) -> str:
    """Paths, one a line or given by section (`0:a/first.png;;;1-2:b/then.png`), as the names at their
    ends.
    """
    return re.sub(r"((?:^|;;;|\n)(?:\s*-?\d+(?:-\d+)?:)?)(?:(?!;;;|\n).)*[/\\]", r"\1", text)


def as_tags(metadata: Mapping[str, str]) -> dict[str, str]:
    """The same for PNG and Matroska, where a value is one line: line breaks become a backslash and n."""
    return {key: value.replace("\r\n", "\n").replace("\n", "\\n") for key, value in metadata.items()}


def value_in(metadata: Mapping[str, str], name: str) -> str | None:
    """What a file says under `bt_{name}`, or under `name` as some of the known tools write it; None where it
    says nothing.
    """
    return metadata.get(f"bt_{name}", metadata.get(name))


def seed_in(metadata: Mapping[str, str]) -> int:
    """The seed that is stored, 0 where there is none.

    Not read as a float: that would round seeds above 2^53.
    """
    text = (value_in(metadata, "seeds") or "").strip()
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,20}", text) else 0


def frame_rate_in(metadata: Mapping[str, str]) -> float | None:
    """The frame rate that is stored, or None where there is none."""
    try:
        rate = float(value_in(metadata, "fps") or "")
    except ValueError:
        return None
    return rate if 0 < rate < math.inf else None
