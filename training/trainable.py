"""What is trained: a network beside the frozen DiT (a LoRA), or the DiT itself."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from modules.checkpoints.writing import stream_tensors
from modules.contract.loading import TensorInfo
from modules.errors import OptionError
from networks.adapter import TrainableNetwork, tie_network

AsBase = Callable[[], AbstractContextManager[object]]
Write = Callable[[Path, torch.dtype | None, Mapping[str, str]], None]  # file, dtype of its tensors, metadata


@dataclass(frozen=True)
class Trainable:
    """Hold the parameters for the optimizer, and what the loop does with their modules."""

    modules: Mapping[str, nn.Module]  # by the name of their part in a saved state
    groups: Sequence[Mapping[str, Any]]  # for the optimizer: {"params": [...], "lr": ...}
    group_names: tuple[str, ...]  # "unet", "unet plus": for logs
    # what a save writes, by the last part of the file's name: "", or the name of an expert
    writes: Mapping[str, Write]
    set_dropout_seed: Callable[[int], None]  # before each micro-batch
    start_epoch: Callable[[], None]
    start_step: Callable[[], None]
    # after each optimizer step; the numbers of a `NormReport`
    limit_norms: Callable[[], Tensor] | None = None
    tied: Sequence[nn.Module] = ()  # further modules that compute with the same parameters
    by_expert: Sequence[Sequence[Parameter]] = ()  # the parameters of each expert, if each has its own
    before_step: Callable[[], None] = lambda: None  # once gradients are clipped
    # inside it the DiTs are as they were loaded; None: what is trained is the DiT itself
    as_base: AsBase | None = None

    @property
    def all_modules(self) -> tuple[nn.Module, ...]:
        """Return every module whose mode follows that of the training."""
        return (*self.modules.values(), *self.tied)

    def reached(self, experts: Collection[int]) -> list[Parameter]:
        """Return the parameters that micro-batches of these experts give gradients."""
        if not self.by_expert:
            return self.parameters
        return [parameter for index in sorted(experts) for parameter in self.by_expert[index]]

    @property
    def parameters(self) -> list[Parameter]:
        """Return all trained parameters, in the optimizer's order."""
        return [parameter for group in self.groups for parameter in group["params"]]

    @property
    def names(self) -> dict[Tensor, str]:
        """Return the name of each parameter: part, dot, name in the module."""
        return {
            parameter: f"{part}.{name}"
            for part, module in self.modules.items()
            for name, parameter in module.named_parameters()
        }


@dataclass(frozen=True)
class Rates:
    """Learning rates of a network's parts."""

    learning_rate: float
    unet: float | None = None  # of the DiT's part; None: learning_rate
    texts: Sequence[float] | None = None  # of each text encoder that learns; None: learning_rate


def train_network(
    network: TrainableNetwork, rates: Rates, max_norm: float | None, device: torch.device
) -> Trainable:
    """Move a network that is already in its DiT to the device, in float32, and return it as a `Trainable`.

    Raises OptionError if it has no parameters to train.
    """
    network.module.to(device=device, dtype=torch.float32)
    groups, names = network.parameter_groups(rates.learning_rate, rates.unet, rates.texts)
    if not any(group["params"] for group in groups):
        raise OptionError(
            "the network has no parameters to train: check include_patterns and exclude_patterns in "
            "--network_args"
        )
    return Trainable(
        modules={"network": network.module, **network.state_beside_file},
        groups=groups,
        group_names=tuple(names),
        writes={"": network.save},
        set_dropout_seed=network.set_dropout_seed,
        start_epoch=network.on_epoch_start,
        start_step=network.on_step_start,
        limit_norms=None if max_norm is None else lambda: network.scale_norms(max_norm, device),
        as_base=partial(_without, [network]),
        before_step=network.before_optimizer_step,
    )


