"""ControlNet-LLLites at work: hung into the U-Net while a batch is made."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from checkpoints.dialects import LoadPlan, load_planned, other_kind
from checkpoints.model_files import require_file
from checkpoints.opening import Checkpoint, open_checkpoint, plain_sources
from modules.errors import CheckpointError
from networks.module_names import alias, module_path
from stable_diffusion.contract import SDXL, AskedPicture, Idea, Model, ModelKind, UnetCall
from stable_diffusion.control_net import BatchGuides, is_active
from stable_diffusion.names import SDXL as SDXL_NAMES
from stable_diffusion.network_options import ControlOptions, ControlUse

logger = logging.getLogger(__name__)


# ControlNet-LLLite: small networks that change what single layers of SDXL's U-Net take, after a guide image.
#
# A module turns the guide into tokens of its layer by convolutions whose kernels do not overlap, joins them
# to the layer's input, which it projects down, and projects the result up again:
#
# layer(x + multiplier * up(mid(join(conditioning1(guide), down(x)))))
#
# Positive and negative rows are changed alike. Source: the documents and files of kohya-ss/controlnet-lllite.
OPTION = "--control_net_lllite_models"
PREFIX = "lllite_unet_"  # then the layer's path in the released files, with "_" for "."
_OTHER_PREFIX = "lllite_"  # of other models than SDXL
_WHAT = "a ControlNet-LLLite for Stable Diffusion XL"


@dataclass(frozen=True)
class LllitePart:
    """Dimensions of the module of one layer."""

    convolutions: tuple[tuple[int, int], ...]  # (channels, kernel and stride), one after the other
    width: int  # of the layer's input
    rank: int  # of what it is projected down to
    is_convolution: bool  # the layer's input is R C h w, else R L C

    @property
    def reduction(self) -> int:
        """Return the number of the guide's pixels that become one token, in each direction."""
        product = 1
        for _, stride in self.convolutions:
            product *= stride
        return product


