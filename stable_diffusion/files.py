"""Recognize which kind of Stable Diffusion a checkpoint is, from its tensor names.

Released single files have the names of the training code (LDM): the U-Net, the autoencoder and the text
encoders each under a prefix, and the prefixes of the text encoders tell the kind.
"""

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from checkpoints.kinds import describe_file_kind
from checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError, OptionError
from networks.predictions import read_prediction
from protocols.families import describe_scripts
from stable_diffusion.contract import SD1, SD2, SDXL, ModelKind
from stable_diffusion.options import ModelOptions

logger = logging.getLogger(__name__)

UNET = "model.diffusion_model."
VAE = "first_stage_model."
V_PRED, ZTSNR = "v_pred", "ztsnr"  # tensors that say what the model predicts; they have no values
EMA = "model_ema."  # averages of the U-Net that trainers keep; not used

EXPECTED_FILE = (
    "a checkpoint of Stable Diffusion 1.x, 2.x or XL: one file with U-Net, VAE and text encoders, or a "
    "folder in the layout of diffusers"
)

# prefix of a tensor's name that only one kind has -> the kind
_KIND_BY_PREFIX = (
    ("conditioner.embedders.1.model.", SDXL),
    ("cond_stage_model.model.", SD2),
    ("cond_stage_model.transformer.", SD1),
)
# prefixes of unsupported models that share some of these names -> what the model is and why it cannot be
# used; the first match counts
_UNSUPPORTED_BY_PREFIX = (
    ("model.diffusion_model.joint_blocks.", "Stable Diffusion 3, which has a different architecture"),
    ("joint_blocks.", "the transformer of Stable Diffusion 3, which has a different architecture"),
    ("model.diffusion_model.double_blocks.", "FLUX or HunyuanVideo; their own scripts generate with it"),
    ("double_blocks.", "FLUX or HunyuanVideo; their own scripts generate with it"),
    ("model.diffusion_model.clf.", "Stable Cascade, which has a different architecture"),
    ("edm_mean", "Playground 2.5, whose noise follows another formula (EDM)"),
    ("edm_vpred.", "CosXL, whose noise follows another formula (EDM)"),
    ("depth_model.", "Stable Diffusion 2 with depth, which needs a depth map in addition to the image"),
    ("embedder.model.", "Stable unCLIP, whose U-Net takes the embedding of an image"),
    ("control_model.", "a ControlNet (--control_net_models)"),
    ("lllite_unet", "a ControlNet-LLLite (--control_net_lllite_models)"),
    ("lora_unet_", "a LoRA (--network_weights)"),
    ("lora_te", "a LoRA (--network_weights)"),
)
_REFINER = "the refiner of Stable Diffusion XL, which only finishes images of the base model"


@dataclass(frozen=True)
class ModelType:
    """Kind and prediction type of a checkpoint; its tensor sizes do not show them."""

    kind: ModelKind
    predicts_velocity: bool
    zero_terminal_snr: bool
    # where the file says that the model predicts v, such as "its metadata"
    recorded_in: str = field(default="", compare=False)

    def describe_prediction(self) -> str:
        """Describe what the model predicts, such as "predicts v"; "" for noise."""
        if not self.predicts_velocity:
            return ""
        also = " with a zero terminal SNR" if self.zero_terminal_snr else ""
        return f"predicts v{also}, as {self.recorded_in} says" if self.recorded_in else f"predicts v{also}"


