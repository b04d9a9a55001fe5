"""Wrap the forward of modules with LoRAs that are active only at certain times or in regions of an image.

The model's weights are unchanged, in any storage format. A `LoraBranch` is one LoRA's addition to one module;
a `LoraWrapper` wraps the forward of a module and adds all of its branches. Switched off, it calls the
original forward, so that training is unaffected.
"""
# Letters: R rank

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from checkpoints.stored.forms import get_quantized_weight
from modules.console import list_some
from modules.errors import CheckpointError
from networks import loading
from networks.apply import list_changes
from networks.delta import Delta, read_delta, read_deltas
from networks.depth_variants import fit_depths
from networks.fused_loras import convert_fused_layers
from networks.kinds.composing import MAGNITUDE_KIND_NAME, list_additive
from networks.kinds.factors import DOWN, UP
from networks.loading import LoraFile, WeightedLora
from networks.lora_products import add_product
from networks.module_factors import (
    BIAS_FACTORS,
    CPU,
    PLAIN_LORA_FACTORS,
    SET_WEIGHT,
    compute_scaling,
    get_lora_rank,
    group_by_module,
)
from networks.module_names import select_family
from networks.names.layouts import FIRST_LAYERS, OURS, FamilyNames
from networks.rank_masks import RankMask, count_joined_parts, mask_for, read_rank_rule
from networks.unused_tensors import describe_text_side
from runtime.run_blocks import get_stage_files

logger = getLogger(__name__)
_TUCKER_CORE = "lora_mid.weight"


@dataclass(frozen=True)
class ChangedParameter:
    """A model parameter that LoRAs change; for `weight`, LoRAs may change the module's bias too."""

    path: str  # path of the parameter
    module: nn.Module
    parameter_name: str = "weight"

    @property
    def module_path(self) -> str:
        """Path of the module if its weight is changed, otherwise the full path of the parameter."""
        return self.path.removesuffix(".weight")

    @property
    def parameter(self) -> Tensor:
        """The module's current parameter."""
        parameter = getattr(self.module, self.parameter_name)
        assert isinstance(parameter, Tensor)
        return parameter

    @property
    def unpacked(self) -> Tensor:
        """Return the parameter; for an 8-bit or 4-bit weight, a placeholder with the original shape."""
        stored = get_quantized_weight(self.module) if self.parameter_name == "weight" else None
        return self.parameter if stored is None else torch.empty(1).expand(stored.shape)

    @property
    def is_linear(self) -> bool:
        """Whether the module is a Linear."""
        return isinstance(self.module, nn.Linear)

    @property
    def adds_to_output(self) -> bool:
        """Return whether a change of the weight can be computed as an addition to the layer's output.

        True for a Linear and for a plain Conv2d.
        """
        module = self.module
        is_plain_convolution = (
            isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"
        )
        return (self.is_linear or is_plain_convolution) and self.parameter_name == "weight"

    def has(self, name: str) -> bool:
        """Whether the module has a parameter of this name."""
        return isinstance(getattr(self.module, name, None), nn.Parameter)


