"""ControlNets: add to the U-Net's features after guide images.

Several ControlNets of Stable Diffusion 1.x and 2.x act in turn, one in each step; those of XL all act, and
their mean counts. Source: Zhang et al. 2023, arXiv 2302.05543.
The networks are diffusers'.
"""
# Letters: B pictures, R rows of one call of the U-Net, L tokens

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.attention_processor import XFormersAttnProcessor
from torch import Tensor

from modules.devices import dtype_name
from stable_diffusion.contract import SDXL, AskedPicture, Idea, Model, ModelKind, UnetCall
from stable_diffusion.control_net_files import OPTION, load_control_net, open_control_net, read_control_net
from stable_diffusion.control_options import ControlOptions, ControlUse
from stable_diffusion.preparing import BatchGuides, GuideImages, is_active

logger = logging.getLogger(__name__)

Residuals = tuple[tuple[Tensor, ...], Tensor]  # one for each skip of the U-Net, one for its middle


class ControlNets:
    """The ControlNets of a run."""

    def __init__(self, networks: Sequence[Any], uses: Sequence[ControlUse], model: Model) -> None:
        """networks: diffusers' ControlNetModels on the model's device. uses: how each is used."""
        self._networks, self._uses, self._model = networks, uses, model
        self._images = GuideImages(uses, OPTION)

    @contextlib.contextmanager
    def for_batch(self, pictures: Sequence[AskedPicture], width: int, height: int) -> Iterator[Idea | None]:
        """Yield the hook with the residuals for pictures of that size; None if they have no guides.

        Raises OptionError if a picture has another number of guides, MediaError if one cannot be read.
        """
        if not any(picture.guides for picture in pictures):
            yield None
            return
        guides = BatchGuides(self._images, pictures, width, height)
        parts = pictures[0].settings.parts

        def control(call: UnetCall) -> UnetCall:
            active = [number for number in self._in_turn(call.step) if is_active(self._uses[number], call)]
            if not active:
                return call
            images = guides.at(call, self._model.dtype)
            found = [self._residuals(number, call, images[number], parts) for number in active]
            return replace(call, residuals=_mean(found))

        yield control

    def _in_turn(self, step: int) -> Sequence[int]:
        count = len(self._networks)
        return range(count) if self._model.kind is SDXL else [step % count]

    def _residuals(self, number: int, call: UnetCall, guides: Tensor, parts: int) -> Residuals:
        # guides: B 3 H W; row r of the call belongs to picture r modulo B
        network, dtype = self._networks[number], self._model.dtype
        rows = len(call.sample)
        # of a prompt with parts, whose contexts stand one after the other, the last part counts
        tokens = call.context.shape[1] // parts
        down, mid = network(
            call.sample[:, : network.config.in_channels].to(dtype),  # without mask and masked picture
            torch.full((), call.timestep, dtype=torch.float32, device=call.sample.device),
            encoder_hidden_states=call.context[:, -tokens:].to(dtype),
            controlnet_cond=guides.repeat(rows // len(guides), 1, 1, 1),
            conditioning_scale=self._uses[number].multiplier,
            added_cond_kwargs=dict(call.added),
            return_dict=False,
        )
        if network.config.global_pool_conditions:
            # it tells what, not where, and only beside the prompt; as in diffusers' pipelines
            acts = torch.arange(rows, device=mid.device) < rows - call.negative_rows
            down, mid = [each * acts[:, None, None, None] for each in down], mid * acts[:, None, None, None]
        return tuple(down), mid


def _mean(found: Sequence[Residuals]) -> Residuals:
    if len(found) == 1:
        return found[0]
    skips = zip(*(down for down, _ in found), strict=True)
    return (
        tuple(torch.stack(each).mean(0) for each in skips),
        torch.stack([mid for _, mid in found]).mean(0),
    )


def check_control_nets(options: ControlOptions, unet: Mapping[str, Any], kind: ModelKind) -> None:
    """Compare the headers of all ControlNets with a U-Net, before anything is loaded.

    unet: the configuration of diffusers' UNet2DConditionModel. Raises CheckpointError.
    """
    for use in options.uses if options.control_net_models else ():
        with open_control_net(use.path) as checkpoint:
            plan = read_control_net(use.path, checkpoint, unet, kind.words)
            load_control_net(plan, None, torch.device("meta"), torch.float32)  # compares, reads nothing


def load_control_nets(options: ControlOptions, model: Model) -> ControlNets | None:
    """Load the ControlNets of a run onto the model's device; None if there are none.

    Raises CheckpointError as `check_control_nets`, or if tensors are missing or damaged.
    """
    if not options.control_net_models:
        return None
    networks = []
    for use in options.uses:
        with open_control_net(use.path) as checkpoint:
            plan = read_control_net(use.path, checkpoint, model.unet.config, model.kind.words)
            network = load_control_net(plan, model.unet, model.device, model.dtype)
        _set_up_as(model.unet, network)
        networks.append(network)
        logger.info("ControlNet %s (%s)", use.path, dtype_name(model.dtype))
    return ControlNets(networks, options.uses, model)


def _set_up_as(unet: Any, network: Any) -> None:
    """Have a ControlNet compute as the U-Net does: the package for attention, the layout in memory."""
    if any(isinstance(each, XFormersAttnProcessor) for each in unet.attn_processors.values()):
        network.set_attn_processor(XFormersAttnProcessor())
    if unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last):
        network.to(memory_format=torch.channels_last)
