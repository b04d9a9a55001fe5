"""Build the network of any `--network_module`, ours or another package's (such as LyCORIS)."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.finite import check_finite
from checkpoints.opening import open_checkpoint
from modules.command import did_you_mean
from modules.console import format_count, quiet
from modules.devices import tensor_on
from modules.errors import CheckpointError, OptionError
from modules.installation import import_user_module
from modules.seeds import derive_seed
from networks.builtin_modules import OWN_MODULES, read_own
from networks.builtin_networks import build_from_tensors, build_network, check_blocks
from networks.cast_factors import cast_before_pass
from networks.formats.kohya import OTHER_MODULES
from networks.lora_network import OwnNetwork, rename_texts
from networks.names.layouts import PEFT_FILE
from networks.options import NetworkOptions
from protocols.family import NumberedBlocks
from runtime.run_blocks import get_spec

logger = getLogger(__name__)

# network modules of sd-scripts that are not supported, and what to use instead
_NOT_BUILT = {
    "networks.dylora": "DyLoRA, which trains all ranks simultaneously, is not supported. Use networks.lora",
    "networks.lora_fa": "LoRA-FA, whose down factors are not trained, is not built. Use networks.lora",
    **OTHER_MODULES,
}
OWN_NETWORKS = "Use --lora_per_expert to train one for each"


@dataclass(frozen=True)
class NormReport:
    """Result of `--scale_weight_norms` in a step: number of scaled modules, and norms after scaling."""

    keys_scaled: int
    mean_norm: float
    max_norm: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "NormReport":
        """Build the report from its three values in order, which `scale_norms` returns as one tensor."""
        keys_scaled, mean_norm, max_norm = numbers
        return cls(int(keys_scaled), mean_norm, max_norm)


@dataclass(frozen=True)
class ForeignNetwork:
    """Adapts another package's network, attached to its transformer, to the interface of `OwnNetwork`.

    `module` contains the parameters; its state dict has the tensors of a LoRA file.
    """

    module: Any
    dit: nn.Module

    def parameter_groups(
        self,
        learning_rate: float,
        unet_lr: float | None = None,
        text_encoder_lr: Sequence[float] | None = None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return parameter groups for the optimizer, and the name of each group for logs.

        The package's network makes the groups if it has a method for that; otherwise there is one group.
        """
        if not hasattr(self.module, "prepare_optimizer_params"):
            trainable = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
            return [{"params": trainable, "lr": learning_rate}], ["unet"]
        # packages differ in how they name learning rates, and in whether they return group names
        groups_and_names = _call_with_known_arguments(
            self.module.prepare_optimizer_params,
            text_encoder_lr=[learning_rate] if text_encoder_lr is None else list(text_encoder_lr),
            unet_lr=learning_rate if unet_lr is None else unet_lr,
            learning_rate=learning_rate,
            default_lr=learning_rate,
            lr=learning_rate,
        )
        groups = groups_and_names
        names: Sequence[str] | None = None
        if isinstance(groups_and_names, tuple):
            groups, names = groups_and_names
        groups = [{**group, "params": list(group["params"])} for group in groups]
        if not names:
            names = ["unet"] if len(groups) == 1 else [f"group {index}" for index in range(len(groups))]
        return groups, list(names)

    @property
    def additional_state(self) -> Mapping[str, nn.Module]:
        """Return modules by name whose state belongs to the training state but not to the LoRA file.

        A module of another package may return a network of ours, which may have some.
        """
        modules: Mapping[str, nn.Module] = getattr(self.module, "additional_state", {})
        return modules

    def set_dropout_seed(self, seed: int) -> None:
        """Seed torch's global generators, which the network's dropout uses."""
        getattr(self.module, "set_dropout_seed", torch.manual_seed)(seed)

    def set_multiplier(self, multiplier: float) -> None:
        """Set the strength with the network's own method, or on each submodule that has a `multiplier`."""
        if hasattr(self.module, "set_multiplier"):
            self.module.set_multiplier(multiplier)
            return
        for submodule in self.module.modules():
            if hasattr(submodule, "multiplier"):
                setattr(submodule, "multiplier", multiplier)  # noqa: B010

    def on_epoch_start(self) -> None:
        """Call the hook `on_epoch_start` of the other package's network if it has one."""
        if hasattr(self.module, "on_epoch_start"):
            _call_with_known_arguments(
                self.module.on_epoch_start, text_encoder=None, unet=self.dit, transformer=self.dit
            )

    def on_step_start(self) -> None:
        """Call the hook `on_step_start` of the other package's network if it has one."""
        if hasattr(self.module, "on_step_start"):
            self.module.on_step_start()

    def before_optimizer_step(self) -> None:
        """Call the network's hook before each optimizer step, after gradients are clipped."""
        if hasattr(self.module, "before_optimizer_step"):
            self.module.before_optimizer_step()

    def scale_norms(self, max_norm: float, device: torch.device) -> Tensor:
        """Scale down modules whose change has a norm above `max_norm` (`--scale_weight_norms`).

        Call it after an optimizer step. Returns the three numbers of a `NormReport` on `device`.
        """
        report: Sequence[Any] = self.module.apply_max_norm_regularization(max_norm, device)
        if all(isinstance(number, Tensor) for number in report):
            return torch.stack([number.to(device, torch.float32) for number in report])
        return tensor_on(device, [float(number) for number in report], torch.float32)

    def load_weights(self, path: Path) -> object:
        """Load a file's weights into the network; return what its own loading function returns.

        Raises:
            CheckpointError: If the file is damaged, has different sizes, or has no tensor of this network.
        """
        from networks.loading import read_lora  # only for --network_weights

        state = self.module.state_dict()
        with open_checkpoint(path) as checkpoint:
            for name in checkpoint.tensors:
                check_finite(path, name, checkpoint.read(name))
            shapes = {name: list(info.shape) for name, info in checkpoint.tensors.items()}
        _reject_other_sizes(path, state, shapes)
        has_alphas = any(name.endswith(".alpha") for name in shapes)
        if not has_alphas:
            _reject_other_alphas(path, state)
        if hasattr(self.module, "load_weights"):
            return self.module.load_weights(str(path))
        return self.module.load_state_dict(dict(read_lora(path).tensors), strict=False)