class LoraBranch:
    """One LoRA's addition to one module, scaled by `multiplier`; it has no tensors before `place_on`."""

    def __init__(
        self,
        target: ChangedParameter,
        delta: Delta,
        multiplier: float = 1.0,
        uses_frozen_norms: bool = False,
    ) -> None:
        """Store the change of one module; it has no effect until `place_on` is called.

        Args:
            target: Parameter that is changed.
            delta: The change, on the CPU.
            multiplier: Strength of the LoRA.
            uses_frozen_norms: Whether DoRA magnitudes refer to the frozen weight's norms, as in ComfyUI.
        """
        self.target = target
        self.delta = delta
        self.multiplier = multiplier
        self._uses_frozen_norms = uses_frozen_norms
        # limits the addition to a region of the image; None: everywhere
        self.apply_region: Callable[[Tensor], Tensor] | None = None
        self.rank_mask: RankMask | None = None  # T-LoRA
        self.rotation = delta.rotation
        self.output_rows: slice | None = None  # output rows that the rotation affects; None: all rows
        self._rotation_values: Tensor | None = None  # parameters of the rotation, float32
        self._low_rank_factors: list[Tensor] = []  # in the order of application: down, (core,) up
        # factors of other kinds, whose full matrix is computed in each pass
        self._full_delta: Delta | None = None
        self._bias: Tensor | None = None

    def place_on(self, device: torch.device, dtype: torch.dtype) -> None:
        """Copy the factors to the device, and low-rank factors also to the compute dtype."""
        self.release()
        factors = self.delta.factors
        if self.rotation is not None:
            self._rotation_values = factors[self.rotation.factor_name].to(device, torch.float32)
            return
        is_low_rank = DOWN in factors and factors.keys() <= PLAIN_LORA_FACTORS | {_TUCKER_CORE}
        changes_weight = bool(factors.keys() - BIAS_FACTORS - {"alpha"})
        if is_low_rank and self.target.adds_to_output:
            down = factors[DOWN].to(device, dtype)
            up = factors[UP].to(device, torch.float32) * compute_scaling(factors)  # alpha / rank
            core = [factors[_TUCKER_CORE].to(device, dtype)] if _TUCKER_CORE in factors else []
            self._low_rank_factors = [down, *core, up.to(dtype)]
        elif changes_weight:
            self._full_delta = self.delta.to(device)
        self._bias = self.delta.compute_bias_change(device)

    def release(self) -> None:
        """Release the tensors that `place_on` created."""
        self._rotation_values = None
        self._low_rank_factors = []
        self._full_delta = None
        self._bias = None

    @property
    def needs_full_matrix(self) -> bool:
        """Return whether the change is added as a full matrix instead of by low-rank factors."""
        return self._full_delta is not None

    @property
    def replaces_weight(self) -> bool:
        """Return whether this LoRA replaces the weight, which also discards changes by earlier LoRAs."""
        return self.delta.replaces_weight

    @property
    def rotates_input(self) -> bool:
        """Return whether the LoRA rotates the layer's input, for all output rows and all image regions."""
        return self.rotation is not None and self.apply_region is None and self.output_rows is None

    def compute_input_change(self, x: Tensor) -> Tensor:
        """Return x R - x, the change of the input by the rotation R."""
        assert self.rotation is not None
        assert self._rotation_values is not None
        with torch.autocast(x.device.type, enabled=False):
            rotations = self.rotation.compute_rotations(self._rotation_values, self.multiplier)
            return self.rotation.input_change(x, rotations.to(x.dtype))

    def add_to(self, out: Tensor, x: Tensor, includes_weight: bool = True) -> Tensor:
        """Add the LoRA's contribution for input x to the module's output, and return it.

        Args:
            out: Output of the module; it may be changed in place.
            x: Input of the module.
            includes_weight: Whether to add the change of the weight, not only the change of the bias.
        """
        if includes_weight and self._adds_in_place(out):
            # adding the last product to `out` in place takes one pass over it instead of three
            down, *_, up = self._low_rank_factors
            hidden = self._apply_down(x, down).view(-1, len(down))
            return add_product(out, hidden, up.flatten(1).t())
        addition = self._compute_weight_addition(out, x) if includes_weight else None
        if self._bias is not None:
            bias = (self._bias * self.multiplier).to(out.dtype)
            is_convolution = not self.target.is_linear
            if is_convolution:
                bias = bias[:, None, None]  # outputs are ... C H W
            addition = bias.expand_as(out) if addition is None else addition + bias
        if addition is None:
            return out
        if self.apply_region is not None:
            addition = self.apply_region(addition)
        return out + addition

    def _adds_in_place(self, out: Tensor) -> bool:
        """Return whether the addition is a plain product that neither autograd nor a compiler traces."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return False
        if not self._low_rank_factors or self._bias is not None:
            return False
        is_plain = self.target.is_linear and self.apply_region is None
        return is_plain and out.dtype == self._low_rank_factors[-1].dtype

    def _compute_weight_addition(self, out: Tensor, x: Tensor) -> Tensor | None:
        """Return what the weight's change adds to the layer's output; None if only the bias changes."""
        if self._rotation_values is not None:
            input_change = self.compute_input_change(x)
            added = frozen_product(self.target.module, input_change).to(out.dtype)
            if self.output_rows is None:
                return added
            outputs = torch.zeros_like(added)
            outputs[..., self.output_rows] = added[..., self.output_rows]
            return outputs
        if self._low_rank_factors:
            return self._apply_low_rank(x).to(out.dtype)
        if self._full_delta is None:
            return None
        # recomputed in every pass: the full matrices of all modules would be as large as the model
        addition = self._compute_full_addition(self._full_delta, x.device)
        matrix = (addition * self.multiplier).to(out.dtype)
        shape = self.target.parameter.shape
        weight = matrix.flatten(1) if self.target.is_linear else matrix.reshape(shape)
        return self._run_operation(x.to(out.dtype), weight)

    def changes(self) -> dict[str, Tensor]:
        """Return the addition to each parameter by name in float32; for a `set_weight`, the new weight."""
        if self.rotation is not None and self._rotation_values is not None:
            rotations = self.rotation.compute_rotations(self._rotation_values, self.multiplier)
            return {self.target.parameter_name: self.rotation.weight_change(self.target.parameter, rotations)}
        changes: dict[str, Tensor] = {}
        if self._full_delta is not None and self.replaces_weight:
            changes[self.target.parameter_name] = self._full_delta.factors[SET_WEIGHT].to(torch.float32)
        elif self._full_delta is not None:
            addition = self._compute_full_addition(self._full_delta, self.target.parameter.device)
            changes[self.target.parameter_name] = addition * self.multiplier
        if self._bias is not None:
            changes["bias"] = self._bias * self.multiplier
        return changes

    def _compute_full_addition(self, delta: Delta, device: torch.device) -> Tensor:
        """Return the float32 matrix that the LoRA adds to the weight at multiplier 1."""
        addition = delta.compute_normalized_change(self.target.parameter, device, self._uses_frozen_norms)
        assert addition is not None
        return addition

    def _apply_low_rank(self, x: Tensor) -> Tensor:
        """Return what the LoRA adds to its layer's output for input x, in the dtype of the factors."""
        down, *core, up = self._low_rank_factors
        if self.target.is_linear:
            hidden = self._apply_down(x, down)  # includes the multiplier
            return functional.linear(hidden, up.flatten(1))
        x = x.to(down.dtype)
        rank = len(down)
        _, channels, *kernel_size = self.target.parameter.shape
        if core:  # Tucker decomposition: down and up are 1x1, and the core has the size of the kernel
            x = functional.conv2d(x, down.reshape(rank, channels, 1, 1))
            kernel = core[0]
        else:
            kernel = down.reshape(rank, channels, *kernel_size)
        hidden = self._mask_ranks(self._run_operation(x, kernel) * self.multiplier, axis=1)
        return functional.conv2d(hidden, up.reshape(*up.shape[:2], 1, 1))

    def _apply_down(self, x: Tensor, down: Tensor) -> Tensor:
        """Multiply x by the down factor (of a matrix or a 1x1 convolution) and by the LoRA's multiplier."""
        # Ranks that are inactive at the current noise level become 0.
        # one 2-D product even if x is strided: torch computes the trained factors this way, and both results
        # are then equal to the bit
        rows = x.to(down.dtype).reshape(-1, x.shape[-1])
        hidden = functional.linear(rows, down.flatten(1)).view(*x.shape[:-1], len(down))
        return self._mask_ranks(hidden * self.multiplier)

    def _mask_ranks(self, hidden: Tensor, axis: int = -1) -> Tensor:
        """Set inactive ranks of the down factor's output to 0."""
        return hidden if self.rank_mask is None else self.rank_mask.apply(hidden, axis)

    def mask_ranks(self, network: nn.Module, metadata: Mapping[str, str]) -> None:
        """Mask ranks by noise level if the metadata says that the LoRA was trained as a T-LoRA.

        Args:
            network: Network that contains the module.
            metadata: Metadata of the LoRA file.
        """
        rule = read_rank_rule(metadata)
        rank = get_lora_rank(self.delta.factors)
        if rule is not None and rank:
            self.rank_mask = mask_for(network, rule, rank, count_joined_parts(metadata, rank))

    def _run_operation(self, x: Tensor, weight: Tensor) -> Tensor:
        """Apply the module's operation (linear or convolution) with another weight and without bias."""
        module = self.target.module
        if not isinstance(module, nn.Conv2d):
            return functional.linear(x, weight)
        return functional.conv2d(x, weight, None, module.stride, module.padding, module.dilation)