def read_model_type(path: Path, names: Collection[str], metadata: Mapping[str, str]) -> ModelType:
    """Return the model kind of a checkpoint with these tensor names, and what its U-Net predicts.

    Tensors take precedence over metadata, because all programs read them.

    Raises:
        CheckpointError: If the file is something else; the message says what it is or lacks.
    """
    # The model kind of a checkpoint with these tensor names
    kind = _find_kind(names)
    other_model = _describe_other(names, kind)
    if other_model is not None:
        raise CheckpointError(f"--ckpt {path} looks like {other_model}.\n  Pass {EXPECTED_FILE}.", path)
    missing = []
    if not _has_prefix(names, UNET):
        missing.append("U-Net")
    if not _has_prefix(names, VAE):
        missing.append("VAE")
    if kind is None:
        missing.append("text encoder")
    if missing:
        description = describe_file_kind(names)
        resemblance = f"; it looks like {description}" if description is not None else ""
        raise CheckpointError(
            f"--ckpt {path} has no {', no '.join(missing)}{resemblance}.\n  Pass {EXPECTED_FILE}.",
            path,
        )
    assert kind is not None
    declared = read_prediction(metadata)
    has_marker = V_PRED in names  # an empty tensor that marks models that predict v
    if declared.unknown and not has_marker:
        logger.warning(
            "%s: its metadata says %s, which is unknown; the model is assumed to predict noise unless "
            "--v_parameterization is given",
            path,
            declared.unknown,
        )
    predicts_velocity = has_marker or declared.velocity is True  # None if the metadata does not say so
    recorded_in = ""
    if predicts_velocity:
        recorded_in = f"its tensor {V_PRED}" if has_marker else "its metadata"
    return ModelType(
        kind,
        predicts_velocity,
        zero_terminal_snr=ZTSNR in names or (predicts_velocity and declared.zero_terminal_snr),
        recorded_in=recorded_in,
    )


def check_kind_flags(options: ModelOptions, kind: ModelKind) -> None:
    """Raise OptionError if --v1, --v2 or --sdxl contradicts the checkpoint."""
    flags = (("--v1", options.v1, SD1), ("--v2", options.v2, SD2), ("--sdxl", options.sdxl, SDXL))
    for flag, is_given, flag_kind in flags:
        if not is_given:
            continue
        if flag_kind is not kind:
            raise OptionError(
                f"{flag}: {options.ckpt} is {kind.title}, by its tensors. Omit {flag}, or pass a "
                f"checkpoint of {flag_kind.title}."
            )
        return  # only the first flag is checked


def identify(path: Path) -> str | None:
    """Describe a checkpoint file or folder of this family; return None for anything else."""
    try:
        if path.is_dir():
            if not (path / "unet" / "config.json").is_file():
                return None
            # SD1 also stands for SD2, which has the same scripts
            family = "sdxl" if (path / "text_encoder_2").is_dir() else "sd1"
            return f"it is a Stable Diffusion folder. {describe_scripts(family)}"
        with open_checkpoint(path) as checkpoint:
            kind = _find_kind(checkpoint.tensors)
            if kind is None or _describe_other(checkpoint.tensors, kind) is not None:
                return None
    except (CheckpointError, OSError):
        return None
    family = "sdxl" if kind is SDXL else "sd1"
    return f"it is a {kind.title} checkpoint. {describe_scripts(family)}"


def _find_kind(names: Iterable[str]) -> ModelKind | None:
    starts = {".".join(name.split(".")[:4]) + "." for name in names if not name.startswith((UNET, VAE))}
    return next((kind for prefix, kind in _KIND_BY_PREFIX if _has_prefix(starts, prefix)), None)


def _describe_other(names: Collection[str], kind: ModelKind | None) -> str | None:
    """Describe the unsupported model that has these tensor names; None if the model may be supported."""
    for prefix, description in _UNSUPPORTED_BY_PREFIX:
        if _has_prefix(names, prefix):
            return description
    if kind is None and _has_prefix(names, "conditioner.embedders.0.model."):
        return _REFINER
    if kind is SD2 and f"{UNET}label_emb.0.0.weight" in names:
        return "Stable unCLIP, whose U-Net takes the embedding of an image"
    if kind is SD2 and f"{UNET}label_emb.weight" in names:
        return "the upscaler of Stable Diffusion 2, which makes no images from text alone"
    return None


def _has_prefix(names: Iterable[str], start: str) -> bool:
    return any(name.startswith(start) for name in names)