def _reject_other_sizes(path: Path, state: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise CheckpointError if a file's tensors differ in size from the network's, or share no name with it.

    Args:
        path: The file.
        state: State dict of the network.
        shapes: Shapes of the file's tensors.
    """
    common_names = [name for name in state if name in shapes]
    # compare element counts, not shapes, because some files store alpha as a list with one element
    different = [name for name in common_names if state[name].numel() != math.prod(shapes[name])]
    if different:
        lines = [
            f"  {name} has {shapes[name]}, the network {list(state[name].shape)}\n" for name in different[:3]
        ]
        reason = (
            f"does not fit this network in {len(different)} of {len(common_names)} tensors:\n{''.join(lines)}"
        )
    elif not common_names:
        reason = f"has none of this network's {len(state)} tensors, such as {next(iter(state), 'none')}.\n"
    else:
        return
    raise CheckpointError(
        f"--network_weights {path} {reason}"
        "  Pass the --network_module, --network_dim and --network_args that it was trained with.",
        path,
    )


def _reject_other_alphas(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if the alphas in a file's header or PEFT settings differ from the network's."""
    # Loading a state dict sets only tensors, but each layer computed its scale from alpha when it was built.
    from networks.key_formats import to_native
    from networks.loading import read_lora

    native = to_native(state).tensors
    alphas = {name: alpha for name, alpha in native.items() if name.endswith(".alpha")}
    if not alphas:
        return
    # `read_lora` adds alphas from header and settings as tensors
    for name, tensor in read_lora(path).tensors.items():
        if name not in alphas:
            continue
        file_alpha = float(tensor)
        network_alpha = float(alphas[name])
        if file_alpha != network_alpha:
            raise CheckpointError(
                f"--network_weights {path} has alpha {file_alpha:g}, according to its header or {PEFT_FILE}, "
                f"but the network has {network_alpha:g}.\n  Pass --network_alpha {file_alpha:g}.",
                path,
            )


TrainableNetwork = OwnNetwork | ForeignNetwork  # inside a DiT


def check_network(
    options: NetworkOptions, name: str, depths: Mapping[str, int], numbered: NumberedBlocks | None = None
) -> None:
    """Raise OptionError if the network module cannot be imported, or if one of our settings is invalid.

    Args:
        options: Options of the run.
        name: Value of --network_module.
        depths: Number of blocks by attribute name of the block list; lists of unknown depth are missing.
        numbered: Blocks that --network_args address by number; None if the model has none.
    """
    if name in OWN_MODULES:
        settings, _ = read_own(name, options)
        if settings.block_numbers:
            check_blocks(settings, depths)
        if settings.block_settings is not None:
            settings.block_settings.fit(numbered)  # called only to raise errors
        if OWN_MODULES[name].kind.rotates and options.scale_weight_norms is not None:
            raise OptionError(
                f"--scale_weight_norms cannot be used with --network_module {name}: a rotation has no norm "
                "to scale down, and keeps the norms of the weights. Omit it"
            )
    else:
        import_network_module(name)


def make_network(
    options: NetworkOptions,
    default_module: str,
    dit: nn.Module,
    seed: int,
    encoders: Mapping[str, nn.Module] | None = None,
    trains_dit: bool = True,
    resumed: Mapping[str, Tensor] | None = None,
) -> TrainableNetwork:
    """Build the network from the options, load `--network_weights`, and attach it to the models.

    1. Build one of our networks or another package's, with a seed of its own.
    2. Attach it to the models.
    3. Load the weights, and make the parameters trainable.

    Modules that only the file or the resumed state has are added to the network. Parameters are on the CPU;
    move `.module` to the device.

    Args:
        options: Options of the network.
        default_module: Module of the family for `--network_module networks.lora`.
        dit: The transformer.
        seed: Seed of the initial values, which are the same on every machine.
        encoders: Loaded networks of the trained text encoders, by `LearningEncoder.lora_prefix`, in the order
            of their learning rates.
        trains_dit: Whether the DiT is trained, not only text encoders.
        resumed: Tensors of the state that will be loaded into the network; None without resuming.

    Raises:
        OptionError: If the module or its settings cannot be used.
        CheckpointError: If the file cannot be used.
    """
    encoders = encoders or {}
    name = options.network_module or default_module
    package = None if name in OWN_MODULES else import_network_module(name)
    with torch.random.fork_rng(devices=[]):  # torch's initializers draw from the global generator
        torch.manual_seed(derive_seed(seed, "network"))
        network: TrainableNetwork
        if package is not None:
            module = _build_foreign(package, options, dit, encoders, trains_dit)  # already attached
            network = ForeignNetwork(module, dit)
        else:
            network = _build_own(name, options, dit, encoders, trains_dit, resumed)
    if isinstance(network, OwnNetwork):
        network.attach(trains_dit)
        dit_layers = network.dit_layers()
        if dit_layers:
            cast_before_pass(dit, dit_layers, get_spec(dit).shared_inputs)
    elif options.scale_weight_norms is not None and not hasattr(
        network.module, "apply_max_norm_regularization"
    ):
        raise OptionError(
            f"--scale_weight_norms cannot be used with --network_module {name}, which cannot scale its norms"
        )
    if options.network_weights is not None:
        _load_file(network, options.network_weights, dit)
    prepare: Any = getattr(network.module, "prepare_grad_etc", None)  # other packages' name for this step
    if prepare is not None:
        _call_with_known_arguments(prepare, text_encoder=None, unet=dit, transformer=dit)
    else:
        network.module.requires_grad_(True)
    return network


def _build_own(
    name: str,
    options: NetworkOptions,
    dit: nn.Module,
    encoders: Mapping[str, nn.Module],
    trains_dit: bool,
    resumed: Mapping[str, Tensor] | None,
) -> OwnNetwork:
    """Build one of our networks from its options, including modules that only a file or resumed state has."""
    if options.dim_from_weights:
        tensors = _read_network_weights(options, dit, encoders)
        return build_from_tensors(name, tensors, options, dit=dit, encoders=encoders)
    initial_tensors = dict(resumed or {})
    if not initial_tensors and options.network_weights is not None:
        initial_tensors = _read_network_weights(options, dit, encoders)
    return build_network(
        name,
        options,
        dit=dit if trains_dit else None,
        encoders=encoders,
        initial_tensors=initial_tensors,
    )


def _load_file(network: TrainableNetwork, path: Path, dit: nn.Module) -> None:
    """Load `--network_weights` into a network, and log how many modules could not be loaded."""
    errors: list[str] = []
    if isinstance(network, OwnNetwork):
        errors = network.load_weights(path, dict(dit.named_parameters()))
    else:
        network.load_weights(path)
    result = f"except for {format_count(len(errors), 'module')}, see above" if errors else "everything fits"
    logger.info(f"{path}: loaded, {result}")


def _read_network_weights(
    options: NetworkOptions, dit: nn.Module, encoders: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """Return the tensors of `--network_weights` under our names, mapped to the transformer's blocks."""
    from networks.depth_variants import fit_depths  # only for --network_weights
    from networks.loading import WeightedLora, read_lora

    assert options.network_weights is not None
    lora = read_lora(options.network_weights, with_texts=bool(encoders), with_embeddings=True)
    # blocks of a LoRA for a deeper or shallower model are mapped to the DiT's blocks
    weighted_lora = WeightedLora(lora)
    with quiet():  # `load_weights` makes the same call and logs its messages
        (weighted_lora,) = fit_depths([weighted_lora], dict(dit.named_parameters()))
    return {**weighted_lora.lora.tensors, **rename_texts(weighted_lora.lora.text_tensors, encoders)}


def tie_network(network: nn.Module, twin: nn.Module) -> None:
    """Make `twin` share the parameters and buffers of `network`; both are on the same device.

    They must have been built with equal options, for DiTs of the same shape.

    Args:
        network: The network whose parameters are kept.
        twin: The network whose parameters are replaced.

    Raises:
        OptionError: If their values differ because they depend on the DiTs' weights, as DoRA magnitudes do.
    """
    state = network.state_dict(keep_vars=True)
    twin_state = twin.state_dict(keep_vars=True)
    is_equal = state.keys() == twin_state.keys()
    if not is_equal or not all(torch.equal(state[name], twin_state[name]) for name in state):
        raise OptionError(
            "the initial values of the network depend on the weights of the transformer (as in a DoRA), "
            f"so two transformers cannot share it. {OWN_NETWORKS}"
        )
    for name, tensor in state.items():
        path, _, parameter_name = name.rpartition(".")
        module = twin.get_submodule(path)
        if parameter_name in module._parameters:
            module.register_parameter(parameter_name, network.get_parameter(name))
        else:
            module._buffers[parameter_name] = tensor


def import_network_module(name: str) -> ModuleType:
    """Import another package's module that defines `create_network` or `create_arch_network`.

    The working directory is searched too.

    Raises:
        OptionError: If it cannot be imported or defines neither function.
    """
    if name in _NOT_BUILT:
        raise OptionError(f"--network_module {name}: {_NOT_BUILT[name]}")
    ours = ", ".join(OWN_MODULES)
    module = import_user_module(
        "--network_module",
        name,
        "networks.lora_wan",
        f"{did_you_mean(name, OWN_MODULES)} Or use one of {ours}.",
    )
    if not hasattr(module, "create_arch_network") and not hasattr(module, "create_network"):
        raise OptionError(
            f"--network_module {name} offers neither create_arch_network nor create_network, so it builds no "
            f"network. Use another module, such as one of {ours}"
        )
    return module


def _build_foreign(
    package: ModuleType,
    options: NetworkOptions,
    dit: nn.Module,
    encoders: Mapping[str, nn.Module],
    trains_dit: bool,
) -> Any:
    """Build another package's network as other LoRA trainers do, and attach it to the models."""
    text_encoders = list(encoders.values()) or None
    if options.dim_from_weights:
        module = _create_from_file(package, options, dit, encoders)
    else:
        module = _create_from_settings(package, options, dit if trains_dit else None, text_encoders)
    models = [dit, *encoders.values()]
    parameters_by_model = [dict(model.named_parameters()) for model in models]
    module.apply_to(text_encoders, dit, apply_text_encoder=bool(encoders), apply_unet=trains_dit)
    # LyCORIS' `algo=full` deletes the layers' frozen weights and computes with its own. They are restored,
    # because the model reads dtypes from its layers
    for model, parameters in zip(models, parameters_by_model, strict=True):
        for name, parameter in parameters.items():
            path, _, parameter_name = name.rpartition(".")
            layer = model.get_submodule(path)
            if layer._parameters.get(parameter_name) is None:
                layer.register_parameter(parameter_name, parameter)
    return module


def _create_from_settings(
    package: ModuleType,
    options: NetworkOptions,
    dit: nn.Module | None,
    text_encoders: list[nn.Module] | None,
) -> Any:
    """Build another package's network from its settings."""
    rank = options.rank
    dropouts: dict[str, float | None] = {}
    # packages have one of two functions, and only the first one takes a dropout
    if hasattr(package, "create_arch_network"):
        create = package.create_arch_network
        dropouts = {"neuron_dropout": options.network_dropout}
    else:
        create = package.create_network
        if options.network_dropout is not None:
            logger.warning(
                f"--network_dropout is ignored because {package.__name__} takes its own settings; try "
                "--network_args dropout=..."
            )
    multiplier = 1.0
    vae = None
    arguments = options.arguments()
    # by position, because packages name these arguments differently
    return create(multiplier, rank, options.network_alpha, vae, text_encoders, dit, **dropouts, **arguments)


def _create_from_file(
    package: ModuleType, options: NetworkOptions, dit: nn.Module, encoders: Mapping[str, nn.Module]
) -> Any:
    """Build another package's network with the modules and ranks of `--network_weights`."""
    text_encoders = list(encoders.values()) or None
    # packages have one of these two functions
    create = getattr(package, "create_arch_network_from_weights", None)
    create = create or getattr(package, "create_network_from_weights", None)
    if create is None:
        raise OptionError(
            f"--dim_from_weights cannot be used with --network_module {package.__name__}, which does not "
            "support it"
        )
    created = _call_with_known_arguments(
        create,
        multiplier=1.0,
        weights_sd=_read_network_weights(options, dit, encoders),
        unet=dit,
        vae=None,
        file=str(options.network_weights),
        text_encoder=text_encoders,
        text_encoders=text_encoders,
        neuron_dropout=options.network_dropout,
        **options.arguments(),
    )
    # some packages return the file's tensors too
    return created[0] if isinstance(created, tuple) else created


def _call_with_known_arguments(function: Callable[..., Any], **values: Any) -> Any:
    """Call a function of another package with only those values for which it has parameters."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return function(**values)
    return function(
        **{parameter.name: values[parameter.name] for parameter in parameters if parameter.name in values}
    )
