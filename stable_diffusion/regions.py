"""Attention couple with regional LoRA: each part of a prompt, and its LoRA, acts in its own region.

The parts of a prompt are between " AND ". In the cross-attention of the U-Net each part is attended to
on its own, and the results are averaged, weighted by the regions of the parts; LoRA i's addition is
multiplied by the region of part i. Keys and values of part i see only LoRA i. A negative text acts
everywhere, as a part of every region: guidance then compares two passes with the same weights.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from PIL import Image
from torch import Tensor

from modules.console import format_count
from modules.errors import OptionError
from modules.media.reading import read_image
from networks.gated_loras import LoraBranch
from stable_diffusion.contract import RequestedImage, TextState, UnetCall, UnetHook

_CHANNELS = 3
_DARK = 1e-4  # if the regions at a pixel sum to less, all parts have equal weights there


def read_regions(
    path: Path, num_parts: int, width: int, height: int, num_colors: int | None = None
) -> Tensor:
    """Return the region mask of each prompt part: P height width, float32, 0..1.

    The red, green and blue channels are the regions of parts 1 to 3. Parts without a channel or color, or
    with an empty region, affect the entire image.

    Args:
        path: File of the mask.
        num_parts: Number of prompt parts.
        width: Width in pixels.
        height: Height in pixels.
        num_colors: If given, pure colors mark the parts instead of channels; this is how many are in use.
            Part 1 is red, 2 green, 3 yellow, 4 blue and so on: red counts 1, green 2, blue 4.

    Raises:
        MediaError: If the image cannot be read.
    """
    mask_image = Image.fromarray(read_image(path))
    # colors must not blend into other codes
    method = Image.Resampling.BILINEAR if num_colors is None else Image.Resampling.NEAREST
    if mask_image.size != (width, height):
        mask_image = mask_image.resize((width, height), method)
    colors = np.asarray(mask_image)
    codes = ((colors >= 128) * np.array([1, 2, 4])).sum(-1)  # H W
    regions = torch.ones(num_parts, height, width)
    for part in range(min(num_parts, num_colors or _CHANNELS)):
        if num_colors is None:
            region = colors[..., part] / np.float32(255)
        else:
            region = codes == part + 1  # code 0, black, marks no part
        if region.any():
            regions[part] = torch.from_numpy(region.astype(np.float32))
    return regions


def resize(regions: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize regions B P H W to `size` (rows, columns) with bilinear interpolation."""
    if regions.shape[-2:] == size:
        return regions
    return functional.interpolate(regions, size, mode="bilinear", align_corners=False)


def part_weights(regions: Tensor) -> Tensor:
    """Normalize region masks, ... P H W, so that the parts sum to 1 at each pixel; 1 / P where all are 0."""
    total = regions.sum(-3, keepdim=True)
    shared = torch.full_like(regions, 1 / regions.shape[-3])
    return torch.where(total < _DARK, shared, regions / total.clamp(min=_DARK))


SEPARATOR = " AND "


def split_parts(prompt: str) -> list[str]:
    """Split a prompt into parts, one per region of a mask."""
    return [part.strip() for part in prompt.split(SEPARATOR)]


def join_parts(states: Sequence[TextState], regions: Tensor) -> TextState:
    """Join the states of a prompt's parts into one.

    The contexts are concatenated to P*L C. The pooled vectors, which affect the entire image, are averaged,
    weighted by the areas of the parts.

    Args:
        states: States of the parts, of equal length.
        regions: Regions of the parts, P H W.
    """
    context = torch.cat([state.context for state in states])
    pooled = [state.pooled for state in states if state.pooled is not None]
    if not pooled:
        return TextState(context)
    # fraction of the image's area that each part covers
    areas = part_weights(regions).mean((-2, -1)).to(pooled[0].device, torch.float32)
    mean = (torch.stack(pooled).float() * areas[:, None]).sum(0)
    return TextState(context, mean.to(pooled[0].dtype))


