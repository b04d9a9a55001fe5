"""LoRAs that a model has only at times: samples while training may use some of their own.

The model's weights stay as they are, whatever they are stored as. Each module that a LoRA changes gets a
forward that adds the LoRA's part while it is switched on and otherwise calls the one before it, so that
training computes what it would compute without.
"""
# Letters: R rank

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from modules.errors import CheckpointError
from networks.deltas import (
    DORA,
    LORA,
    Factors,
    bias_delta,
    group_by_module,
    other_channels,
    strength,
    weight_delta,
)
from networks.key_formats import OURS
from networks.loading import LoraFile, list_some, warn_of_absent, warn_of_other_family, warn_of_rest
from networks.module_names import choose_family, replace_dots
from networks.names.layouts import FIRST_LAYERS
from networks.parts import for_model

logger = getLogger(__name__)
_META = torch.device("meta")
_LOW_RANK = {*LORA, "alpha", "lora_up.bias", "diff_b"}  # the weight changes by two factors only


@dataclass(frozen=True)
class AddedFile:
    """A LoRA file and its strength."""

    lora: LoraFile
    multiplier: float


class AddedLayer(nn.Module):
    """The forward of one module, which adds the changes of LoRAs while `is_on`."""

    def __init__(self, place: "_Place", changes: Sequence[tuple[Factors, float]]) -> None:
        """place: what is changed. changes: the factors of each LoRA, on the CPU, with its multiplier."""
        super().__init__()
        original = place.module
        self._leaf = place.leaf
        self._adds_to_output = place.is_linear
        self.is_on = False
        self.changes = tuple(changes)
        self._original = (original,)  # in a tuple, so that the module is no part of this one
        self._before: Callable[..., Tensor] = original.forward
        self._low_rank: list[tuple[Tensor, Tensor]] = []  # R x in, out x R: with the strength in it
        self._others: list[tuple[dict[str, Tensor], float]] = []
        self._bias: Tensor | None = None

    def attach(self) -> None:
        """Replace the module's forward by this one's. Call before compilation."""
        self._before = self._original[0].forward
        self._original[0].forward = self.forward

    def switch_on(self, device: torch.device, dtype: torch.dtype) -> None:
        """Copy the factors to the device, in the dtype to compute in."""
        for factors, multiplier in self.changes:
            if self._adds_to_output and _is_low_rank(factors):
                up = factors[LORA[1]].to(device, torch.float32) * (multiplier * strength(factors))
                self._low_rank.append((factors[LORA[0]].to(device, dtype), up.to(dtype)))
            elif factors.keys() - {"alpha", "diff_b", "lora_up.bias"}:
                self._others.append(({name: one.to(device) for name, one in factors.items()}, multiplier))
            bias = bias_delta(factors, device)
            if bias is not None:
                self._bias = multiplier * bias + (0 if self._bias is None else self._bias)
        self.is_on = True

    def switch_off(self) -> None:
        """Free the device's copies."""
        self.is_on, self._bias = False, None
        self._low_rank, self._others = [], []

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        if not self.is_on:
            return self._before(*inputs, **named)
        if not self._adds_to_output:
            return self._run_changed(*inputs, **named)
        (x,) = inputs
        out = self._before(x)
        for down, up in self._low_rank:
            out = out + functional.linear(functional.linear(x.to(down.dtype), down), up).to(out.dtype)
        for (
            factors,
            multiplier,
        ) in self._others:  # made for every pass: whole, it may be as large as the model
            delta = weight_delta(factors, out.device)
            assert delta is not None
            out = out + functional.linear(x.to(out.dtype), (multiplier * delta.flatten(1)).to(out.dtype)).to(
                out.dtype
            )
        return out if self._bias is None else out + self._bias.to(out.dtype)

    def _run_changed(self, *inputs: Any, **named: Any) -> Tensor:
        """Run a module that is no Linear (a norm, a convolution, a block with a parameter of its own) with
        changed weights, then put them back.
        """
        module: Any = self._original[0]
        kept = {name: getattr(module, name).data for name in (self._leaf, "bias") if _has(module, name)}
        try:
            for factors, multiplier in self._others:
                delta = weight_delta(factors, kept[self._leaf].device)
                assert delta is not None
                changed = getattr(module, self._leaf)
                changed.data = _sum(changed.data, multiplier * delta)
            if self._bias is not None:
                module.bias.data = _sum(module.bias.data, self._bias)
            return self._before(*inputs, **named)
        finally:
            for name, data in kept.items():
                getattr(module, name).data = data


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
    known = _places(dit)
    changes: dict[str, list[tuple[Factors, float]]] = {}
    for file in files:
        for name, factors in _fitting(file.lora, known, is_compiled).items():
            changes.setdefault(name, []).append((factors, file.multiplier))
    layers = [AddedLayer(known[name], found) for name, found in changes.items()]
    for layer in layers:
        layer.attach()
    return AddedLoras(layers)