def frozen_product(module: nn.Module, x: Tensor) -> Tensor:
    """Return x W^T for the frozen weight of a Linear, without its bias and without LoRAs around it."""
    stored = get_quantized_weight(module)
    if stored is not None:
        return stored.format.multiply(x, stored.tensors, stored.shape, None)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return functional.linear(x.to(weight.dtype), weight)


class LoraWrapper(nn.Module):
    """Runs a module, and adds the outputs of LoRAs to its output while `is_on`."""

    def __init__(self, target: ChangedParameter, branches: Sequence[LoraBranch]) -> None:
        super().__init__()
        self.branches = tuple(branches)
        self.is_on = False  # set it only while the parts are on a device
        self._target = target
        self._original_module = (target.module,)  # in a tuple, so that it is not registered as a submodule
        self._inner_forward: Callable[..., Tensor] = target.module.forward

    @property
    def module_path(self) -> str:
        """Path of the wrapped module in its network."""
        return self._target.module_path

    def attach(self) -> None:
        """Replace the module's forward method with this wrapper's. Call it before compilation."""
        self._inner_forward = self._original_module[0].forward
        self._original_module[0].forward = self.forward

    def place_on(self, device: torch.device, dtype: torch.dtype) -> None:
        """Copy the factors of all LoRAs to a device and dtype."""
        for branch in self.branches:
            branch.place_on(device, dtype)

    def switch_on(self, device: torch.device, dtype: torch.dtype) -> None:
        """Copy the factors of all LoRAs to a device, and add their outputs from now on."""
        self.place_on(device, dtype)
        self.is_on = True

    def switch_off(self) -> None:
        """Stop adding the LoRAs' outputs, and release their factors."""
        self.is_on = False
        for branch in self.branches:
            branch.release()

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Run the module, and add the output of each active LoRA within its image region."""
        active: list[LoraBranch] = []
        if self.is_on:
            active = [branch for branch in self.branches if branch.multiplier != 0]
        if not active:
            return self._inner_forward(*inputs, **named)
        if not self._target.adds_to_output:
            return self._run_with_changed_weights(active, *inputs, **named)
        if any(branch.replaces_weight for branch in active):
            # Run a layer whose weight one LoRA replaces; earlier LoRAs then add only their biases
            x = inputs[0]
            original_out = self._inner_forward(x)
            out = original_out.clone()  # `add_to` may change it in place
            for index, branch in enumerate(active):
                if not branch.replaces_weight:
                    out = branch.add_to(out, x)
                    continue
                replaced_out = self._run_with([branch], x)
                if branch.apply_region is not None:
                    out = out + branch.apply_region(replaced_out - original_out)
                else:
                    # earlier changes of the weight are replaced too, but their biases are still added
                    out = replaced_out
                    for earlier in active[:index]:
                        out = earlier.add_to(out, x, includes_weight=False)
            return out
        return self._add_outputs(active, *inputs, **named)

    def _add_outputs(self, branches: Sequence[LoraBranch], *inputs: Any, **named: Any) -> Tensor:
        """Run a layer, and add the outputs of LoRAs; a rotation changes the layer's input if possible."""
        x = inputs[0]
        rotations = [branch for branch in branches if branch.rotates_input]
        if rotations and self._is_innermost:  # other wrappers inside need the original input
            # changes of the input can be summed, so the module runs once for all rotations
            change = functools.reduce(torch.add, [branch.compute_input_change(x) for branch in rotations])
            out = self._inner_forward(x + change)
            branches = [branch for branch in branches if not branch.rotates_input]
        else:
            out = self._inner_forward(*inputs, **named)
        for branch in branches:
            out = branch.add_to(out, x)
        return out

    def _run_with_changed_weights(self, branches: Sequence[LoraBranch], *inputs: Any, **named: Any) -> Tensor:
        """Run a module that is not linear, such as a norm, with the weights changed by the branches."""
        if all(branch.apply_region is None for branch in branches):
            return self._run_with(branches, *inputs, **named)
        original_out = self._inner_forward(*inputs, **named)
        out = original_out
        for branch in branches:
            # each branch has its own region, so each needs its own difference
            added = self._run_with([branch], *inputs, **named) - original_out
            if branch.apply_region is not None:
                added = branch.apply_region(added)
            out = out + added
        return out

    @property
    def _is_innermost(self) -> bool:
        """Return whether this wraps the frozen module itself rather than another LoRA wrapper."""
        return getattr(self._inner_forward, "__self__", None) is self._original_module[0]

    def _run_with(self, branches: Sequence[LoraBranch], *inputs: Any, **named: Any) -> Tensor:
        """Run the module with the weights changed by the branches, then restore the original weights."""
        parameters = self._original_module[0]._parameters
        names = [name for name in (self._target.parameter_name, "bias") if self._target.has(name)]
        originals = {name: parameters[name] for name in names}
        changes_by_branch = [branch.changes() for branch in branches]  # all from the original weights
        try:
            for branch, changes in zip(branches, changes_by_branch, strict=True):
                for name, change in changes.items():
                    is_replacement = branch.replaces_weight and name == self._target.parameter_name
                    # A new parameter with a change added, or with the change as its value (`is_replacement`)
                    parameter = parameters[name]
                    # It is a new parameter, not new data, because the backward pass needs the changed values.
                    assert parameter is not None
                    weight = parameter.data
                    changed = change.reshape(weight.shape)
                    if not is_replacement:
                        changed = changed + weight.float()
                    parameters[name] = nn.Parameter(changed.to(weight.dtype), requires_grad=False)
            return self._inner_forward(*inputs, **named)
        finally:
            parameters.update(originals)


