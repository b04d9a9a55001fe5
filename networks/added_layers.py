"""Modules of a model that compute their output with LoRAs added, while their weights stay as they are.

An `AddedPart` is what one LoRA adds to one module, an `AddedLayer` the forward of a module with all of them.
"""
# Letters: R rank

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from networks.deltas import DORA, LORA, Factors, bias_delta, decompose, strength, weight_delta
from networks.lora_products import add_product

_MID = "lora_mid.weight"
_LOW_RANK = {*LORA, _MID, "alpha", "lora_up.bias", "diff_b"}  # the weight changes by small factors only
_OF_BIAS = {"alpha", "diff_b", "lora_up.bias"}


@dataclass(frozen=True)
class ChangedPlace:
    """A parameter that LoRAs change: a module's weight, together with its bias, or one of another name."""

    path: str  # of the parameter
    module: nn.Module
    leaf: str = "weight"

    @property
    def module_path(self) -> str:
        """Path of the module, or of a parameter of another name than `weight`."""
        return self.path.removesuffix(".weight")

    @property
    def parameter(self) -> Tensor:
        found = getattr(self.module, self.leaf)
        assert isinstance(found, Tensor)
        return found

    @property
    def is_linear(self) -> bool:
        return isinstance(self.module, nn.Linear)

    @property
    def adds_to_output(self) -> bool:
        """Whether a change of the weight is one of the output: a matrix or a convolution."""
        module = self.module
        is_plain = isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"
        return (self.is_linear or is_plain) and self.leaf == "weight"

    def has(self, name: str) -> bool:
        """Whether the module has a parameter of this name."""
        return isinstance(getattr(self.module, name, None), nn.Parameter)


