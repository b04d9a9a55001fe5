"""Read from metadata what a Stable Diffusion model predicts: noise, or v."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from modules.control_codes import shorten

logger = logging.getLogger(__name__)

# a metadata value -> whether it means v. `v` and `epsilon` are ModelSpec's words
# (github.com/Stability-AI/ModelSpec); diffusers and other programs use the others
_PREDICTIONS = {
    "v": True,
    "v_prediction": True,
    "v_pred": True,
    "velocity": True,
    "epsilon": False,
    "eps": False,
    "eps_pred": False,
    "noise": False,
}
# ModelSpec's key, which most trainers write; ComfyUI's equivalent
_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
_V_ARCHITECTURE = "stable-diffusion-v2-768-v"  # a ModelSpec name that says so too
MAX_SHOWN = 60  # characters of a metadata value in a message


@dataclass(frozen=True)
class Prediction:
    """Prediction type of a model according to its metadata; a LoRA's metadata describes its base model."""

    velocity: bool | None  # whether it predicts v, not noise; None: not in the metadata
    zero_terminal_snr: bool
    unknown: str = ""  # a metadata entry that no known program writes, as `key = value`


def read_prediction(metadata: Mapping[str, str]) -> Prediction:
    """Return what a file's model predicts (noise or v) according to the file's metadata."""
    velocity: bool | None = None
    unknown = ""
    for key in _KEYS:
        text = metadata.get(key, "").strip()
        # None for an unknown or empty value
        predicts_v = _PREDICTIONS.get(text.lower().replace("-", "_"))
        if predicts_v is not None:
            # the first key with a known value wins
            velocity = predicts_v if velocity is None else velocity
        elif text and text.lower() != "none":
            unknown = f"{key} = {shorten(text, MAX_SHOWN)}"
    if metadata.get("modelspec.architecture", "").partition("/")[0] == _V_ARCHITECTURE:
        velocity = True
    # trainers based on sd-scripts write their options: False only means that an option was not set
    if velocity is None and metadata.get("ss_v_parameterization") == "True":
        velocity = True
    return Prediction(velocity, metadata.get("ss_zero_terminal_snr") == "True", unknown)


def compare_predictions(loras: Mapping[Path, Mapping[str, str]], predicts_v: bool) -> None:
    """Report LoRAs that were trained on a model with a different prediction type (noise or v).

    Args:
        loras: Metadata of each file.
        predicts_v: Whether the model that they are used with is assumed to predict v.
    """
    for path, metadata in loras.items():
        prediction = read_prediction(metadata)
        # velocity: whether the model predicts v; None if the metadata does not say
        if prediction.velocity is None or prediction.velocity is predicts_v:
            continue
        if prediction.velocity:
            options = "--v_parameterization"
            if prediction.zero_terminal_snr:
                options += " --zero_terminal_snr"
            logger.warning(
                "%s was trained on a model that predicts v according to its metadata, and is used with one "
                "that predicts noise. If this model predicts v too, add %s",
                path,
                options,
            )
        else:
            logger.info(
                "%s was trained on a model that predicts noise according to its metadata, and is used with "
                "one that predicts v",
                path,
            )