def share_network(trainable: Trainable, network: TrainableNetwork, device: torch.device) -> Trainable:
    """Train one network in a further DiT: `network`, made for it, computes with the trained parameters.

    Raises OptionError if the networks begin with different values: then they depend on the DiT's weights.
    """
    network.module.to(device=device, dtype=torch.float32)
    tie_network(trainable.modules["network"], network.module)
    return replace(
        trainable,
        set_dropout_seed=_both(trainable.set_dropout_seed, network.set_dropout_seed),
        start_epoch=_both(trainable.start_epoch, network.on_epoch_start),
        start_step=_both(trainable.start_step, network.on_step_start),
        tied=(*trainable.tied, network.module),
        as_base=_inside_both(trainable.as_base, partial(_without, [network])),
        before_step=_both(trainable.before_step, network.before_optimizer_step),
    )


def train_apart(parts: Mapping[str, Trainable]) -> Trainable:
    """Join what is trained for each expert, by the names of the experts. Each writes a file of its own."""
    limits = [part.limit_norms for part in parts.values() if part.limit_norms is not None]
    return Trainable(
        modules={
            f"{own}_{name}": module for name, part in parts.items() for own, module in part.modules.items()
        },
        groups=[group for part in parts.values() for group in part.groups],
        group_names=tuple(f"{own} {name}" for name, part in parts.items() for own in part.group_names),
        writes={name: part.writes[""] for name, part in parts.items()},
        set_dropout_seed=_both(*(part.set_dropout_seed for part in parts.values())),
        start_epoch=_both(*(part.start_epoch for part in parts.values())),
        start_step=_both(*(part.start_step for part in parts.values())),
        limit_norms=(lambda: _join_norms([limit() for limit in limits])) if limits else None,
        by_expert=[part.parameters for part in parts.values()],
        as_base=_inside_both(*(part.as_base for part in parts.values())),
        before_step=_both(*(part.before_step for part in parts.values())),
    )


def _join_norms(numbers: Sequence[Tensor]) -> Tensor:
    """Return the numbers of a `NormReport` for networks of as many modules each."""
    keys_scaled, means, largest = torch.stack([*numbers]).unbind(1)
    return torch.stack([keys_scaled.sum(), means.mean(), largest.max()])


@contextlib.contextmanager
def _without(networks: Sequence[TrainableNetwork]) -> Iterator[None]:
    """Switch networks off inside the block."""
    for network in networks:
        network.set_multiplier(0.0)
    try:
        yield
    finally:
        for network in networks:
            network.set_multiplier(1.0)


def _inside_both(*parts: AsBase | None) -> AsBase | None:
    """Return what enters all of these; None if one cannot be switched off."""

    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for part in parts:
                assert part is not None
                stack.enter_context(part())
            yield

    return None if None in parts else enter


def _both(*calls: Callable[..., None]) -> Callable[..., None]:
    """Return a function that makes all these calls."""

    def call(*values: object) -> None:
        for each in calls:
            each(*values)

    return call


def train_dit(dit: nn.Module, learning_rate: float, name_parts: Sequence[str] = ()) -> Trainable:
    """Train the whole DiT, or only the parameters whose name contains one of `name_parts`; freeze the rest.

    Its files hold all weights under the names of the released checkpoints, written tensor by tensor.
    Raises OptionError if no name matches.
    """
    learning = []
    for name, parameter in dit.named_parameters():
        learns = not name_parts or any(part in name for part in name_parts)
        parameter.requires_grad_(learns)
        if learns:
            learning.append(parameter)
    if not learning:
        some = next(iter(dit.state_dict()))
        raise OptionError(
            f"--trainable_modules {' '.join(name_parts)}: no weight has that in its name. Use parts of names "
            f"such as {some}"
        )

    dtypes = {name: tensor.dtype for name, tensor in dit.state_dict().items()}

    def write(path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        tensors = dit.state_dict()  # no copies; an average in their place is in float32

        def kept(name: str) -> torch.dtype:
            return dtypes[name] if dtype is None or not dtypes[name].is_floating_point else dtype

        infos = {name: TensorInfo(kept(name), tuple(tensor.shape)) for name, tensor in tensors.items()}
        stream_tensors(path, infos, lambda name: tensors[name].to(kept(name)), metadata)

    return Trainable(
        modules={"dit": dit},
        groups=[{"params": learning, "lr": learning_rate}],
        group_names=("dit",),
        writes={"": write},
        set_dropout_seed=_nothing,
        start_epoch=_nothing,
        start_step=_nothing,
    )


def _nothing(*_: object) -> None:
    """Do nothing: a DiT needs no call at this point."""