class AddedPart:
    """What one LoRA adds to one module, `multiplier` times; nothing until it is on a device."""

    def __init__(self, place: ChangedPlace, factors: Factors, multiplier: float = 1.0) -> None:
        """factors: on the CPU."""
        self.place = place
        self.factors = factors
        self.multiplier = multiplier
        # what is done with the addition to the module's output before it is added; None: nothing
        self.region: Callable[[Tensor], Tensor] | None = None
        self._chain: list[Tensor] = []  # the low-rank factors in the order in which they act
        self._whole: dict[str, Tensor] = {}  # all other factors
        self._bias: Tensor | None = None

    def place_on(self, device: torch.device, dtype: torch.dtype) -> None:
        """Copy the factors to the device, the low-rank ones in the dtype to compute in."""
        self.release()
        factors = self.factors
        if self.place.adds_to_output and LORA[0] in factors and not factors.keys() - _LOW_RANK:
            up = factors[LORA[1]].to(device, torch.float32) * strength(factors)
            middle = [factors[_MID].to(device, dtype)] if _MID in factors else []
            self._chain = [factors[LORA[0]].to(device, dtype), *middle, up.to(dtype)]
        elif factors.keys() - _OF_BIAS:
            self._whole = {name: one.to(device) for name, one in factors.items()}
        self._bias = bias_delta(factors, device)

    def release(self) -> None:
        """Free the device's copies."""
        self._chain, self._whole, self._bias = [], {}, None

    @property
    def is_made_whole(self) -> bool:
        """Whether each pass makes a change as large as the weight: it is not of low rank."""
        return bool(self._whole)

    @property
    def is_active(self) -> bool:
        return self.multiplier != 0

    def addition(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return what is added to the output of a matrix or a convolution for its input, None for nothing.

        dtype: of the output.
        """
        added: Tensor | None = None
        if self._chain:
            added = self._low_rank(x).to(dtype)
        elif self._whole:  # made for every pass: kept, it would be as large as the model
            delta = (self._delta(x.device) * self.multiplier).to(dtype)
            shaped = delta.flatten(1) if self.place.is_linear else delta.reshape(self.place.parameter.shape)
            added = self._apply(x.to(dtype), shaped)
        if self._bias is None:
            return added
        bias = (self._bias * self.multiplier).to(dtype)
        bias = bias if self.place.is_linear else bias[:, None, None]
        return bias.expand_as(self._zeros(x, dtype)) if added is None else added + bias

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """Return the output of a matrix or a convolution for its input x, with what the LoRA adds to it.

        out: nothing else may use it.
        """
        if self._joins(out):
            down, *_, up = self._chain
            return add_product(out, self._hidden(x, down).view(-1, len(down)), up.flatten(1).t())
        added = self.addition(x, out.dtype)
        if added is None:
            return out
        return out + (added if self.region is None else self.region(added))

    def _joins(self, out: Tensor) -> bool:
        """Return whether the last product is added to `out` in place: one pass over it, not three."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not self._chain:
            return False
        is_sum = self.place.is_linear and self.region is None and self._bias is None
        return is_sum and out.dtype == self._chain[-1].dtype

    def changes(self) -> dict[str, Tensor]:
        """Return what is added to the module's parameters, by their names, float32."""
        device = self.place.parameter.device
        changes = {self.place.leaf: self._delta(device) * self.multiplier} if self._whole else {}
        return changes if self._bias is None else {**changes, "bias": self._bias * self.multiplier}

    def _delta(self, device: torch.device) -> Tensor:
        delta = weight_delta(self._whole, device)
        assert delta is not None
        return decompose(self.place.parameter, delta, self._whole[DORA]) if DORA in self._whole else delta

    def _low_rank(self, x: Tensor) -> Tensor:
        down, *middle, up = self._chain
        if self.place.is_linear:
            return functional.linear(self._hidden(x, down), up.flatten(1))
        x = x.to(down.dtype)
        rank, channels = len(down), self.place.parameter.shape[1]
        if middle:  # Tucker: only the core has the size of the kernel
            x = functional.conv2d(x, down.reshape(rank, channels, 1, 1))
            down = middle[0]
        else:
            down = down.reshape(rank, channels, *self.place.parameter.shape[2:])
        hidden = self._apply(x, down) * self.multiplier
        return functional.conv2d(hidden, up.reshape(*up.shape[:2], 1, 1))

    def _hidden(self, x: Tensor, down: Tensor) -> Tensor:
        """Return what is between the factors of a matrix; those of a 1x1 convolution fit too."""
        return functional.linear(x.to(down.dtype), down.flatten(1)) * self.multiplier

    def _apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Do what the module does, with another weight and without bias."""
        module = self.place.module
        if not isinstance(module, nn.Conv2d):
            return functional.linear(x, weight)
        return functional.conv2d(x, weight, None, module.stride, module.padding, module.dilation)

    def _zeros(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self._apply(x.to(dtype), torch.zeros_like(self.place.parameter, dtype=dtype))


class AddedLayer(nn.Module):
    """The forward of one module, which adds what its parts give while `is_on`."""

    def __init__(self, place: ChangedPlace, parts: Sequence[AddedPart]) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.is_on = False
        self._place = place
        self._original = (place.module,)  # in a tuple, so that the module is no part of this one
        self._before: Callable[..., Tensor] = place.module.forward

    def attach(self) -> None:
        """Replace the module's forward by this one's. Call before compilation."""
        self._before = self._original[0].forward
        self._original[0].forward = self.forward

    def switch_on(self, device: torch.device, dtype: torch.dtype) -> None:
        """Copy the factors to the device, in the dtype to compute in."""
        for part in self.parts:
            part.place_on(device, dtype)
        self.is_on = True

    def switch_off(self) -> None:
        """Free the device's copies."""
        self.is_on = False
        for part in self.parts:
            part.release()

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        active = [part for part in self.parts if part.is_active] if self.is_on else []
        if not active:
            return self._before(*inputs, **named)
        if not self._place.adds_to_output:
            return self._run_changed(active, *inputs, **named)
        out = self._before(*inputs, **named)
        for part in active:
            out = part.add_to(out, inputs[0])
        return out

    def _run_changed(self, parts: Sequence[AddedPart], *inputs: Any, **named: Any) -> Tensor:
        """Run a module that is no matrix (a norm, a block with a parameter of its own) with changed weights,
        then put them back.
        """
        if any(part.region is not None for part in parts):
            plain = self._before(*inputs, **named)
            out = plain
            for part in parts:
                added = self._run_with([part], *inputs, **named) - plain
                out = out + (added if part.region is None else part.region(added))
            return out
        return self._run_with(parts, *inputs, **named)

    def _run_with(self, parts: Sequence[AddedPart], *inputs: Any, **named: Any) -> Tensor:
        module: Any = self._original[0]
        names = [name for name in (self._place.leaf, "bias") if self._place.has(name)]
        kept = {name: getattr(module, name).data for name in names}
        # all from the weights as they are, before any is changed
        changes = [part.changes() for part in parts]
        try:
            for change in changes:
                for name, delta in change.items():
                    parameter = getattr(module, name)
                    parameter.data = _sum(parameter.data, delta)
            return self._before(*inputs, **named)
        finally:
            for name, data in kept.items():
                getattr(module, name).data = data


def _sum(weight: Tensor, delta: Tensor) -> Tensor:
    return (weight.float() + delta.reshape(weight.shape)).to(weight.dtype)
