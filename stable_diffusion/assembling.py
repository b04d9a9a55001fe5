"""Load the pipeline of a run of gen_img.py: the checkpoint, and all that acts on it."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch

from modules.errors import OptionError
from networks.loading import LoraFile
from networks.predictions import compare_predictions
from stable_diffusion.contract import Model
from stable_diffusion.control_net import check_control_nets, load_control_nets
from stable_diffusion.guiding import check_guides, load_guides
from stable_diffusion.layer_texts import LayerTexts, list_cross_attentions
from stable_diffusion.lllites import check_lllites, load_lllites
from stable_diffusion.loading import CheckpointPlan, check_attention, load_checkpoint, plan_checkpoint
from stable_diffusion.loras import check_networks, load_networks, read_learned_words, read_networks
from stable_diffusion.making import BatchHook, ImageGenerator
from stable_diffusion.options import GenImgOptions
from stable_diffusion.regions import Regions
from stable_diffusion.samplers import check_sampling
from stable_diffusion.small_start import DeepShrinks
from stable_diffusion.text import ImageVectors, PromptEncoder, check_texts, check_vision
from stable_diffusion.textual_inversion import LearnedWord

logger = logging.getLogger(__name__)


def assemble(options: GenImgOptions, device: torch.device) -> ImageGenerator:
    """Load the checkpoint and everything that modifies it, such as LoRAs; return the image generator.

    1. Read the files' headers and check that they fit each other and the options.
    2. Load the checkpoint, then ControlNets or LLLites, then LoRAs.
    3. Build what encodes prompts, limits them to regions and steers by images.

    Raises OptionError or CheckpointError, if possible before any network is loaded.
    """
    check_attention(options.model, device)
    lora_files = read_networks(options.networks) if options.networks.network_weights else []
    with ExitStack() as exit_stack:
        checkpoint_plan = plan_checkpoint(options.model, exit_stack)
        _check_networks(options, checkpoint_plan, lora_files)
        cross_attentions: Mapping[str, str] = {}  # name in XTI files -> module path
        if options.text.XTI_embeddings:
            cross_attentions = list_cross_attentions(checkpoint_plan.unet.sources)
        lora_words = read_learned_words(lora_files)  # embeddings of learned words in the LoRA files
        _check_texts(options, checkpoint_plan, list(cross_attentions), lora_words)
        guide_options = check_guides(options.guides)
        if options.text.clip_vision_strength is not None:
            check_vision(checkpoint_plan.kind, checkpoint_plan.path, options.model.tokenizer_cache_dir)
        model = load_checkpoint(options.model, checkpoint_plan, device)
    # before LoRAs are merged: a ControlNet of differences is added to the checkpoint's own weights
    batch_hooks = _load_batch_hooks(options, model, tuple(cross_attentions.values()))
    loras = load_networks(options.networks, model, lora_files)
    prompt_encoder = PromptEncoder(
        model.text_encoders, model.kind, options.text, list(cross_attentions), lora_words=lora_words
    )
    regions = Regions(
        model.unet,
        () if loras is None else loras.layers,
        options.networks.network_regional_mask_max_color_codes,
    )
    return ImageGenerator(
        model=model,
        prompt_encoder=prompt_encoder,
        sampling=options.sampling,
        vae_batch_size=options.model.vae_batch_size,
        loras=loras,
        batch_hooks=batch_hooks,
        regions=regions,
        image_vectors=_make_image_vectors(options, model),
        guides=load_guides(guide_options, model),
    )


def _check_texts(
    options: GenImgOptions,
    checkpoint_plan: CheckpointPlan,
    cross_attentions: Sequence[str],
    lora_words: Sequence[LearnedWord],
) -> None:
    """Raise an error if learned words or the options of texts do not fit the text encoders."""
    text_configs = [plan.load_plan.config for plan in checkpoint_plan.text_encoders]
    check_texts(options.text, checkpoint_plan.kind, text_configs, cross_attentions, lora_words=lora_words)


def _make_image_vectors(options: GenImgOptions, model: Model) -> ImageVectors | None:
    """Return the CLIP vectors that replace pooled text states; None without --clip_vision_strength."""
    strength = options.text.clip_vision_strength
    if strength is None:
        return None
    return ImageVectors(model, options.model.tokenizer_cache_dir, strength)


def _load_batch_hooks(
    options: GenImgOptions, model: Model, cross_attention_paths: Sequence[str]
) -> list[BatchHook]:
    """Load ControlNets and LLLites; return them with all other hooks that modify the U-Net for a batch."""
    batch_hooks: list[BatchHook] = []
    control_nets = load_control_nets(options.control, model)
    if control_nets is not None:
        batch_hooks.append(control_nets)
    lllites = load_lllites(options.control, model)
    if lllites is not None:
        batch_hooks.append(lllites)
    batch_hooks.append(DeepShrinks(model.unet))
    batch_hooks.append(LayerTexts(model.unet, cross_attention_paths))
    return batch_hooks


def _check_networks(
    options: GenImgOptions, checkpoint_plan: CheckpointPlan, lora_files: Sequence[LoraFile]
) -> None:
    """Raise an error if LoRAs, ControlNets, LLLites or the sampler do not fit the checkpoint's headers."""
    kind = checkpoint_plan.kind
    check_networks(lora_files, checkpoint_plan)
    predicts_v = checkpoint_plan.model_type.predicts_velocity or options.model.v_parameterization
    compare_predictions({lora.path: lora.metadata for lora in lora_files}, predicts_v)
    check_sampling(options.sampling.zero_terminal_snr, predicts_v)
    # Raise OptionError if an inpainting checkpoint is used without an image and a mask
    is_painted = options.prompts.image_path is not None and options.prompts.mask_path is not None
    if checkpoint_plan.unet.config["in_channels"] == 9 and not is_painted:
        raise OptionError(
            f"--ckpt {checkpoint_plan.path} is an inpainting checkpoint, which needs --image_path and "
            "--mask_path. Pass both, or another checkpoint"
        )
    check_control_nets(options.control, checkpoint_plan.unet.config, kind)
    check_lllites(options.control, kind)