class AddedLoras:
    """LoRAs that wrap the modules of a model, and that can be switched on and off."""

    def __init__(self, layers: Sequence[LoraWrapper] = ()) -> None:
        self.layers = layers

    def place_on(self, device: torch.device, dtype: torch.dtype) -> None:
        """Copy the factors of all layers to a device and dtype."""
        for layer in self.layers:
            layer.place_on(device, dtype)

    @contextlib.contextmanager
    def switched_to(self, is_on: bool) -> Iterator[None]:
        """Switch the LoRAs on or off within a `with` statement; their factors stay on the device."""
        previous = [layer.is_on for layer in self.layers]
        for layer in self.layers:
            layer.is_on = is_on
        try:
            yield
        finally:
            for layer, was_on in zip(self.layers, previous, strict=True):
                layer.is_on = was_on

    @contextlib.contextmanager
    def switched_on(
        self, device: torch.device, dtype: torch.dtype, strength: float | None = None
    ) -> Iterator[None]:
        """Add the LoRAs to the model's outputs within a `with` statement.

        Args:
            device: Device of the run.
            dtype: Dtype in which the model computes.
            strength: Multiplier to set for all LoRAs, also after the `with` statement; None for no change.
        """
        try:
            for layer in self.layers:
                if strength is not None:
                    for branch in layer.branches:
                        branch.multiplier = strength
                layer.switch_on(device, dtype)
            yield
        finally:
            for layer in self.layers:
                layer.switch_off()