class LlliteModule(nn.Module):
    """Change the input of one layer. Attribute names are those of the files."""

    def __init__(self, part: LllitePart) -> None:
        super().__init__()
        self.part = part
        layers: list[nn.Module] = []
        channels = 3
        for width, stride in part.convolutions:
            layers += [nn.Conv2d(channels, width, kernel_size=stride, stride=stride), nn.ReLU()]
            channels = width
        self.conditioning1 = nn.Sequential(*layers[:-1])  # no activation after the last
        self.down = nn.Sequential(self._make_layer(part.width, part.rank), nn.ReLU())
        self.mid = nn.Sequential(self._make_layer(part.rank + channels, part.rank), nn.ReLU())
        self.up = nn.Sequential(self._make_layer(part.rank, part.width))

    def _make_layer(self, width: int, out: int) -> nn.Module:
        return nn.Conv2d(width, out, kernel_size=1) if self.part.is_convolution else nn.Linear(width, out)

    def embed(self, guides: Tensor) -> Tensor:
        """Return the guides' embedding: B 3 H W in -1..1 -> B L E, or B E h w where the layer convolves."""
        height, width = guides.shape[2:]
        step = self.part.reduction
        # the U-Net rounds its sizes up; an edge that is not a whole step is repeated, as strides round down
        missing = (0, -width % step, 0, -height % step)
        embedding = self.conditioning1(nn.functional.pad(guides, missing, mode="replicate"))
        return embedding if self.part.is_convolution else rearrange(embedding, "b e h w -> b (h w) e")

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        # x: R L C or R C h w    embedding: B L E or B E h w; row r belongs to picture r modulo B
        axis = 1 if self.part.is_convolution else 2
        rows = embedding.repeat(x.shape[0] // embedding.shape[0], *(1,) * (embedding.ndim - 1))
        return self.up(self.mid(torch.cat([rows, self.down(x)], dim=axis)))


class Lllite(nn.Module):
    """All modules of one file, by the file's names of layers."""

    def __init__(self, parts: Mapping[str, LllitePart]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, LlliteModule(part))


def read_lllite(checkpoint: Checkpoint) -> LoadPlan[dict[str, LllitePart]]:
    """Plan how to load a file of ControlNet-LLLite. Raises CheckpointError if it is another file."""
    names = {name.partition(".")[0] for name in checkpoint.tensors if name.startswith(PREFIX)}
    if not names:
        other_names = sorted(name for name in checkpoint.tensors if name.startswith(_OTHER_PREFIX))
        if other_names:
            raise CheckpointError(
                f"{checkpoint.path} is a ControlNet-LLLite of another model (it has {other_names[0]}). "
                f"Give one for Stable Diffusion XL to {OPTION}.",
                checkpoint.path,
            )
        raise other_kind(checkpoint, _WHAT, OPTION, "a file such as controllllite_v01032064e_sdxl_canny")
    return LoadPlan(
        {name: _read_part(checkpoint, name) for name in sorted(names)}, checkpoint, plain_sources(checkpoint)
    )


def _read_part(checkpoint: Checkpoint, name: str) -> LllitePart:
    tensors = checkpoint.tensors

    def shape(ending: str, axes: tuple[int, ...]) -> tuple[int, ...]:
        info = tensors.get(f"{name}.{ending}")
        if info is None or len(info.shape) not in axes or 0 in info.shape:
            raise CheckpointError(
                f"{checkpoint.path} is not {_WHAT} as known: {name}.{ending} is missing or has another "
                "shape. Copy or download it again.",
                checkpoint.path,
            )
        return info.shape

    start = f"{name}.conditioning1."
    places = []
    for tensor_name in tensors:
        if tensor_name.startswith(start) and tensor_name.endswith(".weight"):
            place = tensor_name.removeprefix(start).removesuffix(".weight")
            if place.isdecimal():
                places.append(int(place))
    kernels = []
    for number in sorted(places) or [0]:
        channels, _, size, _ = shape(f"conditioning1.{number}.weight", (4,))
        kernels.append((channels, size))
    down = shape("down.0.weight", (2, 4))
    return LllitePart(
        tuple(kernels),
        down[1],
        down[0],
        is_convolution=len(down) == 4,
    )


class Lllites:
    """The LLLites of a run."""

    def __init__(self, networks: Sequence[Lllite], uses: Sequence[ControlUse], model: Model) -> None:
        """networks: on the model's device. uses: how each is used.

        Raises CheckpointError if one does not fit the U-Net.
        """
        self._uses = uses
        self._model = model
        # the layers of the U-Net that each LLLite changes, with their modules
        self._layers: list[list[tuple[nn.Module, LlliteModule]]] = []
        for network, use in zip(networks, uses, strict=True):
            layers = []
            for name, module in network.named_children():
                assert isinstance(module, LlliteModule)
                layers.append((_find_layer(model.unet, name, module.part, use.path), module))
            self._layers.append(layers)

    @contextlib.contextmanager
    def for_batch(self, pictures: Sequence[AskedPicture], width: int, height: int) -> Iterator[Idea | None]:
        """Attach the modules while a batch of this size is made; yield the hook, or None if it has no guides.

        Raises OptionError for a wrong number of guides, MediaError if one cannot be read.
        """
        if not any(picture.guides for picture in pictures):
            yield None
            return
        guides = BatchGuides(self._uses, OPTION, pictures, width=width, height=height)
        batch = _LlliteBatch(self._uses, guides, self._model.dtype)
        with contextlib.ExitStack() as hooks:
            # if several change one layer, the last one is applied first
            for number, layers in reversed(list(enumerate(self._layers))):
                for layer, module in layers:
                    hook = layer.register_forward_pre_hook(partial(batch.change_input, number, module))
                    hooks.callback(hook.remove)
            yield batch.begin


class _LlliteBatch:
    """The guides of a batch and their embeddings, while the U-Net makes it."""

    def __init__(self, uses: Sequence[ControlUse], guides: BatchGuides, dtype: torch.dtype) -> None:
        self._uses = uses
        self._guides = guides
        self._dtype = dtype
        # guides of each LLLite that acts in the present call, B 3 H W in 0..1
        self._acting: list[Tensor | None] = []
        # for modules that have run: the guides, and their embedding
        self._embedded: dict[LlliteModule, tuple[Tensor, Tensor]] = {}

    def begin(self, call: UnetCall) -> UnetCall:
        """Choose the guides for a call of the U-Net, which is returned unchanged."""
        images = self._guides.at(call, self._dtype)
        self._acting = []
        for use, use_images in zip(self._uses, images, strict=True):
            self._acting.append(use_images if is_active(use, call) else None)
        return call

    def change_input(
        self, number: int, module: LlliteModule, _: nn.Module, inputs: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        """Return the changed inputs of a layer, as its forward pre-hook; None if LLLite `number` is idle."""
        images = self._acting[number] if self._acting else None
        if images is None:
            return None
        if module not in self._embedded or self._embedded[module][0] is not images:
            self._embedded[module] = images, module.embed(images * 2 - 1)
        embedding = self._embedded[module][1]
        x, *others = inputs
        return x + self._uses[number].multiplier * module(x, embedding), *others


def _find_layer(unet: nn.Module, name: str, part: LllitePart, path: Path) -> nn.Module:
    """Return the layer of a U-Net that a module of the file `path` changes.

    name: of the layer in the file. Raises CheckpointError if the module does not fit the U-Net.
    """
    layer_path = _find_path(name)
    try:
        layer = None if layer_path is None else unet.get_submodule(layer_path)
    except AttributeError:
        layer = None
    axes = 4 if part.is_convolution else 2
    weight = getattr(layer, "weight", None)
    if layer is not None and weight is not None and weight.ndim == axes and weight.shape[1] == part.width:
        return layer
    has = "has no such layer"
    if weight is not None:
        has = f"has {' x '.join(map(str, weight.shape))} there"
    raise CheckpointError(
        f"{path} does not fit --ckpt: it is made for {name.removeprefix(PREFIX)} with inputs of "
        f"{part.width} channels, and the model {has}. Give one for {SDXL.words} to {OPTION}.",
        path,
    )


def _find_path(name: str) -> str | None:
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
            plan = read_lllite(checkpoint)
            # compares, reads nothing
            load_planned(plan, Lllite, device=torch.device("meta"), dtype=torch.float32, what=_WHAT)
            for name in plan.config:
                if _find_path(name) is None:
                    raise CheckpointError(
                        f"{use.path} is made for the layer {name.removeprefix(PREFIX)}, which {SDXL.words} "
                        f"does not have. Give another file to {OPTION}.",
                        use.path,
                    )


def load_lllites(options: ControlOptions, model: Model) -> Lllites | None:
    """Load the LLLites of a run onto the model's device, after `check_lllites`; None if there are none.

    Raises CheckpointError if one is damaged or does not fit the U-Net.
    """
    if not options.control_net_lllite_models:
        return None
    networks = []
    for use in options.uses:
        with open_checkpoint(use.path) as checkpoint:
            plan = read_lllite(checkpoint)
            network = load_planned(plan, Lllite, device=model.device, dtype=model.dtype, what=_WHAT)
            networks.append(network)
        logger.info("ControlNet-LLLite %s: %d layers", use.path, len(list(networks[-1].children())))
    return Lllites(networks, options.uses, model)
