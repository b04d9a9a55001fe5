"""Load a checkpoint: find its kind, load its networks onto the device, and its tokenizers.

Everything is planned and compared first, so that a wrong or damaged file costs no loading: dimensions, names
and shapes of all tensors, tokenizers, the package for attention.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from checkpoints.dialects import LoadPlan, load_planned
from checkpoints.model_files import find_model_folder
from checkpoints.opening import SUFFIXES, open_checkpoint
from encoders.clip_layers import ClipText, check_activation
from modules.attention.attend import check_backend
from modules.devices import dtype_name
from modules.errors import CheckpointError, OptionError
from modules.paths import explain_missing
from modules.speed_options import AttentionChoice
from stable_diffusion import checkpoints, folders
from stable_diffusion.contract import SD2, SDXL, LoadedTextEncoder, Model, ModelKind
from stable_diffusion.diffusers_parts import make_xformers_processor, unet_class, vae_class
from stable_diffusion.files import EMA, EXPECTED_FILE, UNET, ModelType, check_kind_flags, read_model_type
from stable_diffusion.options import ModelOptions
from stable_diffusion.text_checkpoints import TextPlan, read_texts
from stable_diffusion.tokenizers import OPEN_CLIP_PAD, check_vocabulary, load_tokenizers

logger = logging.getLogger(__name__)

META = torch.device("meta")


@dataclass(frozen=True)
class CheckpointPlan:
    """A checkpoint with open files and a load plan for each network."""

    path: Path
    model_type: ModelType
    unet: LoadPlan[checkpoints.UnetSizes]
    vae: LoadPlan[checkpoints.VaeSizes]
    text_encoders: tuple[TextPlan, ...]

    @property
    def kind(self) -> ModelKind:
        """Kind of the opened checkpoint."""
        return self.model_type.kind


def load_checkpoint(options: ModelOptions, checkpoint_plan: CheckpointPlan, device: torch.device) -> Model:
    """Load the networks that `plan_checkpoint` has planned, in evaluation mode; its files must still be open.

    Raises CheckpointError, before anything is loaded, if a file is damaged or of another kind.
    """
    # find the tokenizers and check all files
    dtype = _select_dtype(options)
    vae_dtype = torch.float32 if options.no_half_vae else dtype
    tokenizers = load_tokenizers(
        options.tokenizer_cache_dir,
        checkpoint_plan.path,
        [plan.is_open_clip for plan in checkpoint_plan.text_encoders],
    )
    for tokenizer, plan in zip(tokenizers, checkpoint_plan.text_encoders, strict=True):
        check_vocabulary(tokenizer, plan.load_plan.config.vocabulary, checkpoint_plan.path)
    parts = _make_networks(checkpoint_plan, dtype, vae_dtype)
    _fill(parts, META)  # compares names and shapes; reads nothing
    description = checkpoint_plan.kind.title
    if checkpoint_plan.unet.config.get("in_channels") == 9:  # 4 noisy, 4 of the masked image, 1 mask
        description += ", inpainting"
    if checkpoint_plan.model_type.describe_prediction():
        description += f", which {checkpoint_plan.model_type.describe_prediction()}"
    logger.info(
        "Loading %s: %s, as %s, VAE as %s",
        checkpoint_plan.path,
        description,
        dtype_name(dtype),
        dtype_name(vae_dtype),
    )
    if checkpoint_plan.kind is SDXL and vae_dtype == torch.float16 and options.vae is None:
        logger.warning(
            "The released VAE of Stable Diffusion XL overflows in float16 and then makes black pictures. If "
            "that happens, add --no_half_vae, or --vae with the fixed one (madebyollin/sdxl-vae-fp16-fix)"
        )
    # read the weights
    _fill(parts, device)
    *texts, unet, vae = (network for network, *_ in parts)  # in the order of `_make_networks`
    tower_parts = zip(
        checkpoint_plan.text_encoders, texts, tokenizers, checkpoint_plan.kind.lora_prefixes, strict=True
    )
    text_encoders = tuple(
        LoadedTextEncoder(
            network=network,
            tokenize=tokenizer.tokenize,
            bos_token_id=tokenizer.start,
            eos_token_id=tokenizer.end,
            pad_token_id=OPEN_CLIP_PAD if plan.is_open_clip else tokenizer.end,
            lora_prefix=lora_prefix,
            missing_layers=1
            if checkpoint_plan.kind is SD2
            else 0,  # the last layer is never used, so not loaded
        )
        for plan, network, tokenizer, lora_prefix in tower_parts
    )
    _set_computation(options, unet, vae)
    return Model(
        kind=checkpoint_plan.kind,
        path=checkpoint_plan.path,
        unet=unet,
        vae=vae,
        text_encoders=text_encoders,
        predicts_velocity=checkpoint_plan.model_type.predicts_velocity or options.v_parameterization,
        zero_terminal_snr=checkpoint_plan.model_type.zero_terminal_snr,
        device=device,
        dtype=dtype,
        vae_dtype=vae_dtype,
    )


def _set_computation(options: ModelOptions, unet: Any, vae: Any) -> None:
    """Apply the options that change how networks compute but not their weights."""
    if options.xformers or options.diffusers_xformers:
        unet.set_attn_processor(make_xformers_processor())  # otherwise diffusers chooses torch's attention
    if options.diffusers_xformers:
        vae.set_attn_processor(make_xformers_processor())
    if options.opt_channels_last:
        for network in (unet, vae):
            network.to(memory_format=torch.channels_last)
    if options.vae_slices is not None and options.vae_slices > 1:
        checkpoints.band_convolutions(vae, options.vae_slices)


def plan_checkpoint(options: ModelOptions, files: ExitStack) -> CheckpointPlan:
    """Find and open the files of --ckpt and --vae, and plan how their networks are loaded.

    Args:
        options: Options of the run.
        files: Closes the files.

    Raises:
        OptionError: If an option contradicts the files.
        CheckpointError: If the files cannot be used.
    """
    path = find_checkpoint(options.ckpt)
    if path.is_dir():
        model_type = folders.read_folder_model_type(path)
        check_kind_flags(options, model_type.kind)
        has_config = (path / "scheduler" / "scheduler_config.json").is_file()
        if options.v_parameterization and has_config and not model_type.predicts_velocity:
            raise OptionError(
                f"--v_parameterization: the scheduler/scheduler_config.json of {path} says that the model "
                'predicts noise. Leave it out, or write "prediction_type": "v_prediction" there if that is '
                "wrong"
            )
        texts = folders.read_folder_texts(path, model_type.kind, files)
        unet = folders.read_folder_unet(path, files)
        vae = read_chosen_vae(
            options.vae or path / "vae", "--ckpt" if options.vae is None else "--vae", model_type.kind, files
        )
    else:
        checkpoint = files.enter_context(open_checkpoint(path))
        model_type = read_model_type(path, checkpoint.tensors, checkpoint.metadata)
        check_kind_flags(options, model_type.kind)
        averages = sum(name.startswith(EMA) for name in checkpoint.tensors)
        if averages:
            logger.info(
                "%s: %d averaged tensors (model_ema.) are not used; the U-Net next to them is", path, averages
            )
        texts = read_texts(checkpoint, model_type.kind)
        # "": all tensors with another prefix belong to other networks, and are left out
        unet_part = checkpoint.without_prefix(UNET, others=("",))
        unet = checkpoints.read_unet(unet_part, model_type.kind, _find_pooled_width(texts))
        vae = (
            checkpoints.read_vae(checkpoint, "--ckpt", model_type.kind.latent_scale)
            if options.vae is None
            else read_chosen_vae(options.vae, "--vae", model_type.kind, files)
        )
    checkpoint_plan = CheckpointPlan(path, model_type, unet=unet, vae=vae, text_encoders=texts)
    _check_together(checkpoint_plan)
    return checkpoint_plan


def find_checkpoint(ckpt: Path) -> Path:
    """Return the file or folder that --ckpt names; `owner/name` is downloaded if it is not a local path.

    Raises:
        CheckpointError: If it is missing, or if a folder is not in diffusers' layout.
    """
    if ckpt.is_dir():
        if (ckpt / "unet").is_dir() or (ckpt / "model_index.json").is_file():
            return ckpt
        names = ", ".join(sorted(file.name for file in ckpt.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"--ckpt {ckpt}: the folder is not in the layout of diffusers; it has no unet (it holds {names})."
            f"\n  Give {EXPECTED_FILE}.",
            ckpt,
        )
    if ckpt.exists() or not _is_of_hub(ckpt):
        _require(ckpt, "--ckpt", EXPECTED_FILE)
        return ckpt
    return find_model_folder("--ckpt", ckpt.as_posix(), folders.PATTERNS)


def _is_of_hub(path: Path) -> bool:
    return path.suffix.lower() not in SUFFIXES and path.as_posix().count("/") == 1


def _require(path: Path, option: str, give: str) -> None:
    if not path.exists():
        raise CheckpointError(
            f"{option} {path}: there is no such file or folder.{explain_missing(path)}\n  Give {give}.", path
        )


def read_chosen_vae(
    path: Path, option: str, kind: ModelKind, files: ExitStack
) -> LoadPlan[checkpoints.VaeSizes]:
    """Plan how to load the VAE of --vae or of a folder.

    Args:
        path: File or folder of the VAE.
        option: Option that names the file, for messages.
        kind: Kind of the checkpoint.
        files: Closes the opened files.

    Raises:
        CheckpointError: If the VAE is missing or another network.
    """
    if option == "--ckpt" or path.is_dir():
        vae_subfolder = path / "vae"
        folder = vae_subfolder if not (path / "config.json").is_file() and vae_subfolder.is_dir() else path
        return folders.read_folder_vae(folder, option, kind.latent_scale, files)
    if not path.exists() and _is_of_hub(path):
        path = find_model_folder(option, path.as_posix(), PATTERNS_VAE)
        return read_chosen_vae(path, option, kind, files)
    _require(path, option, "a VAE of Stable Diffusion: a single file, or a folder in the layout of diffusers")
    checkpoint = files.enter_context(open_checkpoint(path))
    return checkpoints.read_vae(checkpoint, option, kind.latent_scale)


PATTERNS_VAE = ("config.json", "diffusion_pytorch_model.safetensors", "vae/*.json", "vae/*.safetensors")


def _find_pooled_width(text_encoders: tuple[TextPlan, ...]) -> int:
    return text_encoders[-1].load_plan.config.projection_dim


def _check_together(checkpoint_plan: CheckpointPlan) -> None:
    """Raise CheckpointError if the U-Net's channels do not match the samplers or the text encoders."""
    config = checkpoint_plan.unet.config
    path = checkpoint_plan.path
    channels = config.get("in_channels", 4)
    if channels not in checkpoints.USES:
        raise CheckpointError(
            f"--ckpt {path}: its U-Net takes {channels} channels; those that take 4 (images) and 9 "
            f"(inpainting) can be used.\n  Give {EXPECTED_FILE}.",
            path,
        )
    text_width = config.get("cross_attention_dim", 1280)
    width = sum(
        plan.load_plan.config.dim for plan in checkpoint_plan.text_encoders
    )  # the encoders' states are concatenated
    if text_width != width:
        raise CheckpointError(
            f"--ckpt {path}: its U-Net takes text states of {text_width} numbers, its text encoders give "
            f"{width}. Parts of different models were joined.",
            path,
        )
    if checkpoint_plan.kind is SDXL:
        pooled = _find_pooled_width(checkpoint_plan.text_encoders)
        needed = pooled + checkpoints.SIZE_NUMBERS * (config.get("addition_time_embed_dim") or 0)
        pooled_width = config.get("projection_class_embeddings_input_dim")
        if pooled_width != needed:
            raise CheckpointError(
                f"--ckpt {path}: its U-Net takes {pooled_width} numbers in addition to the text, its second "
                f"text encoder and {checkpoints.SIZE_NUMBERS} sizes make {needed}. Parts of different models "
                "were joined.",
                path,
            )