def refuse_dora(lora: LoraFile) -> None:
    """Raise CheckpointError if a file is a DoRA: it cannot be added beside other changes of the weights."""
    decomposed = [name for name, factors in group_by_module(lora.tensors).items() if DORA in factors]
    if decomposed:
        raise CheckpointError(
            f"--sample_lora {lora.path} is a DoRA ({decomposed[0]}), which depends on the weights it was "
            "made for.\n  Give a LoRA, LoHa or LoKr.",
            lora.path,
        )


@dataclass(frozen=True)
class _Place:
    """A parameter that LoRAs change: a module's weight, together with its bias, or one of another name."""

    path: str  # of the parameter
    module: nn.Module
    leaf: str = "weight"

    @property
    def parameter(self) -> Tensor:
        found = getattr(self.module, self.leaf)
        assert isinstance(found, Tensor)
        return found

    @property
    def is_linear(self) -> bool:
        return isinstance(self.module, nn.Linear)


def _places(dit: nn.Module) -> dict[str, _Place]:
    """Return what LoRAs may change, under our names: `lora_unet_blocks_0_ffn_0`, also
    `lora_unet_blocks_0_modulation`.
    """
    found = {}
    for path, module in dit.named_modules():
        for leaf, _ in module.named_parameters(recurse=False):
            name, whole = path if leaf == "weight" else f"{path}.{leaf}".lstrip("."), f"{path}.{leaf}"
            if leaf != "bias":
                found[OURS + replace_dots(name)] = _Place(whole, module, leaf)
    return found


def _fitting(lora: LoraFile, known: Mapping[str, _Place], is_compiled: bool) -> dict[str, Factors]:
    """Return the factors of a file for the modules of the model."""

    def height(name: str) -> int | None:
        return len(known[name].parameter) if name in known else None

    refuse_dora(lora)
    stored = group_by_module(for_model(lora.tensors, height))
    missed = [name for name in stored if name not in known]
    fitting: dict[str, Factors] = {name: factors for name, factors in stored.items() if name in known}
    if not fitting:
        raise CheckpointError(
            f"--sample_lora {lora.path} does not fit this model, which has no {list_some(missed, 2)}.\n"
            "  Give a LoRA that was trained for this model.",
            lora.path,
        )
    for name, factors in list(fitting.items()):
        fitting[name] = _without_other_channels(lora, factors, known[name])
        _check_sizes(lora, name, fitting[name], known[name].module, known[name].parameter)
    family = choose_family(name.removeprefix(OURS) for name in known)
    if is_compiled:
        left_out = [name for name in fitting if not known[name].is_linear]
        warn_of_rest(lora.path, left_out, len(stored), "modules are not changed because blocks are compiled")
        fitting = {name: factors for name, factors in fitting.items() if name not in left_out}
    warn_of_absent(lora.path, missed, len(stored), "modules are not in this model", family)
    warn_of_other_family(lora, family)
    return fitting


def _without_other_channels(lora: LoraFile, factors: Factors, place: _Place) -> Factors:
    """Return the factors without a change of a first layer's weight that takes another number of channels."""
    other = other_channels(factors, place.parameter) if place.path.endswith(FIRST_LAYERS) else None
    if other is None:
        return factors
    logger.warning(f"{lora.path}: {other}; the rest is used without it")
    bias = bias_delta(factors, torch.device("cpu"))
    return {} if bias is None else {"diff_b": bias}


def _check_sizes(lora: LoraFile, name: str, factors: Factors, module: nn.Module, wanted: Tensor) -> None:
    delta = weight_delta({part: tensor for part, tensor in factors.items() if part != "alpha"}, _META)
    bias = bias_delta(factors, torch.device("cpu"))
    fits = delta is None or (len(delta) == len(wanted) and delta.numel() == math.prod(wanted.shape))
    if bias is not None and (
        bias.numel() != len(wanted) or not (isinstance(module, nn.Linear) or _has(module, "bias"))
    ):
        fits = False
    if not fits:
        found = "a bias" if delta is None else list(delta.shape)
        raise CheckpointError(
            f"--sample_lora {lora.path} does not fit this model: for {name} it has {found}, the model "
            f"{list(wanted.shape)}.\n  Give a LoRA that was trained for a model of this size.",
            lora.path,
        )


def _is_low_rank(factors: Factors) -> bool:
    return LORA[0] in factors and not factors.keys() - _LOW_RANK


def _has(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Parameter)


def _sum(weight: Tensor, delta: Tensor) -> Tensor:
    return (weight.float() + delta.reshape(weight.shape)).to(weight.dtype)
