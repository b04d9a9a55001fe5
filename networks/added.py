"""LoRAs that a model has only at times: samples while training may use some of their own.

The model's weights stay as they are, whatever they are stored as. Each module that a LoRA changes gets a
forward that adds the LoRA's part while it is switched on and otherwise calls the one before it, so that
training computes what it would compute without.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger

import torch
from torch import nn

from modules.errors import CheckpointError
from networks.added_layers import AddedLayer, AddedPart, ChangedPlace
from networks.deltas import (
    DORA,
    Factors,
    bias_delta,
    group_by_module,
    has_input_magnitudes,
    other_channels,
    weight_delta,
)
from networks.key_formats import OURS
from networks.loading import LoraFile, list_some, warn_of_absent, warn_of_other_family, warn_of_rest
from networks.module_names import choose_family, replace_dots
from networks.names.layouts import FIRST_LAYERS
from networks.parts import for_model

logger = getLogger(__name__)
_META = torch.device("meta")
SAMPLE_LORA = "--sample_lora"


@dataclass(frozen=True)
class AddedFile:
    """A LoRA file and its strength."""

    lora: LoraFile
    multiplier: float


class AddedLoras:
    """LoRAs of a model that are switched on for a while."""

    def __init__(self, layers: Sequence[AddedLayer]) -> None:
        self.layers = layers

    @contextlib.contextmanager
    def switched_on(self, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
        """Add the LoRAs to what the model computes. dtype: in which it does so."""
        try:
            for layer in self.layers:
                layer.switch_on(device, dtype)
            yield
        finally:
            for layer in self.layers:
                layer.switch_off()


def add_loras(dit: nn.Module, files: Sequence[AddedFile], is_compiled: bool = False) -> AddedLoras:
    """Put LoRAs into a model, switched off. Call after a network was attached, before compilation.

    is_compiled: blocks will be; compiled code takes no other weights, so changes of norms are left out.
    Raises CheckpointError if a file does not fit the model or is a DoRA.
    """
    for file in files:
        refuse_dora(file.lora)
    known = places(dit)
    found = [fitting(file.lora, known, SAMPLE_LORA) for file in files]
    if is_compiled:
        found = [_without_norms(file.lora, one, known) for file, one in zip(files, found, strict=True)]
    parts = [
        {name: AddedPart(known[name], factors, file.multiplier) for name, factors in one.items()}
        for file, one in zip(files, found, strict=True)
    ]
    return AddedLoras(attach_parts(parts, known))


def attach_parts(
    parts: Sequence[Mapping[str, AddedPart]], known: Mapping[str, ChangedPlace]
) -> list[AddedLayer]:
    """Put the parts of several LoRAs into a model, switched off; return its changed layers.

    parts: of each LoRA, by our names of modules. known: `places` of the model.
    """
    names = dict.fromkeys(name for one in parts for name in one)
    layers = [AddedLayer(known[name], [one[name] for one in parts if name in one]) for name in names]
    for layer in layers:
        layer.attach()
    return layers


def refuse_dora(lora: LoraFile) -> None:
    """Raise CheckpointError if a file is a DoRA: it cannot be added beside other changes of the weights."""
    decomposed = [name for name, factors in group_by_module(lora.tensors).items() if DORA in factors]
    if decomposed:
        raise CheckpointError(
            f"--sample_lora {lora.path} is a DoRA ({decomposed[0]}), which depends on the weights it was "
            "made for.\n  Give a LoRA, LoHa or LoKr.",
            lora.path,
        )


def places(dit: nn.Module, published: Callable[[str], str] = str) -> dict[str, ChangedPlace]:
    """Return what LoRAs may change, under our names: `lora_unet_blocks_0_ffn_0`, also
    `lora_unet_blocks_0_modulation`.

    published: path of a module -> the one by which files name it.
    """
    found = {}
    for path, module in dit.named_modules():
        for leaf, _ in module.named_parameters(recurse=False):
            named = published(path)
            name, whole = named if leaf == "weight" else f"{named}.{leaf}".lstrip("."), f"{path}.{leaf}"
            if leaf != "bias":
                found[OURS + replace_dots(name)] = ChangedPlace(whole, module, leaf)
    return found


def fitting(lora: LoraFile, known: Mapping[str, ChangedPlace], option: str) -> dict[str, Factors]:
    """Return the factors of a file for the modules of a model; warn of those that it does not have.

    option: that names the file, for messages. Raises CheckpointError if the file does not fit the model.
    """

    def height(name: str) -> int | None:
        return len(known[name].parameter) if name in known else None

    stored = group_by_module(for_model(lora.tensors, height))
    missed = [name for name in stored if name not in known]
    found: dict[str, Factors] = {name: factors for name, factors in stored.items() if name in known}
    family = choose_family(name.removeprefix(OURS) for name in known)
    if not found:
        made = lora.family()
        kinds = "" if made is None or made is family else f" It is for {made.name}."
        raise CheckpointError(
            f"{option} {lora.path} does not fit this model, which has no {list_some(missed, 2)}.{kinds}\n"
            "  Give a LoRA that was trained for this model.",
            lora.path,
        )
    for name, factors in list(found.items()):
        found[name] = _without_other_channels(lora, factors, known[name])
        _check_sizes(lora, name, found[name], known[name], option)
    warn_of_absent(lora.path, missed, len(stored), "modules are not in this model", family)
    warn_of_other_family(lora, family)
    return found


def _without_norms(
    lora: LoraFile, found: Mapping[str, Factors], known: Mapping[str, ChangedPlace]
) -> dict[str, Factors]:
    left_out = [name for name in found if not known[name].adds_to_output]
    warn_of_rest(lora.path, left_out, len(found), "modules are not changed because blocks are compiled")
    return {name: factors for name, factors in found.items() if name not in left_out}


def _without_other_channels(lora: LoraFile, factors: Factors, place: ChangedPlace) -> Factors:
    """Return the factors without a change of a first layer's weight that takes another number of channels."""
    other = other_channels(factors, place.parameter) if place.path.endswith(FIRST_LAYERS) else None
    if other is None:
        return factors
    logger.warning(f"{lora.path}: {other}; the rest is used without it")
    bias = bias_delta(factors, torch.device("cpu"))
    return {} if bias is None else {"diff_b": bias}


def _check_sizes(lora: LoraFile, name: str, factors: Factors, place: ChangedPlace, option: str) -> None:
    wanted = place.parameter
    delta = weight_delta({part: tensor for part, tensor in factors.items() if part != "alpha"}, _META)
    bias = bias_delta(factors, torch.device("cpu"))
    fits = delta is None or (len(delta) == len(wanted) and delta.numel() == math.prod(wanted.shape))
    if bias is not None and (bias.numel() != len(wanted) or not (place.adds_to_output or place.has("bias"))):
        fits = False
    if DORA in factors and fits:
        axis = 1 if has_input_magnitudes(factors) else 0
        fits = wanted.ndim > 1 and factors[DORA].numel() == wanted.shape[axis]
    if not fits:
        found = "a bias" if delta is None else list(delta.shape)
        raise CheckpointError(
            f"{option} {lora.path} does not fit this model: for {name} it has {found}, the model "
            f"{list(wanted.shape)}.\n  Give a LoRA that was trained for a model of this size.",
            lora.path,
        )