_Part = tuple[Any, LoadPlan[Any], torch.dtype, str]  # a network, how it is loaded, and its name in messages


def _make_networks(
    checkpoint_plan: CheckpointPlan, dtype: torch.dtype, vae_dtype: torch.dtype
) -> list[_Part]:
    """Build all networks on the meta device: text encoders, U-Net and VAE."""
    for plan in checkpoint_plan.text_encoders:
        check_activation(plan.load_plan.config, checkpoint_plan.path, "CLIP has quick_gelu or gelu")
    with META:
        texts = [(ClipText(plan.load_plan.config), plan.load_plan) for plan in checkpoint_plan.text_encoders]
    unet = checkpoints.build_network(
        unet_class(), checkpoint_plan.unet.config, checkpoint_plan.unet.checkpoint.path
    )
    vae = checkpoints.build_network(
        vae_class(), checkpoint_plan.vae.config, checkpoint_plan.vae.checkpoint.path
    )
    return [
        *((*text, dtype, "the text encoder of --ckpt") for text in texts),
        (unet, checkpoint_plan.unet, dtype, "the U-Net of --ckpt"),
        (vae, checkpoint_plan.vae, vae_dtype, "the VAE"),
    ]


def _fill(parts: Sequence[_Part], device: torch.device) -> None:
    """Load weights from the open files; on the meta device, compare only names and shapes."""
    for network, plan, dtype, what in parts:
        filled = load_planned(plan, partial(_keep, network), device=device, dtype=dtype, what=what)
        filled.requires_grad_(False)


def _keep(network: Any, _: Any) -> Any:
    return network


def _select_dtype(options: ModelOptions) -> torch.dtype:
    if options.fp16:
        return torch.float16
    return torch.bfloat16 if options.bf16 else torch.float32


def check_attention(options: ModelOptions, device: torch.device) -> None:
    """Raise OptionError if xformers is requested but cannot be used on this device."""
    if not options.xformers and not options.diffusers_xformers:
        return
    try:
        check_backend(AttentionChoice("xformers"), device, lambda: _select_dtype(options), training=True)
    except OptionError as error:
        # the message names --xformers; replace it by the flag that was given
        flag = "--xformers" if options.xformers else "--diffusers_xformers"
        raise OptionError(str(error).replace("--xformers", flag)) from error