def check_regions(num_parts: int, num_loras: int, is_folded: bool) -> None:
    """Raise OptionError if prompt parts and LoRAs cannot be assigned to the regions of a mask.

    Args:
        num_parts: Number of parts of the prompt.
        num_loras: Number of LoRAs that are not merged permanently.
        is_folded: Whether LoRAs are merged into the weights for each batch.
    """
    if is_folded:
        raise OptionError(
            "--network_pre_calc folds LoRAs into the weights, which are the same in all regions of "
            "--mask_path. Omit one of them"
        )
    if num_loras and num_loras != num_parts:
        raise OptionError(
            f"the prompt has {format_count(num_parts, 'part')} between AND, --network_weights "
            f"{format_count(num_loras, 'LoRA')}. With regions (--mask_path) LoRA 1 belongs to part 1, LoRA 2 "
            "to part 2 and so on, without those that are folded into the checkpoint: use as many LoRAs as "
            "parts, or omit the mask"
        )


class Regions:
    """Read the regions of prompt parts from masks, and apply them in the U-Net while a batch is generated."""

    def __init__(
        self,
        unet: Any,
        lora_layers: Sequence[Mapping[str, LoraBranch]] | None = (),
        num_colors: int | None = None,
    ) -> None:
        """Prepare a U-Net for regional prompts.

        Args:
            unet: The U-Net.
            lora_layers: Added layers of each LoRA, by module name; None if LoRAs are folded into the weights.
            num_colors: Number of pure colors that mark the parts in masks; None if channels mark them.
        """
        self._is_folded = lora_layers is None
        self._lora_layers = lora_layers or ()
        self._unet = unet
        self._num_colors = num_colors

    def read_regions(self, request: RequestedImage, width: int, height: int) -> Tensor:
        """Return the region masks of an image's prompt parts, P H W in pixels; P 1 1 without a mask.

        Raises:
            OptionError: If an image with a mask does not have one LoRA per part, or if LoRAs are merged into
                the weights.
            MediaError: If the mask cannot be read.
        """
        num_parts = request.settings.num_parts
        if request.mask is None:
            return torch.ones(num_parts, 1, 1)
        check_regions(num_parts, len(self._lora_layers), self._is_folded)
        return read_regions(request.mask, num_parts, width=width, height=height, num_colors=self._num_colors)

    @contextlib.contextmanager
    def apply_to_batch(
        self, requests: Sequence[RequestedImage], width: int, height: int
    ) -> Iterator[UnetHook | None]:
        """Make each prompt part act in its region while a batch runs; restore the U-Net at the end.

        Yields a hook for U-Net calls; None if prompts have one part. A call's text states are the
        concatenated states of all P parts: R P*L C.
        """
        if requests[0].settings.num_parts == 1:
            yield None
            return
        regions = [self.read_regions(request, width, height) for request in requests]  # P H W or P 1 1 each
        rows, columns = (max(region.shape[axis] for region in regions) for axis in (-2, -1))
        batch = _Batch(torch.stack([region.expand(-1, rows, columns) for region in regions]))
        with contextlib.ExitStack() as restore:
            batch.patch_unet(self._unet, restore)
            if any(request.mask is not None for request in requests):
                for part, layers in enumerate(self._lora_layers):
                    for name, layer in layers.items():
                        restore.callback(setattr, layer, "apply_region", None)
                        layer.apply_region = batch.limit_to_region(part, name)
            yield batch.move_to_device


