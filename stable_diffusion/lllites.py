"""ControlNet-LLLites in use: attached to the U-Net while a batch is generated."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.dialects import load_planned
from checkpoints.model_files import require_file
from checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError
from stable_diffusion.contract import SDXL, Model, ModelKind, RequestedImage, UnetCall, UnetHook
from stable_diffusion.control_net import BatchGuides, is_active
from stable_diffusion.lllite_modules import (
    A_LLLITE,
    PREFIX,
    Lllite,
    LlliteModule,
    find_layer,
    find_layer_path,
    read_lllite,
)
from stable_diffusion.network_options import ControlOptions, ControlSpec

logger = logging.getLogger(__name__)

OPTION = "--control_net_lllite_models"


class Lllites:
    """Apply a run's ControlNet-LLLites to the U-Net."""

    def __init__(self, networks: Sequence[Lllite], specs: Sequence[ControlSpec], model: Model) -> None:
        """Store loaded LLLites for a model.

        Args:
            networks: Networks on the model's device.
            specs: How each network is used.
            model: The loaded model.

        Raises:
            CheckpointError: If a network does not fit the U-Net.
        """
        self._specs = specs
        self._model = model
        # the U-Net layers that each LLLite modifies, with its modules for them
        self._layers: list[list[tuple[nn.Module, LlliteModule]]] = []
        for network, spec in zip(networks, specs, strict=True):
            layers = []
            for name, module in network.named_children():
                assert isinstance(module, LlliteModule)
                layer = find_layer(
                    model.unet, name, dimensions=module.dimensions, path=spec.path, option=OPTION
                )
                layers.append((layer, module))
            self._layers.append(layers)

    @contextlib.contextmanager
    def apply_to_batch(
        self, requests: Sequence[RequestedImage], width: int, height: int
    ) -> Iterator[UnetHook | None]:
        """Attach the modules while a batch is generated; yield the hook, None without guide images.

        Raises:
            OptionError: For the wrong number of guides.
            MediaError: If a guide cannot be read.
        """
        if not any(request.guides for request in requests):
            yield None
            return
        guides = BatchGuides(self._specs, OPTION, requests, width=width, height=height)
        batch = _LlliteBatch(self._specs, guides, self._model.dtype)
        with contextlib.ExitStack() as hooks:
            # attached in reverse, so that the last LLLite changes a shared layer's input first
            for index, layers in reversed(list(enumerate(self._layers))):
                for layer, module in layers:
                    hook = layer.register_forward_pre_hook(partial(batch.change_input, index, module))
                    hooks.callback(hook.remove)
            yield batch.begin


class _LlliteBatch:
    """Guide images of the current batch, and their embeddings."""

    def __init__(self, specs: Sequence[ControlSpec], guides: BatchGuides, dtype: torch.dtype) -> None:
        self._specs = specs
        self._guides = guides
        self._dtype = dtype
        # guide images of each LLLite in the current U-Net call, B 3 H W in 0..1; None if it is inactive
        self._active_guides: list[Tensor | None] = []
        # for modules that have run: the guides, and their embedding
        self._embeddings: dict[LlliteModule, tuple[Tensor, Tensor]] = {}

    def begin(self, call: UnetCall) -> UnetCall:
        """U-Net hook: select the guide images that are active in this call. Return the call unchanged."""
        images = self._guides.resize_for(call, self._dtype)
        self._active_guides = []
        for spec, spec_images in zip(self._specs, images, strict=True):
            self._active_guides.append(spec_images if is_active(spec, call) else None)
        return call

    def change_input(
        self, index: int, module: LlliteModule, _: nn.Module, inputs: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        """Forward pre-hook of a layer: return modified inputs, or None if LLLite `index` is inactive."""
        images = self._active_guides[index] if self._active_guides else None
        if images is None:
            return None
        if module not in self._embeddings or self._embeddings[module][0] is not images:
            self._embeddings[module] = images, module.embed(images * 2 - 1)
        embedding = self._embeddings[module][1]
        x, *others = inputs
        return x + self._specs[index].multiplier * module(x, embedding), *others


def check_lllites(options: ControlOptions, kind: ModelKind) -> None:
    """Check by the headers that all LLLite files fit SDXL, before anything is loaded.

    Raises CheckpointError if one does not fit.
    """
    if not options.control_net_lllite_models:
        return  # the specs are those of ControlNets
    for spec in options.specs:
        if kind is not SDXL:
            raise CheckpointError(
                f"{OPTION} {spec.path}: ControlNet-LLLite is for {SDXL.title}, but --ckpt is {kind.title}. "
                f"Pass a checkpoint of {SDXL.title}, or a ControlNet to --control_net_models.",
                spec.path,
            )
        _check_file(require_file(spec.path, OPTION, ""))


def _check_file(path: Path) -> None:
    """Raise CheckpointError if a file is not an LLLite, or is made for layers that SDXL does not have."""
    with open_checkpoint(path) as checkpoint:
        plan = read_lllite(checkpoint, OPTION)
        # compares only, reads no weights
        load_planned(plan, Lllite, device=torch.device("meta"), dtype=torch.float32, label=A_LLLITE)
    for name in plan.config:
        if find_layer_path(name) is None:
            raise CheckpointError(
                f"{path} is made for the layer {name.removeprefix(PREFIX)}, which {SDXL.title} "
                f"does not have. Pass another file to {OPTION}.",
                path,
            )


def load_lllites(options: ControlOptions, model: Model) -> Lllites | None:
    """Load the LLLites of a run onto the model's device, after `check_lllites`; None if there are none.

    Raises:
        CheckpointError: If a file is damaged or does not fit the U-Net.
    """
    if not options.control_net_lllite_models:
        return None
    networks = []
    for spec in options.specs:
        with open_checkpoint(spec.path) as checkpoint:
            plan = read_lllite(checkpoint, OPTION)
            network = load_planned(plan, Lllite, device=model.device, dtype=model.dtype, label=A_LLLITE)
            networks.append(network)
        logger.info("ControlNet-LLLite %s: %d layers", spec.path, len(list(networks[-1].children())))
    return Lllites(networks, options.specs, model)
