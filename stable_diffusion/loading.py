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
from typing import Any, NamedTuple

import torch

from checkpoints.dialects import LoadPlan, load_planned
from checkpoints.model_files import find_model_folder
from checkpoints.opening import SUFFIXES, open_checkpoint
from encoders.clip_l import ClipWords
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
from stable_diffusion.text_checkpoints import TextPlan, plan_text_encoders
from stable_diffusion.tokenizers import OPEN_CLIP_PAD, check_vocabulary, load_tokenizers

logger = logging.getLogger(__name__)

META = torch.device("meta")


@dataclass(frozen=True)
class CheckpointPlan:
    """An open checkpoint and the load plan of each of its networks."""

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
    """Load the networks planned by `plan_checkpoint`, in evaluation mode; its files must still be open.

    1. Load the tokenizers, and check that the text encoders have an embedding for each token.
    2. Check all networks on the meta device, so that errors come before the slow part.
    3. Load the weights, and join each text encoder with its tokenizer.

    Raises CheckpointError, before anything is loaded, if a file is damaged or of a different kind.
    """
    dtype = _select_dtype(options)
    vae_dtype = torch.float32 if options.no_half_vae else dtype
    path = checkpoint_plan.path
    text_plans = checkpoint_plan.text_encoders
    tokenizers = load_tokenizers(
        options.tokenizer_cache_dir, path, [plan.is_open_clip for plan in text_plans]
    )
    for tokenizer, plan in zip(tokenizers, text_plans, strict=True):
        check_vocabulary(tokenizer, plan.load_plan.config.vocabulary, path)
    networks = _make_networks(checkpoint_plan, dtype, vae_dtype)
    _load_weights(networks, META)  # compares names and shapes; reads no weights
    _log_checkpoint(checkpoint_plan, dtype, vae_dtype)
    if checkpoint_plan.kind is SDXL and vae_dtype == torch.float16 and options.vae is None:
        logger.warning(
            "The released VAE of Stable Diffusion XL overflows in float16 and then makes black images. If "
            "that happens, add --no_half_vae, or --vae with the fixed one (madebyollin/sdxl-vae-fp16-fix)"
        )
    _load_weights(networks, device)
    *text_networks, unet, vae = (loaded.network for loaded in networks)
    _set_computation(options, unet, vae)
    return Model(
        kind=checkpoint_plan.kind,
        path=path,
        unet=unet,
        vae=vae,
        text_encoders=_join_text_encoders(checkpoint_plan, text_networks, tokenizers),
        predicts_velocity=checkpoint_plan.model_type.predicts_velocity or options.v_parameterization,
        zero_terminal_snr=checkpoint_plan.model_type.zero_terminal_snr,
        device=device,
        dtype=dtype,
        vae_dtype=vae_dtype,
    )


def _log_checkpoint(checkpoint_plan: CheckpointPlan, dtype: torch.dtype, vae_dtype: torch.dtype) -> None:
    """Log the kind, prediction type and dtypes of a checkpoint that is about to be loaded."""
    description = checkpoint_plan.kind.title
    if checkpoint_plan.unet.config.get("in_channels") == 9:  # 4 noisy, 4 of the masked image, 1 mask
        description += ", inpainting"
    if prediction := checkpoint_plan.model_type.describe_prediction():
        description += f", which {prediction}"
    logger.info(
        "Loading %s: %s, as %s, VAE as %s",
        checkpoint_plan.path,
        description,
        dtype_name(dtype),
        dtype_name(vae_dtype),
    )


