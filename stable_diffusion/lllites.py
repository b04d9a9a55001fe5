"""ControlNet-LLLites at work: hung into the U-Net while a batch is made."""
# Letters: B pictures, R rows of one call of the U-Net, L tokens

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modules.checkpoints.model_files import require_file
from modules.checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError
from networks.module_names import alias, module_path
from networks.names.stable_diffusion import SDXL as SDXL_NAMES
from stable_diffusion.contract import SDXL, AskedPicture, Idea, Model, ModelKind, UnetCall
from stable_diffusion.control_options import ControlOptions, ControlUse
from stable_diffusion.lllite import OPTION, PREFIX, Lllite, LlliteModule, load_lllite, read_lllite
from stable_diffusion.preparing import BatchGuides, GuideImages, is_active

logger = logging.getLogger(__name__)


class Lllites:
    """The LLLites of a run."""

    def __init__(self, networks: Sequence[Lllite], uses: Sequence[ControlUse], model: Model) -> None:
        """networks: on the model's device. uses: how each is used.

        Raises CheckpointError if one does not fit the U-Net.
        """
        self._uses, self._model = uses, model
        self._layers = [
            _layers_of(network, use, model.unet) for network, use in zip(networks, uses, strict=True)
        ]
        self._images = GuideImages(uses, OPTION)

    @contextlib.contextmanager
    def for_batch(self, pictures: Sequence[AskedPicture], width: int, height: int) -> Iterator[Idea | None]:
        """Hang them in for a batch of pictures of that size, out at the end; yield None if it has no guides.

        Raises OptionError if a picture has another number of guides, MediaError if one cannot be read.
        """
        if not any(picture.guides for picture in pictures):
            yield None
            return
        guides = BatchGuides(self._images, pictures, width, height)
        acts = [_Acts(use) for use in self._uses]

        def begin(call: UnetCall) -> UnetCall:
            for each, images in zip(acts, guides.at(call, self._model.dtype), strict=True):
                each.begin(call, images)
            return call

        with contextlib.ExitStack() as hooks:
            # of several in one layer, each takes what the one after it made of the input
            for layers, each in zip(self._layers[::-1], acts[::-1], strict=True):
                for layer, module in layers:
                    hook = layer.register_forward_pre_hook(each.change_input_by(module))
                    hooks.callback(hook.remove)
            yield begin


class _Acts:
    """What one LLLite does in the present step."""

    def __init__(self, use: ControlUse) -> None:
        self._use = use
        self._is_active = False
        self._images: Tensor | None = None  # B 3 H W in 0..1
        self._embeddings: dict[LlliteModule, Tensor] = {}  # made when the layer first runs

    def begin(self, call: UnetCall, images: Tensor) -> None:
        self._is_active = is_active(self._use, call)
        if images is not self._images:
            self._images = images
            self._embeddings.clear()

    def change_input_by(self, module: LlliteModule) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
        """Return the hook of a layer, which changes what the layer takes."""

        def change(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not self._is_active or self._images is None:
                return None
            if module not in self._embeddings:
                self._embeddings[module] = module.embed(self._images * 2 - 1)
            x = inputs[0]
            return x + self._use.multiplier * module(x, self._embeddings[module]), *inputs[1:]

        return change


def _layers_of(network: Lllite, use: ControlUse, unet: nn.Module) -> list[tuple[nn.Module, LlliteModule]]:
    """Return the layers of a U-Net that an LLLite changes, each with its module."""
    found = []
    for name, module in network.named_children():
        assert isinstance(module, LlliteModule)
        path = _path_of(name)
        try:
            layer = None if path is None else unet.get_submodule(path)
        except AttributeError:
            layer = None
        width, axes = module.part.width, 4 if module.part.is_convolution else 2
        weight = getattr(layer, "weight", None)
        if layer is None or weight is None or weight.ndim != axes or weight.shape[1] != width:
            has = "has no such layer" if weight is None else f"has {' x '.join(map(str, weight.shape))} there"
            raise CheckpointError(
                f"{use.path} does not fit --ckpt: it is made for {name.removeprefix(PREFIX)} with inputs of "
                f"{width} channels, and the model {has}. Give one for {SDXL.words} to {OPTION}.",
                use.path,
            )
        found.append((layer, module))
    return found


def _path_of(name: str) -> str | None:
    """Return the path of a layer of the U-Net by its name in a file; None if SDXL has no such layer."""
    return module_path(alias(name.removeprefix(PREFIX), SDXL_NAMES), SDXL_NAMES)


def check_lllites(options: ControlOptions, kind: ModelKind) -> None:
    """Check all files by their headers, before anything is loaded. Raises CheckpointError."""
    for use in options.uses if options.control_net_lllite_models else ():
        if kind is not SDXL:
            raise CheckpointError(
                f"{OPTION} {use.path}: ControlNet-LLLite is for {SDXL.words}, but --ckpt is {kind.words}. "
                f"Give a checkpoint of {SDXL.words}, or a ControlNet to --control_net_models.",
                use.path,
            )
        with open_checkpoint(require_file(use.path, OPTION, "")) as checkpoint:
            load_lllite(checkpoint, torch.device("meta"), torch.float32)  # compares, reads nothing
            for name in read_lllite(checkpoint).config:
                if _path_of(name) is None:
                    raise CheckpointError(
                        f"{use.path} is made for the layer {name.removeprefix(PREFIX)}, which {SDXL.words} "
                        f"does not have. Give another file to {OPTION}.",
                        use.path,
                    )


def load_lllites(options: ControlOptions, model: Model) -> Lllites | None:
    """Load the LLLites of a run onto the model's device; None if there are none.

    Raises CheckpointError as `check_lllites`, or if one does not fit the U-Net.
    """
    if not options.control_net_lllite_models:
        return None
    check_lllites(options, model.kind)
    networks = []
    for use in options.uses:
        with open_checkpoint(use.path) as checkpoint:
            networks.append(load_lllite(checkpoint, model.device, model.dtype))
        logger.info("ControlNet-LLLite %s: %d layers", use.path, len(list(networks[-1].children())))
    return Lllites(networks, options.uses, model)