class _Batch:
    """Regions of the current batch, with masks for each feature map size."""

    def __init__(self, regions: Tensor) -> None:
        # regions: B P H W
        self._regions = regions
        self.num_parts = regions.shape[1]
        self._mean_masks = regions.mean((-2, -1))  # B P
        self._size: tuple[int, int] | None = None  # size of the features in the current transformer
        self._masks: dict[tuple[int, int], Tensor] = {}  # B P h w by size
        self._weights: dict[tuple[int, int], Tensor] = {}

    def move_to_device(self, call: UnetCall) -> UnetCall:
        """U-Net hook: move the region masks to the device of the call's sample. Return the call unchanged."""
        assert call.context.shape[1] % self.num_parts == 0, (call.context.shape, self.num_parts)
        if self._regions.device != call.sample.device:
            self._regions = self._regions.to(call.sample.device)
            self._mean_masks = self._mean_masks.to(call.sample.device)
        return call

    def patch_unet(self, unet: Any, restore: contextlib.ExitStack) -> None:
        """Limit cross-attention to each prompt part to its region of the image, until `restore` is closed."""
        for name, module in unet.named_modules():
            if isinstance(module, Transformer2DModel):
                hook = module.register_forward_pre_hook(self._store_feature_size, with_kwargs=True)
                restore.callback(hook.remove)
            elif name.endswith(".attn2"):
                restore.callback(restore_forward, module, module.__dict__.get("forward"))
                module.forward = self._attend_per_part(module.forward)

    def limit_to_region(self, part: int, name: str) -> Callable[[Tensor], Tensor]:
        """Return a function that masks a prompt part's LoRA output in module `name` by the part's region."""
        if name.endswith((".attn2.to_k", ".attn2.to_v")):
            return lambda added: self._limit_text(part, added)
        return lambda added: self._limit_features(part, added)

    def _store_feature_size(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        features = args[0] if args else kwargs["hidden_states"]
        self._size = (int(features.shape[-2]), int(features.shape[-1]))

    def _attend_per_part(self, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a cross-attention that runs per prompt part and sums the outputs, weighted by region."""

        def forward(hidden_states: Tensor, encoder_hidden_states: Tensor, **settings: Any) -> Tensor:
            # hidden_states: R N C; rows become P*R, parts outermost, so that row % B is still the image
            rows = len(hidden_states)
            num_parts = self.num_parts
            context = encoder_hidden_states.unflatten(1, (num_parts, -1)).transpose(0, 1).flatten(0, 1)
            out = attend(hidden_states.repeat(num_parts, 1, 1), encoder_hidden_states=context, **settings)
            weights = self._resize_masks(self._weights, self._find_spatial_size(hidden_states))  # B P h w
            weights = weights.flatten(2).transpose(0, 1).repeat(1, rows // weights.shape[0], 1)  # P R N
            return (out.unflatten(0, (num_parts, rows)) * weights[..., None].to(out.dtype)).sum(0)

        return forward

    def _limit_text(self, part: int, added: Tensor) -> Tensor:
        # added: P*R L C, of a part's own texts only
        limited = torch.zeros_like(added)
        rows = len(added) // self.num_parts
        limited[part * rows : (part + 1) * rows] = added[part * rows : (part + 1) * rows]
        return limited

    def _limit_features(self, part: int, added: Tensor) -> Tensor:
        """Multiply the LoRA output of a prompt part by the mask of its region."""
        # added: R C h w of convolutions, R (or P*R) N C of linear layers, R C of layers without positions
        repeats = len(added) // len(self._regions)
        if added.ndim == 2:
            mask = self._mean_masks[:, part, None]
        elif added.ndim == 3:
            masks = self._resize_masks(self._masks, self._find_spatial_size(added))
            mask = masks[:, part].flatten(1).unsqueeze(-1)  # B N 1
        else:
            mask = self._resize_masks(self._masks, (added.shape[-2], added.shape[-1]))[:, part : part + 1]
        return added * mask.repeat(repeats, *[1] * (mask.ndim - 1)).to(added.dtype)

    def _find_spatial_size(self, tokens: Tensor) -> tuple[int, int]:
        assert self._size is not None
        assert self._size[0] * self._size[1] == tokens.shape[1], (self._size, tokens.shape)
        return self._size

    def _resize_masks(self, by_size: dict[tuple[int, int], Tensor], size: tuple[int, int]) -> Tensor:
        """Resize regional masks or weights to the feature map size, B P h w float32; `by_size` is a cache."""
        if size not in by_size:
            resized = resize(self._regions, size)
            by_size[size] = part_weights(resized) if by_size is self._weights else resized
        return by_size[size]


def restore_forward(module: Any, forward: Callable[..., Tensor] | None) -> None:
    """Restore a module's `forward`; None means that the instance had not replaced its class's method."""
    if forward is None:
        del module.forward
    else:
        module.forward = forward