def _join_text_encoders(
    checkpoint_plan: CheckpointPlan, networks: Sequence[ClipText], tokenizers: Sequence[ClipWords]
) -> tuple[LoadedTextEncoder, ...]:
    """Return each text encoder with its tokenizer."""
    kind = checkpoint_plan.kind
    text_encoders = []
    for plan, network, tokenizer, lora_prefix in zip(
        checkpoint_plan.text_encoders, networks, tokenizers, kind.lora_prefixes, strict=True
    ):
        text_encoder = LoadedTextEncoder(
            network=network,
            tokenize=tokenizer.tokenize,
            bos_token_id=tokenizer.start,
            eos_token_id=tokenizer.end,
            pad_token_id=OPEN_CLIP_PAD if plan.is_open_clip else tokenizer.end,
            lora_prefix=lora_prefix,
            missing_layers=1 if kind is SD2 else 0,  # the last layer is unused, so it is not loaded
        )
        text_encoders.append(text_encoder)
    return tuple(text_encoders)


def _set_computation(options: ModelOptions, unet: Any, vae: Any) -> None:
    """Apply options that affect how networks compute, such as xformers, but not their weights."""
    if options.xformers or options.diffusers_xformers:
        unet.set_attn_processor(make_xformers_processor())  # otherwise diffusers chooses torch's attention
    if options.diffusers_xformers:
        vae.set_attn_processor(make_xformers_processor())
    if options.opt_channels_last:
        for network in (unet, vae):
            network.to(memory_format=torch.channels_last)
    if options.vae_slices is not None and options.vae_slices > 1:
        checkpoints.band_convolutions(vae, options.vae_slices)


def plan_checkpoint(options: ModelOptions, exit_stack: ExitStack) -> CheckpointPlan:
    """Find and open the files of --ckpt and --vae, and plan how their networks are loaded.

    Args:
        options: Options of the run.
        exit_stack: Closes the files.

    Raises:
        OptionError: If an option contradicts the files.
        CheckpointError: If the files cannot be used.
    """
    path = find_checkpoint(options.ckpt)
    plan = (
        _plan_folder(options, path, exit_stack)
        if path.is_dir()
        else _plan_single_file(options, path, exit_stack)
    )
    _check_widths_match(plan)
    return plan


def _plan_folder(options: ModelOptions, path: Path, exit_stack: ExitStack) -> CheckpointPlan:
    """Plan how to load a folder in diffusers' layout; --vae replaces the folder's VAE."""
    model_type = folders.read_folder_model_type(path)
    check_kind_flags(options, model_type.kind)
    has_config = (path / "scheduler" / "scheduler_config.json").is_file()
    if options.v_parameterization and has_config and not model_type.predicts_velocity:
        raise OptionError(
            f"--v_parameterization: the scheduler/scheduler_config.json of {path} says that the model "
            'predicts noise. Omit it, or write "prediction_type": "v_prediction" there if that is '
            "wrong"
        )
    text_encoders = folders.plan_folder_text_encoders(path, model_type.kind, exit_stack)
    unet = folders.read_folder_unet(path, exit_stack)
    if options.vae is None:
        vae = read_chosen_vae(path / "vae", "--ckpt", model_type.kind, exit_stack)
    else:
        vae = read_chosen_vae(options.vae, "--vae", model_type.kind, exit_stack)
    return CheckpointPlan(path, model_type, unet=unet, vae=vae, text_encoders=text_encoders)


def _plan_single_file(options: ModelOptions, path: Path, exit_stack: ExitStack) -> CheckpointPlan:
    """Plan how to load a single-file checkpoint; --vae replaces its VAE."""
    checkpoint = exit_stack.enter_context(open_checkpoint(path))
    model_type = read_model_type(path, checkpoint.tensors, checkpoint.metadata)
    check_kind_flags(options, model_type.kind)
    num_averages = sum(name.startswith(EMA) for name in checkpoint.tensors)
    if num_averages:
        logger.info(
            "%s: %d averaged tensors (model_ema.) are not used, only the U-Net itself", path, num_averages
        )
    text_encoders = plan_text_encoders(checkpoint, model_type.kind)
    # ignored_prefixes=("",): omit all tensors without this prefix, which belong to other networks
    unet_checkpoint = checkpoint.without_prefix(UNET, ignored_prefixes=("",))
    unet = checkpoints.read_unet(unet_checkpoint, model_type.kind, _find_pooled_width(text_encoders))
    if options.vae is None:
        vae = checkpoints.read_vae(checkpoint, "--ckpt", model_type.kind.latent_scale)
    else:
        vae = read_chosen_vae(options.vae, "--vae", model_type.kind, exit_stack)
    return CheckpointPlan(path, model_type, unet=unet, vae=vae, text_encoders=text_encoders)


