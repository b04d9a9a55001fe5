"""Load the pipeline of a run of gen_img.py: the checkpoint, and all that acts on it."""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from checkpoints.dialects import count
from modules.errors import OptionError
from networks.predictions import compare_predictions
from stable_diffusion.contract import RequestedImage, UnetHook
from stable_diffusion.control_net import check_control_nets, load_control_nets
from stable_diffusion.guiding import check_guides, load_guides
from stable_diffusion.lllites import check_lllites, load_lllites
from stable_diffusion.loading import OpenedCheckpoint, check_attention, load_release, open_release
from stable_diffusion.loras import check_networks, load_networks, read_networks, words_of
from stable_diffusion.making import BatchHook, ImageGenerator
from stable_diffusion.names import unet_blocks
from stable_diffusion.options import GenImgOptions
from stable_diffusion.regions import Regions, put_back
from stable_diffusion.samplers import check_sampling
from stable_diffusion.small_start import DeepShrinks
from stable_diffusion.text import ImageVectors, Texts, check_texts, check_vision

logger = logging.getLogger(__name__)


# Extended textual inversion in the U-Net: each cross-attention is given the states that are meant for it.
#
# The context of a text holds the states for all cross-attentions, one after the other, in the order of their
# names: the released numbers of the U-Net's blocks, IN01 to OUT11. Source: Voynov et al. 2023,
# arXiv 2303.09522 (P+).
def list_cross_attentions(names: Collection[str]) -> dict[str, str]:
    """Map the names of cross-attentions in XTI files (IN01, MID, OUT03) to module paths in diffusers.

    Args:
        names: The U-Net's tensors, by their names in diffusers.
    """
    levels = range(count(names, r"down_blocks\.\d+"))
    layers = [count(names, rf"down_blocks\.{level}\.resnets\.\d+") for level in levels]
    paths = {}
    for released, path, _ in unet_blocks(layers):
        if f"{path}.transformer_blocks.0.attn2.to_k.weight" not in names:
            continue
        part, number, *_ = released.split(".")  # such as input_blocks.1.1
        if part == "middle_block":
            paths["MID"] = path
        else:
            prefix = "IN" if part == "input_blocks" else "OUT"
            paths[f"{prefix}{int(number):02d}"] = path
    return dict(sorted(paths.items()))


@dataclass(frozen=True, eq=False)
class LayerTexts:
    """Give each cross-attention its own part of the context while a batch is made."""

    unet: Any
    # paths of the transformers around them, in the order of the context; () if all share it
    paths: Sequence[str]

    @contextmanager
    def for_batch(
        self, pictures: Sequence[RequestedImage], width: int, height: int
    ) -> Iterator[UnetHook | None]:
        """Change the U-Net for a batch and restore it at the end. Enter this before `Regions`."""
        with ExitStack() as stack:
            for index, path in enumerate(self.paths):
                for name, module in self.unet.get_submodule(path).named_modules():
                    if name.endswith(".attn2"):
                        stack.callback(put_back, module, module.__dict__.get("forward"))
                        module.forward = _with_part(module.forward, index, len(self.paths))
            yield None


def _with_part(attend: Callable[..., Tensor], place: int, places: int) -> Callable[..., Tensor]:
    """Return a cross-attention that attends to part `place` of a context of `places` equal parts."""

    def forward(hidden_states: Tensor, encoder_hidden_states: Tensor, **settings: Any) -> Tensor:
        # encoder_hidden_states: R A*L C
        part = encoder_hidden_states.chunk(places, dim=1)[place]
        return attend(hidden_states, encoder_hidden_states=part, **settings)

    return forward


def _check_painting(options: GenImgOptions, release: OpenedCheckpoint) -> None:
    """Raise OptionError if an inpainting checkpoint has no image and mask."""
    is_painted = options.prompts.image_path is not None and options.prompts.mask_path is not None
    if release.unet.config["in_channels"] == 9 and not is_painted:
        raise OptionError(
            f"--ckpt {release.path} is an inpainting checkpoint, which needs --image_path and "
            "--mask_path. Give both, or another checkpoint"
        )


def assemble(options: GenImgOptions, device: torch.device) -> ImageGenerator:
    """Load the checkpoint and everything that changes it; return the object that makes images with them.

    Raises OptionError or CheckpointError, if possible before any network is loaded.
    """
    check_attention(options.model, device)
    strength = options.text.clip_vision_strength
    loras = read_networks(options.networks) if options.networks.network_weights else []
    with ExitStack() as files:
        release = open_release(options.model, files)
        check_networks(loras, release)
        predicts_v = release.marks.predicts_velocity or options.model.v_parameterization
        compare_predictions({lora.path: lora.metadata for lora in loras}, predicts_v)
        check_sampling(options.sampling.zero_terminal_snr, predicts_v)
        _check_painting(options, release)
        check_control_nets(options.control, release.unet.config, release.kind)
        check_lllites(options.control, release.kind)
        layers = list_cross_attentions(release.unet.sources) if options.text.XTI_embeddings else {}
        configs = [plan.network.config for plan in release.texts]
        bundled = words_of(loras)
        check_texts(options.text, release.kind, configs, list(layers), bundled=bundled)
        guides = check_guides(options.guides)
        if strength is not None:
            check_vision(release.kind, release.path, options.model.tokenizer_cache_dir)
        model = load_release(options.model, release, device)
    # before LoRAs are merged: a ControlNet of differences is added to the checkpoint's own weights
    control_nets = load_control_nets(options.control, model)
    lllites = load_lllites(options.control, model)
    networks = load_networks(options.networks, model, loras)
    texts = Texts(model.texts, model.kind, options.text, list(layers), bundled=bundled)
    batch_hooks: list[BatchHook] = []
    if control_nets is not None:
        batch_hooks.append(control_nets)
    if lllites is not None:
        batch_hooks.append(lllites)
    batch_hooks.append(DeepShrinks(model.unet))
    batch_hooks.append(LayerTexts(model.unet, tuple(layers.values())))
    regions = Regions(
        model.unet,
        () if networks is None else networks.layers,
        options.networks.network_regional_mask_max_color_codes,
    )
    vision = None
    if strength is not None:
        vision = ImageVectors(model, options.model.tokenizer_cache_dir, strength)
    return ImageGenerator(
        model=model,
        texts=texts,
        sampling=options.sampling,
        vae_batch_size=options.model.vae_batch_size,
        networks=networks,
        batch_hooks=batch_hooks,
        regions=regions,
        vision=vision,
        guides=load_guides(guides, model),
    )
