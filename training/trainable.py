"""What is trained: a network beside the frozen DiT (a LoRA), or the DiT itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from modules.checkpoints.writing import stream_tensors
from modules.contract.loading import TensorInfo
from modules.errors import OptionError
from networks.adapter import TrainableNetwork

Write = Callable[[Path, torch.dtype | None, Mapping[str, str]], None]  # file, dtype of its tensors, metadata


@dataclass(frozen=True)
class Trainable:
    """Hold the parameters for the optimizer, and what the loop does with their modules."""

    modules: Mapping[str, nn.Module]  # by the name of their part in a saved state
    groups: Sequence[Mapping[str, Any]]  # for the optimizer: {"params": [...], "lr": ...}
    group_names: tuple[str, ...]  # "unet", "unet plus": for logs
    write: Write
    set_dropout_seed: Callable[[int], None]  # before each micro-batch
    start_epoch: Callable[[], None]
    start_step: Callable[[], None]
    # after each optimizer step; the numbers of a `NormReport`
    limit_norms: Callable[[], Tensor] | None = None

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


def train_network(
    network: TrainableNetwork, learning_rate: float, max_norm: float | None, device: torch.device
) -> Trainable:
    """Move a network that is already in its DiT to the device, in float32, and return it as a `Trainable`.

    Raises OptionError if it has no parameters to train.
    """
    network.module.to(device=device, dtype=torch.float32)
    groups, names = network.parameter_groups(learning_rate)
    if not any(group["params"] for group in groups):
        raise OptionError(
            "the network has no parameters to train: check include_patterns and exclude_patterns in "
            "--network_args"
        )
    return Trainable(
        modules={"network": network.module},
        groups=groups,
        group_names=tuple(names),
        write=network.save,
        set_dropout_seed=network.set_dropout_seed,
        start_epoch=network.on_epoch_start,
        start_step=network.on_step_start,
        limit_norms=None if max_norm is None else lambda: network.scale_norms(max_norm, device),
    )


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
        write=write,
        set_dropout_seed=_nothing,
        start_epoch=_nothing,
        start_step=_nothing,
    )


def _nothing(*_: object) -> None:
    """Do nothing: a DiT needs no call at this point."""
