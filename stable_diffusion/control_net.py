"""ControlNets: add residuals that depend on guide images to the U-Net's features.

Several ControlNets of Stable Diffusion 1.x and 2.x act in turn, one in each step; those of XL act together,
and their residuals are averaged. Source: Zhang et al. 2023, arXiv 2302.05543. The networks are diffusers'.
"""

# Letters: B images, R rows of one call of the U-Net, L tokens, H W pixels

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import XFormersAttnProcessor
from einops import rearrange
from torch import Tensor

from modules.devices import dtype_name
from modules.errors import OptionError
from modules.media.edges import draw_edges
from modules.media.reading import Frame, read_image, resize_frame
from stable_diffusion.contract import SDXL, Model, ModelKind, RequestedImage, UnetCall, UnetHook
from stable_diffusion.control_net_files import OPTION, load_control_net
from stable_diffusion.network_options import ControlOptions, ControlSpec
from stable_diffusion.starting import STRIDE

logger = logging.getLogger(__name__)

Residuals = tuple[tuple[Tensor, ...], Tensor]  # one for each skip of the U-Net, one for its middle


def _mean_residuals(residuals: Sequence[Residuals]) -> Residuals:
    """Average the residuals of several ControlNets, for each skip connection and the middle block."""
    if len(residuals) == 1:
        return residuals[0]
    skips_by_connection = zip(*(skips for skips, _ in residuals), strict=True)
    mean_skips = tuple(torch.stack(skips).mean(0) for skips in skips_by_connection)
    mean_middle = torch.stack([middle for _, middle in residuals]).mean(0)
    return mean_skips, mean_middle


class ControlNets:
    """Run several ControlNets next to the U-Net and add their residuals."""

    def __init__(self, networks: Sequence[Any], specs: Sequence[ControlSpec], model: Model) -> None:
        """Prepare loaded ControlNets for use with a model.

        Args:
            networks: Diffusers' ControlNetModels on the model's device.
            specs: Strength, preprocessor and steps of each network.
            model: The loaded model.
        """
        self._networks = networks
        self._specs = specs
        self._model = model

    @contextlib.contextmanager
    def apply_to_batch(
        self, requests: Sequence[RequestedImage], width: int, height: int
    ) -> Iterator[UnetHook | None]:
        """Yield the hook that adds residuals for images of this size; None if they have no guide images.

        Raises:
            OptionError: If an image has the wrong number of guides.
            MediaError: If a guide cannot be read.
        """
        if not any(request.guides for request in requests):
            yield None
            return
        guides = BatchGuides(self._specs, OPTION, requests, width=width, height=height)
        num_parts = requests[0].settings.num_parts

        def add_residuals(call: UnetCall) -> UnetCall:
            num_networks = len(self._networks)
            candidates: Sequence[int]
            if self._model.kind is SDXL:
                candidates = range(num_networks)  # SDXL's ControlNets act together
            else:
                candidates = [call.step % num_networks]  # for other models, they take turns step by step
            active = [index for index in candidates if is_active(self._specs[index], call)]
            if not active:
                return call
            images = guides.resize_for(call, self._model.dtype)
            residuals = [self._compute_residuals(index, call, images[index], num_parts) for index in active]
            return replace(call, residuals=_mean_residuals(residuals))

        yield add_residuals

    def _compute_residuals(self, index: int, call: UnetCall, guides: Tensor, num_parts: int) -> Residuals:
        """Return the residuals of one ControlNet for the U-Net's skip connections and middle block."""
        # guides: Guide images of this ControlNet, B 3 H W.
        network = self._networks[index]
        dtype = self._model.dtype
        num_rows = len(call.sample)
        part_length = call.context.shape[1] // num_parts
        last_part = call.context[:, -part_length:]  # a ControlNet reads only this part of the prompt
        down, middle = network(
            # without the channels of mask and masked image
            call.sample[:, : network.config.in_channels].to(dtype),
            torch.full((), call.timestep, dtype=torch.float32, device=call.sample.device),
            encoder_hidden_states=last_part.to(dtype),
            controlnet_cond=guides.repeat(num_rows // len(guides), 1, 1, 1),
            conditioning_scale=self._specs[index].multiplier,
            added_cond_kwargs=dict(call.added),
            return_dict=False,
        )
        if network.config.global_pool_conditions:
            # residuals are only added to the prompt's rows, as in diffusers' pipelines
            is_prompt_row = torch.arange(num_rows, device=middle.device) < num_rows - call.negative_rows
            is_prompt_row = is_prompt_row[:, None, None, None]
            down = [skip * is_prompt_row for skip in down]
            middle = middle * is_prompt_row
        return tuple(down), middle


def check_control_nets(options: ControlOptions, unet: Mapping[str, Any], kind: ModelKind) -> None:
    """Check by the headers that all ControlNets fit a U-Net, before anything is loaded.

    Args:
        options: Options of ControlNets.
        unet: Configuration of diffusers' UNet2DConditionModel.
        kind: Kind of the checkpoint.

    Raises:
        CheckpointError: If a ControlNet does not fit the U-Net.
    """
    if not options.control_net_models:
        return  # the specs are those of LLLites
    for spec in options.specs:
        load_control_net(
            spec.path, unet, model_title=kind.title, device=torch.device("meta"), dtype=torch.float32
        )


def load_control_nets(options: ControlOptions, model: Model) -> ControlNets | None:
    """Load the ControlNets of a run onto the model's device; None if there are none.

    Raises:
        CheckpointError: If a file is not a ControlNet or is for another model, or if tensors are missing or
            damaged.
    """
    if not options.control_net_models:
        return None
    networks = []
    for spec in options.specs:
        network: Any = load_control_net(
            spec.path,
            model.unet.config,
            model_title=model.kind.title,
            device=model.device,
            dtype=model.dtype,
            base=model.unet,
        )
        # use the U-Net's attention implementation and memory layout
        processors = model.unet.attn_processors.values()
        if any(isinstance(processor, XFormersAttnProcessor) for processor in processors):
            network.set_attn_processor(XFormersAttnProcessor())
        if model.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last):
            network.to(memory_format=torch.channels_last)
        networks.append(network)
        logger.info("ControlNet %s (%s)", spec.path, dtype_name(model.dtype))
    return ControlNets(networks, options.specs, model)


