"""What an output says about how it was made: `bt_*` texts in latent files, PNG and Matroska, with the known tools' keys."""

import math
import re
from collections.abc import Mapping, Sequence

from modules.records import Request

TUNER_VERSION = "reelsmith 0.1.0"
NOT_SET = "N/A"


def output_metadata(request: Request, model: Mapping[str, str], loras: Sequence[tuple[str, float]] = ()) -> dict[str, str]:
    """Metadata of one output. model: `Family.metadata`. loras: file name and multiplier of each LoRA."""
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
    if request.embedded_guidance is not None:
        values["embedded_cfg_scale"] = request.embedded_guidance
    if request.video_path is not None:
        values |= {"video": request.video_path.name, "strength": request.strength}
    values |= {name: text for name, text in request.extra.items() if not name.endswith("_path")}
    values |= {f"lora_{index}": f"{name}: {multiplier}" for index, (name, multiplier) in enumerate(loras)}
    return {f"bt_{name}": NOT_SET if value is None else str(value) for name, value in values.items()}


def as_tags(metadata: Mapping[str, str]) -> dict[str, str]:
    """The same for PNG and Matroska, where a value is one line: line breaks become a backslash and n."""
    return {key: value.replace("\r\n", "\n").replace("\n", "\\n") for key, value in metadata.items()}


def value_in(metadata: Mapping[str, str], name: str) -> str | None:
    """What a file says under `bt_{name}`, or under `name` as some of the known tools write it; None where it says nothing."""
    return metadata.get(f"bt_{name}", metadata.get(name))


def seed_in(metadata: Mapping[str, str]) -> int:
    """The seed that is stored, 0 where there is none. Not read as a float: that would round seeds above 2^53."""
    text = (value_in(metadata, "seeds") or "").strip()
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,20}", text) else 0


def frame_rate_in(metadata: Mapping[str, str]) -> float | None:
    """The frame rate that is stored, or None where there is none."""
    try:
        rate = float(value_in(metadata, "fps") or "")
    except ValueError:
        return None
    return rate if 0 < rate < math.inf else None
