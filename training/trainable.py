"""The trained part: a network next to the frozen DiT (a LoRA), or the DiT itself."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from checkpoints.shards import IN_ONE_FILE, SavedForm
from checkpoints.unused import OpenedTensors, UnusedTensors
from modules.errors import OptionError
from modules.seeds import derive_seed
from networks.adapter import ForeignNetwork, TrainableNetwork, tie_network
from networks.lora_format import LoraFormat
from networks.metadata import save_network
from networks.module_factors import list_sizes
from networks.names.layouts import KNOWN
from protocols.loading import TensorInfo
from training.learner import NetworkSpec

ListTensors = Callable[[], Mapping[str, Tensor]]
Write = Callable[[Path, torch.dtype | None, Mapping[str, str]], None]  # file, dtype of its tensors, metadata


class LearningRates(NamedTuple):
    """Learning rates of a network that may have layers in the DiT and in text encoders."""

    default: float
    dit: float | None = None  # None: the default
    text_encoders: Sequence[float] | None = None  # of each trained text encoder; None: the default


@dataclass
class Strength:
    """Strength of the trained networks, which can be changed for a block of code."""

    value: float = 1.0


@dataclass(frozen=True)
class WrittenFile:
    """One of the files that each save writes: the function that writes it, and the network in it."""

    write: Write
    ending: str = ""  # suffix of the architecture in the metadata, such as "lora"; "" for a whole model
    network: TrainableNetwork | None = None  # the network in the file, for its ranks and alphas


@dataclass(frozen=True)
class Trainable:
    """The trained parameters and their modules, which the training loop optimizes, saves and limits.

    Its methods switch networks to training mode, freeze parts whose training ends early, and limit weight
    norms.
    """

    modules: Mapping[str, nn.Module]  # by the name of their part in a saved state
    groups: Sequence[Mapping[str, Any]]  # for the optimizer: {"params": [...], "lr": ...}
    group_names: tuple[str, ...]  # for logs: "unet", "unet plus"
    # files of a save, by the suffix of the file's name: "", the name of an expert, or a word
    written_files: Mapping[str, WrittenFile]
    networks: Sequence[TrainableNetwork] = ()  # trained networks; empty if the DiT itself is trained
    tied_networks: Sequence[TrainableNetwork] = ()  # networks in other DiTs that share the same parameters
    max_norm: float | None = None  # value of --scale_weight_norms
    by_expert: Sequence[Sequence[Parameter]] = ()  # the parameters of each expert, if each has its own
    # for a DiT that is split over processes: parameter with this process's rows -> the split weight
    sharded_weights: Mapping[Tensor, Tensor] = field(default_factory=dict)
    strength: Strength = field(default_factory=Strength)
    # number of steps for which a part of `modules` is trained; parts without an entry are trained to the end
    freeze_at_step: Mapping[str, int] = field(default_factory=dict)
    # derived from the fields above
    parameters: list[Parameter] = field(init=False)  # in the order of the optimizer's groups
    all_networks: tuple[TrainableNetwork, ...] = field(init=False)  # tied ones included

    def __post_init__(self) -> None:
        parameters = [parameter for group in self.groups for parameter in group["params"]]
        object.__setattr__(self, "parameters", parameters)
        object.__setattr__(self, "all_networks", (*self.networks, *self.tied_networks))

    @property
    def all_modules(self) -> tuple[nn.Module, ...]:
        """Modules with trained parameters, including modules of networks that share parameters."""
        return (*self.modules.values(), *(network.module for network in self.tied_networks))

    @property
    def names(self) -> dict[Tensor, str]:
        """Return the name of each parameter as `PART.NAME_IN_MODULE`."""
        rows = {weight: part for part, weight in self.sharded_weights.items()}
        return {
            rows.get(parameter, parameter): f"{part}.{name}"
            for part, module in self.modules.items()
            for name, parameter in module.named_parameters()
        }

    def ranks_and_alphas(self, part: str | None = None) -> tuple[list[int], list[float]]:
        """Return the ranks and alphas of all networks, or of the networks in one file.

        Args:
            part: A key of `written_files`.
        """
        files = [file for name, file in self.written_files.items() if part in (None, name)]
        return list_sizes([file.network.module.state_dict() for file in files if file.network is not None])

    def start_epoch(self) -> None:
        """Put the networks into training mode, and call `on_epoch_start` of networks from other packages."""
        for network in self.all_networks:
            # `train()` visits all modules, which takes longer than a short epoch
            if not network.module.training:
                network.module.train()
            if isinstance(network, ForeignNetwork):
                network.on_epoch_start()

    def start_step(self, step: int) -> None:
        """Freeze the parts that are trained for at most `step` steps; call `on_step_start` of networks.

        Only networks from other packages have that method.

        Args:
            step: Number of optimizer steps taken so far.
        """
        for part, steps in self.freeze_at_step.items():
            if step >= steps:
                self.modules[part].requires_grad_(False)
        for network in self.all_networks:
            if isinstance(network, ForeignNetwork):
                network.on_step_start()

    def thaw(self, step: int) -> None:
        """Train the parts again that `start_step` has frozen after more steps than these."""
        for part, steps in self.freeze_at_step.items():
            if step < steps:
                self.modules[part].requires_grad_(True)

    def limit_norms(self, max_norm: float, device: torch.device) -> Tensor:
        """Scale down weights with norms above `max_norm`; return the values of a `NormReport` as a tensor."""
        numbers = [network.scale_norms(max_norm, device) for network in self.networks]
        keys_scaled, means, largest = torch.stack(numbers).unbind(1)  # networks have equal numbers of modules
        return torch.stack([keys_scaled.sum(), means.mean(), largest.max()])

    def as_base(self) -> contextlib.AbstractContextManager[None]:
        """Disable all networks during the block, so that each DiT acts as its base model."""
        return self.at_strength(0.0)

    @contextlib.contextmanager
    def at_strength(self, strength: float) -> Iterator[None]:
        """Set the strength of all networks during the block.

        Keep the block open during the backward pass too: checkpointed blocks run their forward pass again.
        """
        before = self.strength.value
        self._set_strength(strength)
        try:
            yield
        finally:
            self._set_strength(before)

    def _set_strength(self, strength: float) -> None:
        self.strength.value = strength
        for network in self.all_networks:
            network.set_multiplier(strength)


def seed_networks(trainable: Trainable, seed: int, number: int, device: torch.device) -> None:
    """Seed dropout and the global generators from the run's seed and the micro-batch number."""
    dropout_seed = derive_seed(seed, "dropout", number)
    for network in trainable.all_networks:
        network.set_dropout_seed(dropout_seed)
    # networks of other packages use the global generators; torch.manual_seed would also queue a call for
    # device types that are not in use
    global_seed = derive_seed(seed, "global", number)
    torch.default_generator.manual_seed(global_seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(global_seed)
    elif device.type == "mps":
        torch.mps.manual_seed(global_seed)


def prepare_network(
    network: TrainableNetwork,
    rates: LearningRates,
    max_norm: float | None,
    device: torch.device,
    network_spec: NetworkSpec,
    lora_format: LoraFormat | None = None,
    list_auxiliary_tensors: ListTensors = dict,
) -> Trainable:
    """Prepare an attached network, such as a LoRA, for training: on the device, in float32.

    Args:
        network: The network.
        rates: Learning rates of its layers in the DiT and in text encoders.
        max_norm: Limit on the norm of weights; None for no limit.
        device: Device of the run.
        network_spec: Description of the kind of network, with its function to write files if it has its own.
        lora_format: Format of the saved files; None keeps the network's own tensor names.
        list_auxiliary_tensors: Returns additional tensors for a LoRA's file when it is saved.

    Raises:
        OptionError: If the network has no parameters to train, or modules that the format does not support.
    """
    if lora_format is not None and lora_format.name != KNOWN:  # the known format supports all modules
        lora_format.check(network.module)
    network.module.to(device=device, dtype=torch.float32)
    groups, names = network.parameter_groups(rates.default, rates.dit, rates.text_encoders)
    if not any(group["params"] for group in groups):
        raise OptionError(
            "the network has no parameters to train: check include_patterns and exclude_patterns in "
            "--network_args"
        )
    custom = network_spec.custom
    ending = "lora" if custom is None else custom.architecture_suffix
    # saved in a state: the network, and what a resumed run needs but a file of the network lacks
    modules = {"network": network.module, **network.additional_state}
    save_lora = save_network if lora_format is None else lora_format.save

    def save(path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        if custom is not None and custom.write is not None:
            custom.write(network.module, path, dtype, metadata)
        else:
            save_lora(network.module, path, dtype, metadata, list_auxiliary_tensors())

    return Trainable(
        modules=modules,
        groups=groups,
        group_names=tuple(names),
        written_files={"": WrittenFile(save, ending, network)},
        networks=[network],
        max_norm=max_norm,
    )


def share_network(trainable: Trainable, network: TrainableNetwork, device: torch.device) -> Trainable:
    """Let `network`, created for another DiT, use the parameters of the trained network.

    Raises:
        OptionError: If the networks start with different values, because these depend on the DiT's weights.
    """
    network.module.to(device=device, dtype=torch.float32)
    tie_network(trainable.modules["network"], network.module)
    return replace(trainable, tied_networks=(*trainable.tied_networks, network))


def join_experts(trainables: Mapping[str, Trainable]) -> Trainable:
    """Combine the trained parameters of several experts, by name; each expert has its own file."""
    modules: dict[str, nn.Module] = {}
    groups: list[Mapping[str, Any]] = []
    group_names: list[str] = []
    networks: list[TrainableNetwork] = []
    for expert, trainable in trainables.items():
        modules |= {f"{name}_{expert}": module for name, module in trainable.modules.items()}
        groups += trainable.groups
        group_names += [f"{name} {expert}" for name in trainable.group_names]
        networks += trainable.networks
    return Trainable(
        modules=modules,
        groups=groups,
        group_names=tuple(group_names),
        # each expert's only file has the suffix "" so far; now the suffix is the expert's name
        written_files={expert: trainable.written_files[""] for expert, trainable in trainables.items()},
        networks=networks,
        max_norm=next(iter(trainables.values())).max_norm,
        by_expert=[trainable.parameters for trainable in trainables.values()],
    )


def prepare_dit(
    dit: nn.Module,
    learning_rate: float,
    name_parts: Sequence[str] = (),
    part_rates: Mapping[str, float] = MappingProxyType({}),
    file_layout: SavedForm = IN_ONE_FILE,
) -> Trainable:
    """Train the whole DiT, or only the parameters whose name contains one of `name_parts`; freeze the rest.

    Args:
        dit: The transformer.
        learning_rate: Learning rate of the run.
        name_parts: Substrings of the names of the trained parameters; empty for all.
        part_rates: Different learning rates, by a substring of the parameter's name; the first match counts.
        file_layout: Whether a save is one file or several. They contain all weights under the names of the
            released checkpoints.

    Raises:
        OptionError: If no name matches.
    """
    # The trained parameters by learning rate, and freeze the others; the rate 0 freezes a part
    # The arguments are those of `prepare_dit`.
    by_rate: dict[float, list[Parameter]] = {}
    for name, parameter in dit.named_parameters():
        rate = next((rate for part, rate in part_rates.items() if part in name), learning_rate)
        learns = rate > 0 and learns_by_name(name, name_parts)
        parameter.requires_grad_(learns)
        if learns:
            by_rate.setdefault(rate, []).append(parameter)
    if not by_rate and name_parts:
        reject_no_match(dit, name_parts)
    elif not by_rate:
        raise OptionError(
            "all parts have the learning rate 0, so nothing would be learned: pass a rate above 0"
        )
    groups = [{"params": parameters, "lr": rate} for rate, parameters in by_rate.items()]
    # group names for logs: the part that has this rate
    names = {rate: part.strip(".") for part, rate in part_rates.items()} | {learning_rate: "dit"}
    dtypes = written_dtypes(dit)
    unused = open_unused(dit)
    return Trainable(
        {"dit": dit},
        groups=groups,
        group_names=tuple(names[rate] for rate in by_rate),
        written_files={"": WrittenFile(partial(_write_dit, dit, dtypes, unused, file_layout))},
    )


def learns_by_name(name: str, name_parts: Sequence[str]) -> bool:
    """Return whether --trainable_modules selects a weight.

    Args:
        name: Name of the weight.
        name_parts: Substrings, one of which the name must contain; empty if all weights are trained.
    """
    return not name_parts or any(part in name for part in name_parts)


def reject_no_match(dit: nn.Module, name_parts: Sequence[str]) -> NoReturn:
    """Raise OptionError: no weight name of the DiT contains any of `name_parts`."""
    some = next(iter(dit.state_dict()))
    raise OptionError(
        f"--trainable_modules {' '.join(name_parts)}: no weight has that in its name. Use parts of names "
        f"such as {some}"
    )


def written_dtypes(dit: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtype of each weight in the DiT's original file (`DitFormat.load`), or the current dtype."""
    file_dtypes: Any = getattr(dit, "saved_dtypes", {})
    return {name: file_dtypes.get(name, tensor.dtype) for name, tensor in dit.state_dict().items()}


def saved_dtypes(dtypes: Mapping[str, torch.dtype], dtype: torch.dtype | None) -> Mapping[str, torch.dtype]:
    """Return the dtypes of tensors in a file.

    Args:
        dtypes: Dtype of each tensor, by name.
        dtype: Dtype of floating-point tensors; None leaves it unchanged.
    """
    if dtype is None:
        return dtypes
    return {name: dtype if current.is_floating_point else current for name, current in dtypes.items()}


def open_unused(dit: nn.Module) -> OpenedTensors | None:
    """Open the tensors of the DiT's file that the network does not use; None if there are none."""
    unused: UnusedTensors | None = getattr(dit, "unused_tensors", None)
    return None if unused is None else unused.opened()


def unused_infos(unused: OpenedTensors | None, dtype: torch.dtype | None) -> dict[str, TensorInfo]:
    """Return dtype and shape of each checkpoint tensor that is saved unchanged.

    Args:
        unused: Checkpoint tensors that training does not use, by name.
        dtype: Dtype of --save_precision; None keeps the dtype of each tensor.
    """
    infos = {} if unused is None else unused.infos
    dtypes = saved_dtypes({name: info.dtype for name, info in infos.items()}, dtype)
    return {name: TensorInfo(dtypes[name], info.shape) for name, info in infos.items()}


def _write_dit(
    dit: nn.Module,
    dtypes: Mapping[str, torch.dtype],
    unused: OpenedTensors | None,
    file_layout: SavedForm,
    path: Path,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str],
) -> None:
    """Write a fully trained DiT, and the tensors of its original file that the network does not use."""
    tensors = dit.state_dict()  # not copied; these may currently be the values of an average
    dtypes = saved_dtypes(dtypes, dtype)
    infos = {name: TensorInfo(dtypes[name], tuple(tensor.shape)) for name, tensor in tensors.items()}
    infos |= unused_infos(unused, dtype)

    def read(name: str) -> Tensor:
        if name in tensors:
            return tensors[name].to(infos[name].dtype)
        assert unused is not None
        return unused.read(name).to(infos[name].dtype)

    file_layout.write(path, infos, read, metadata)