def find_checkpoint(ckpt: Path) -> Path:
    """Return the file or folder given by --ckpt; `owner/name` is downloaded if it is not a local path.

    Raises:
        CheckpointError: If it is missing, or if a folder is not in diffusers' layout.
    """
    if ckpt.is_dir():
        if (ckpt / "unet").is_dir() or (ckpt / "model_index.json").is_file():
            return ckpt
        first_files = ", ".join(sorted(file.name for file in ckpt.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"--ckpt {ckpt}: the folder is not in the layout of diffusers; it has no unet (it contains "
            f"{first_files}).\n  Pass {EXPECTED_FILE}.",
            ckpt,
        )
    if ckpt.exists() or not _is_hub_id(ckpt):
        _require(ckpt, "--ckpt", EXPECTED_FILE)
        return ckpt
    return find_model_folder("--ckpt", ckpt.as_posix(), folders.PATTERNS)


def _is_hub_id(path: Path) -> bool:
    return path.suffix.lower() not in SUFFIXES and path.as_posix().count("/") == 1


def _require(path: Path, option: str, give: str) -> None:
    if not path.exists():
        raise CheckpointError(
            f"{option} {path}: there is no such file or folder.{explain_missing(path)}\n  Pass {give}.", path
        )


def read_chosen_vae(
    path: Path, option: str, kind: ModelKind, exit_stack: ExitStack
) -> LoadPlan[checkpoints.VaeSizes]:
    """Plan how to load the VAE from --vae or a diffusers folder.

    Args:
        path: File or folder of the VAE.
        option: Option that names the file, for messages.
        kind: Kind of the checkpoint.
        exit_stack: Closes the opened files.

    Raises:
        CheckpointError: If the VAE is missing, or the file contains a different network.
    """
    if option == "--ckpt" or path.is_dir():
        is_whole_checkpoint = not (path / "config.json").is_file() and (path / "vae").is_dir()
        folder = path / "vae" if is_whole_checkpoint else path
        return folders.read_folder_vae(folder, option, kind.latent_scale, exit_stack)
    if not path.exists() and _is_hub_id(path):
        path = find_model_folder(option, path.as_posix(), PATTERNS_VAE)
        return read_chosen_vae(path, option, kind, exit_stack)
    _require(path, option, "a VAE of Stable Diffusion: a single file, or a folder in the layout of diffusers")
    checkpoint = exit_stack.enter_context(open_checkpoint(path))
    return checkpoints.read_vae(checkpoint, option, kind.latent_scale)


PATTERNS_VAE = ("config.json", "diffusion_pytorch_model.safetensors", "vae/*.json", "vae/*.safetensors")


def _find_pooled_width(text_encoders: tuple[TextPlan, ...]) -> int:
    return text_encoders[-1].load_plan.config.projection_dim


def _check_widths_match(checkpoint_plan: CheckpointPlan) -> None:
    """Raise CheckpointError for unsupported U-Net channels or text encoders that do not match."""
    config = checkpoint_plan.unet.config
    path = checkpoint_plan.path
    channels = config.get("in_channels", 4)
    if channels not in checkpoints.UNET_INPUT_CHANNELS:
        raise CheckpointError(
            f"--ckpt {path}: its U-Net takes {channels} channels; only U-Nets with 4 (images) or 9 "
            f"(inpainting) are supported.\n  Pass {EXPECTED_FILE}.",
            path,
        )
    text_width = config.get("cross_attention_dim", 1280)
    # the encoders' states are concatenated
    width = sum(plan.load_plan.config.dim for plan in checkpoint_plan.text_encoders)
    if text_width != width:
        raise CheckpointError(
            f"--ckpt {path}: its U-Net takes text states of width {text_width}, its text encoders produce "
            f"width {width}. Parts of different models were joined.",
            path,
        )
    if checkpoint_plan.kind is SDXL:
        # Raise CheckpointError if SDXL's U-Net does not fit the width of its pooled text and sizes
        config = checkpoint_plan.unet.config
        size_width = checkpoints.NUM_SIZE_CONDITIONS * (config.get("addition_time_embed_dim") or 0)
        needed = _find_pooled_width(checkpoint_plan.text_encoders) + size_width
        added_width = config.get("projection_class_embeddings_input_dim")
        if added_width != needed:
            path = checkpoint_plan.path
            raise CheckpointError(
                f"--ckpt {path}: its U-Net takes additional conditions of width {added_width}, but those of "
                f"its second text encoder and {checkpoints.NUM_SIZE_CONDITIONS} sizes have width {needed}. "
                "Parts of different models were joined.",
                path,
            )


class _NetworkToLoad(NamedTuple):
    """A network on the meta device, and how to load its weights."""

    network: Any
    plan: LoadPlan[Any]
    dtype: torch.dtype
    label: str  # in messages


def _make_networks(
    checkpoint_plan: CheckpointPlan, dtype: torch.dtype, vae_dtype: torch.dtype
) -> list[_NetworkToLoad]:
    """Build all networks on the meta device: text encoders, U-Net and VAE."""
    for plan in checkpoint_plan.text_encoders:
        check_activation(plan.load_plan.config, checkpoint_plan.path, "CLIP has quick_gelu or gelu")
    with META:
        text_networks = [
            (ClipText(plan.load_plan.config), plan.load_plan) for plan in checkpoint_plan.text_encoders
        ]
    unet = checkpoints.build_network(
        unet_class(), checkpoint_plan.unet.config, checkpoint_plan.unet.checkpoint.path
    )
    vae = checkpoints.build_network(
        vae_class(), checkpoint_plan.vae.config, checkpoint_plan.vae.checkpoint.path
    )
    return [
        *(
            _NetworkToLoad(network, plan, dtype, "the text encoder of --ckpt")
            for network, plan in text_networks
        ),
        _NetworkToLoad(unet, checkpoint_plan.unet, dtype, "the U-Net of --ckpt"),
        _NetworkToLoad(vae, checkpoint_plan.vae, vae_dtype, "the VAE"),
    ]


def _load_weights(networks: Sequence[_NetworkToLoad], device: torch.device) -> None:
    """Load the networks' weights from the open files; on the meta device, only compare names and shapes."""
    for network, plan, dtype, label in networks:
        filled = load_planned(
            plan, partial(_return_network, network), device=device, dtype=dtype, label=label
        )
        filled.requires_grad_(False)


def _return_network(network: Any, _: Any) -> Any:
    """Return an existing network: a builder for `load_planned`, which ignores the plan's configuration."""
    return network


def _select_dtype(options: ModelOptions) -> torch.dtype:
    if options.fp16:
        return torch.float16
    return torch.bfloat16 if options.bf16 else torch.float32


def check_attention(options: ModelOptions, device: torch.device) -> None:
    """Raise OptionError if xformers is requested but not usable on this device."""
    if not options.xformers and not options.diffusers_xformers:
        return
    try:
        check_backend(AttentionChoice("xformers"), device, lambda: _select_dtype(options), training=True)
    except OptionError as error:
        # the message names --xformers; replace it by the flag that was given
        flag = "--xformers" if options.xformers else "--diffusers_xformers"
        raise OptionError(str(error).replace("--xformers", flag)) from error