def add_loras(
    dit: nn.Module,
    weighted_loras: Sequence[WeightedLora],
    is_compiled: bool = False,
    option: str = "--sample_lora",
) -> AddedLoras:
    """Wrap the modules of a model with LoRAs, switched off.

    Call it after a network was attached, and before compilation.

    Args:
        dit: The transformer.
        weighted_loras: LoRA files with their strengths.
        is_compiled: Whether blocks will be compiled; changes of norms are then left out, because compiled
            code keeps their weights.
        option: Option that sets the files, for messages.

    Raises:
        CheckpointError: If a file does not fit the model or has DoRA magnitudes.
    """
    parameters = find_parameters(dit)
    lora_branches: list[dict[str, LoraBranch]] = []
    # `fit_depths` maps blocks of LoRAs for deeper or shallower models to this model's blocks
    for weighted_lora in fit_depths(weighted_loras, parameters):
        reject_magnitudes(weighted_lora.lora, option)
        deltas_by_module = fit_lora(weighted_lora.lora, parameters, option)
        if is_compiled:
            deltas_by_module = _drop_parameter_changes(weighted_lora.lora, deltas_by_module, parameters)
        branches: dict[str, LoraBranch] = {}
        for name, delta in deltas_by_module.items():
            branch = LoraBranch(parameters[name], delta, weighted_lora.multiplier)
            # a T-LoRA uses fewer ranks at high noise levels
            branch.mask_ranks(dit, weighted_lora.lora.metadata)
            branches[name] = branch
        lora_branches.append(branches)
    return AddedLoras(attach_branches(lora_branches, parameters))