# Guide images of ControlNets: read, resized to the image's size and prepared.
#
# The pixels are those of diffusers' ControlNet pipelines: Lanczos, RGB, 0..1.
MAX_CACHED_GUIDES = 16  # prepared images; one of 1024 x 1024 takes 3 MB


@lru_cache(MAX_CACHED_GUIDES)
def _read_guide(path: Path, canny: tuple[int, int] | None, width: int, height: int) -> Frame:
    return prepare(read_image(path), canny, width, height)


class BatchGuides:
    """Guide images of the current batch, on the device and resized to the current latents."""

    def __init__(
        self,
        specs: Sequence[ControlSpec],
        option: str,
        requests: Sequence[RequestedImage],
        width: int,
        height: int,
    ) -> None:
        """Read the guide images of a batch.

        Args:
            specs: Networks in the order of `RequestedImage.guides`.
            option: Option that names the networks, for messages.
            requests: Images of the batch.
            width: Width in pixels.
            height: Height in pixels.

        Raises:
            OptionError: If an image does not have one guide per network, or a single one for all.
            MediaError: If a guide cannot be read.
        """
        for request in requests:
            if len(request.guides) not in {1, len(specs)}:
                raise OptionError(
                    f"{request.label}: {len(request.guides)} guide images, but {option} has {len(specs)}. "
                    "Pass one for each model, or a single one for all."
                )
        self._specs = specs
        self._requests = requests
        self._size = (width, height)
        self.guides = self._read()

    def _read(self) -> tuple[Tensor, ...]:
        """Read each network's guide images, B 3 H W float32 in 0..1."""
        guides = []
        for index, spec in enumerate(self._specs):
            images = []
            for request in self._requests:
                path = request.guides[index if len(request.guides) > 1 else 0]
                frame = torch.from_numpy(_read_guide(path, spec.canny, *self._size))
                images.append(rearrange(frame.float() / 255, "h w c -> c h w"))
            guides.append(torch.stack(images))
        return tuple(guides)

    def resize_for(self, call: UnetCall, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return each network's guide images, B 3 H W in 0..1, resized for the latents of a U-Net call."""
        height, width = (int(side) * STRIDE for side in call.sample.shape[-2:])
        if self._size != (width, height):
            self._size = (width, height)
            self.guides = self._read()
        self.guides = tuple(images.to(call.sample.device, dtype) for images in self.guides)
        return self.guides


def is_active(spec: ControlSpec, call: UnetCall) -> bool:
    """Return whether a ControlNet is active at this step: the first `ratio` of all steps."""
    return call.step / call.num_steps <= spec.ratio


def prepare(image: Frame, canny: tuple[int, int] | None, width: int, height: int) -> Frame:
    """Resize a guide image, H W 3, or its edges.

    Args:
        image: The image.
        canny: Thresholds to replace the image by its Canny edges; None keeps the image.
        width: Width in pixels.
        height: Height in pixels.
    """
    if image.shape[:2] != (height, width):
        image = resize_frame(image, (width, height), "lanczos")
    # edges are drawn at the final size, so that lines are one pixel wide
    return image if canny is None else draw_edges(image, *canny)