def _drop_parameter_changes(
    lora: LoraFile, deltas_by_module: Mapping[str, Delta], parameters: Mapping[str, ChangedParameter]
) -> dict[str, Delta]:
    """Return the changes that compiled blocks support: additions to outputs; warn of all other changes."""
    remaining: dict[str, Delta] = {}
    left_out: list[str] = []
    for name, delta in deltas_by_module.items():
        if delta.replaces_weight or not parameters[name].adds_to_output:
            left_out.append(name)
        else:
            remaining[name] = delta
    if left_out:
        loading.warn_about_unused_parts(
            lora.path,
            left_out,
            total=len(deltas_by_module),
            statement="modules are not changed because blocks are compiled",
            consequence="compiled blocks keep their weights. Omit --compile.",
        )
    return remaining


_STAGE_LORAS = "_stage_loras"  # attribute of a network


def add_stage_loras(dit: nn.Module, is_compiled: bool = False) -> None:
    """Wrap a network with the LoRAs of its family's generation stages, switched off.

    Args:
        dit: The transformer.
        is_compiled: Whether blocks will be compiled.

    Raises:
        CheckpointError: If a file does not fit the model or has DoRA magnitudes.
    """
    loras = []
    for path, option in get_stage_files(dit):
        weighted_lora = WeightedLora(loading.read_lora(path))
        loras.append(add_loras(dit, [weighted_lora], is_compiled, option))
    dit.__dict__[_STAGE_LORAS] = loras  # not by setattr, so that it is not registered as a submodule


def get_stage_loras(dit: nn.Module) -> Sequence[AddedLoras]:
    """Return the LoRAs that `add_stage_loras` added to a network, in file order."""
    loras: Sequence[AddedLoras] = dit.__dict__[_STAGE_LORAS]
    return loras


def attach_branches(
    lora_branches: Sequence[Mapping[str, LoraBranch]], parameters: Mapping[str, ChangedParameter]
) -> list[LoraWrapper]:
    """Wrap modules of a model with the branches of several LoRAs, switched off; return the wrappers.

    Args:
        lora_branches: For each LoRA, its additions to modules (`LoraBranch`) by our module names.
        parameters: Result of `find_parameters` for the model.
    """
    branches_by_module: dict[str, list[LoraBranch]] = {}
    for branches_by_name in lora_branches:
        for name, branch in branches_by_name.items():
            branches_by_module.setdefault(name, []).append(branch)
    wrappers = [LoraWrapper(parameters[name], branches) for name, branches in branches_by_module.items()]
    for wrapper in wrappers:
        wrapper.attach()
    return wrappers


def reject_magnitudes(lora: LoraFile, option: str) -> None:
    """Raise CheckpointError if a LoRA has DoRA magnitudes, which depend on all changes of the weight."""
    deltas_by_name = read_deltas(group_by_module(lora.tensors))
    decomposed = [name for name, delta in deltas_by_name.items() if delta.normalization is not None]
    if decomposed:
        raise CheckpointError(
            f"{option} {lora.path} is a {MAGNITUDE_KIND_NAME} ({decomposed[0]}), which depends on the "
            f"weights it was made for.\n  Pass a {list_additive()}.",
            lora.path,
        )


def find_parameters(
    dit: nn.Module, to_published_name: Callable[[str], str] = str
) -> dict[str, ChangedParameter]:
    """Return the parameters that LoRAs may change, by the names that their modules have in our LoRA files.

    Such a name is a prefix and the published path with underscores: `lora_unet_blocks_0_ffn_0` for the
    module `blocks.0.ffn.0`.

    Args:
        dit: The transformer.
        to_published_name: Maps a module path of the network to the path in published files.
    """
    parameters: dict[str, ChangedParameter] = {}
    for path, module in dit.named_modules():
        for parameter_name, _ in module.named_parameters(recurse=False):
            if parameter_name == "bias":  # it belongs to the weight
                continue
            name = to_published_name(path)
            # a parameter other than a weight, such as a table or a token, is named like a module
            if parameter_name != "weight":
                name = f"{name}.{parameter_name}".lstrip(".")  # the path of the root module is empty
            parameters[OURS + name.replace(".", "_")] = ChangedParameter(
                f"{path}.{parameter_name}", module, parameter_name
            )
    return parameters


def fit_lora(lora: LoraFile, parameters: Mapping[str, ChangedParameter], option: str) -> dict[str, Delta]:
    """Return the changes that a LoRA makes to a model's modules; warn of modules that the model lacks.

    Args:
        lora: The LoRA file.
        parameters: Result of `find_parameters` for the model.
        option: Option that sets the file, for messages.

    Raises:
        CheckpointError: If the file does not fit the model.
    """
    num_rows = {name: len(parameter.unpacked) for name, parameter in parameters.items()}
    tensors = convert_fused_layers(lora.tensors, num_rows.get)
    deltas_in_file = read_deltas(group_by_module(tensors))
    absent = [name for name in deltas_in_file if name not in parameters]
    modules = [name.removeprefix(OURS) for name in parameters]
    family = select_family(modules)
    if len(absent) == len(deltas_in_file):
        _reject_misfit(lora, absent, family, option)
    fitted: dict[str, Delta] = {}
    for name, delta in deltas_in_file.items():
        if name in parameters:
            fitted[name] = _fit_delta(lora, name, delta, parameters[name], option)
    loading.warn_about_absent_modules(
        lora.path,
        absent,
        total=len(deltas_in_file),
        statement="modules are not in this model",
        model=family,
        modules=modules,
        encoder=lora.encoder,
    )
    loading.warn_about_other_family(lora, family, modules)
    return fitted


def _reject_misfit(lora: LoraFile, absent: Sequence[str], family: FamilyNames | None, option: str) -> None:
    """Raise CheckpointError for a LoRA file whose modules the model all lacks, unless it may lack them."""
    if lora.may_lack(absent):
        return
    if not lora.encoder:
        loading.reject_unknown(lora, option)
    raise _make_misfit_error(lora, absent, family, option)


def _make_misfit_error(
    lora: LoraFile, absent: Sequence[str], family: FamilyNames | None, option: str
) -> CheckpointError:
    """Return the error for a LoRA file if the model lacks all its modules."""
    lora_family = lora.family()
    advice = ""
    if lora_family is not None and lora_family is not family:
        advice = f" It is for {lora_family.name}."
    text_parts = describe_text_side(absent)
    if text_parts:
        advice = f" It changes only {text_parts}: merge it into the model's file with merge_lora.py."
    # in the file, names have the text encoder's prefix
    if lora.encoder:
        absent = [f"{lora.encoder}_{name.removeprefix(OURS)}" for name in absent]
    return CheckpointError(
        f"{option} {lora.path} does not fit this model, which has no {list_some(absent, 2)}.{advice}\n"
        "  Pass a LoRA that was trained for this model.",
        lora.path,
    )


def _fit_delta(lora: LoraFile, name: str, delta: Delta, parameter: ChangedParameter, option: str) -> Delta:
    """Return the change of a module; factors for a first layer with other input channels are dropped."""
    weight = parameter.unpacked
    is_quantized = parameter.parameter_name == "weight" and get_quantized_weight(parameter.module) is not None
    if delta.replaces_weight and is_quantized:
        raise CheckpointError(
            f"{option} {lora.path} sets the weight of {name}, which is kept in 8 or 4 bits here.\n"
            "  Omit the quantization option, or merge the file into the model.",
            lora.path,
        )
    if parameter.path.endswith(FIRST_LAYERS):
        channel_error = delta.describe_channel_mismatch(weight)
        if channel_error is not None:
            logger.warning(f"{lora.path}: {channel_error}; the rest is used without it")
            bias = delta.compute_bias_change(CPU)
            delta = read_delta({} if bias is None else {"diff_b": bias})
    # Raise CheckpointError if the shape of a module's weight or bias change does not fit the parameter
    weight = parameter.unpacked
    for change in list_changes(WeightedLora(lora), delta):
        target = weight
        target_name = name
        if change.parameter_name == "bias":
            # a Linear or Conv2d without bias gets one as an addition to its output
            if not parameter.adds_to_output and not parameter.has("bias"):
                raise CheckpointError(
                    f"{option} {lora.path} does not fit this model: {name} has no bias there.\n"
                    "  Pass a LoRA that was trained for this model.",
                    lora.path,
                )
            target = weight.new_empty(len(weight))
            target_name = f"the bias of {name}"
        change.fit(
            related=None,
            weight=target,
            name=target_name,
            model="this model",
            option=f"{option} ",
        )
    return delta
