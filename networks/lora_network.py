"""The trained network: layers of one kind (LoRA, LoHa, ...) in a DiT and in text encoders."""

from collections.abc import Collection, Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from modules.console import format_count, list_some
from modules.errors import CheckpointError
from networks.delta import read_deltas
from networks.fused_loras import convert_fused_layers
from networks.kinds.contract import named
from networks.kinds.factors import DOWN, UP, Factors
from networks.lora_layer import DropoutSeed
from networks.lora_products import mean_row_norm, row_strengths
from networks.lora_settings import LoraSettings, find_by_pattern, log_overlaps
from networks.module_factors import add_missing_alphas, get_lora_rank, group_by_module, ungroup, without_alpha
from networks.module_names import describe_text_module, read_family, select_family
from networks.names.layouts import OURS
from networks.rank_masks import read_rank_rule

if TYPE_CHECKING:  # only for --network_weights
    from networks.loading import LoraFile
logger = getLogger(__name__)
UNET = OURS.removesuffix("_")


class _LayerRate(NamedTuple):
    """Learning rate of a layer, and its parameter group."""

    rate: float
    label: str  # name of the parameter group; layers with the same label share a group
    plus_ratio: float | None  # LoRA+: learning rate of the up factor / learning rate of the down factor


class OwnNetwork(nn.Module):
    """The trained layers by our module names. The state dict contains the tensors of a LoRA file."""

    def __init__(self, layers: Mapping[str, Any], settings: LoraSettings) -> None:
        """Collect the layers of the network; `attach` attaches them to the models.

        Args:
            layers: Layers by name. Each has `attach`, `norm`, `shrink`, its `kind`, `rank`, `size_word` and
                `multiplier`.
            settings: Settings of the network.
        """
        super().__init__()
        self.settings = settings
        self.names = list(layers)
        self.layers: list[Any] = list(layers.values())
        self._seed = DropoutSeed()
        for index, (name, layer) in enumerate(layers.items()):
            self.add_module(name, layer)
            # random numbers of a layer are derived from the common seed and its index
            if hasattr(layer, "dropouts"):
                layer.dropouts = settings.dropouts
                layer.seed = self._seed
                layer.index = index
        # LoRA-GGPO: layer name -> mean row norm of the frozen weight
        self._base_norms: dict[str, Tensor] = {}
        # modules whose state is saved with the training state, not in the LoRA file
        self.additional_state: dict[str, nn.Module] = {}
        if settings.ggpo_sigma_and_beta is not None:
            # Give each Linear's layer a buffer with the strength of LoRA-GGPO's noise for each row
            linear = {name: layer for name, layer in layers.items() if isinstance(layer.original, nn.Linear)}
            strengths = nn.Module()  # buffers, which are saved with the state of a training run
            for index, (name, layer) in enumerate(linear.items()):
                strengths.register_buffer(name, torch.zeros(layer.original.out_features))
                self._base_norms[name] = mean_row_norm(layer.original, index)
                layer.ggpo_noise_buffer = (strengths, name)  # 0 until the first step
            self.additional_state = {"ggpo": strengths}
        ranks = sorted({layer.rank for layer in self.layers})
        rank_list = list_some([str(rank) for rank in ranks])
        first = self.layers[0]
        logger.info(
            f"{first.kind} on {format_count(len(self.layers), 'module')}, {first.size_word} {rank_list}"
        )

    def attach(self, in_dit: bool = True) -> None:
        """Attach the layers to the models they were built for.

        Args:
            in_dit: Whether to attach the transformer's layers too.
        """
        for name, layer in zip(self.names, self.layers, strict=True):
            if in_dit or get_prefix(name) != UNET:
                layer.attach()

    def dit_layers(self) -> list[Any]:
        """Return only the layers in the transformer, not those in text encoders."""
        return [
            layer for name, layer in zip(self.names, self.layers, strict=True) if get_prefix(name) == UNET
        ]

    @property
    def module(self) -> nn.Module:
        """The network as a module, which is the object itself; `ForeignNetwork` wraps a separate module."""
        return self

    def set_multiplier(self, multiplier: float) -> None:
        """Set the strength of all layers."""
        for layer in self.layers:
            layer.multiplier = multiplier

    def load_weights(self, path: Path, modules: Collection[str] = ()) -> list[str]:
        """Load initial values, including alphas, from a LoRA file with any program's names.

        Modules that only the file or only the network has are logged.

        Args:
            path: Path of the file.
            modules: Names of the model's modules, which show its release.

        Returns:
            One clause for each module that only the file or only the network has; these are logged too.

        Raises:
            CheckpointError: If a module's factors or sizes differ in this network, or if the network has none
                of the modules.
        """
        from networks import loading  # only for --network_weights

        network_modules = group_by_module(self.state_dict())
        lora = self._read_initial_lora(path, network_modules, modules)
        # the few modules of a network may occur in several families: the file's metadata decides
        lora_family = read_family(lora.metadata)
        names = (name.removeprefix(OURS) for name in network_modules)
        family = select_family(names, None if lora_family is None else lora_family.name)
        loading.warn_about_other_family(lora, family, modules)
        file_modules = _factors_for_network(lora, network_modules)
        num_loaded = self._load_common_modules(lora, file_modules, network_modules)

        absent = [name for name in file_modules if name not in network_modules]
        # Warn of a LoRA file's modules for which this model cannot have a LoRA, and return them
        from networks import loading, unused_tensors  # only for --network_weights

        unusable = [name for name in file_modules if describe_text_module(name.removeprefix(OURS))]
        unusable += unused_tensors.list_lacking(absent, modules, family)
        statement = "modules are not in this network"
        loading.warn_about_absent_modules(
            path, unusable, total=len(file_modules), statement=statement, model=family
        )
        errors = [f"{name} is not in this network" for name in absent if name not in unusable]
        errors += [f"{name} is not in the file" for name in network_modules if name not in file_modules]
        if errors:
            logger.warning(
                f"{path}: {format_count(num_loaded, 'module')} loaded, {len(errors)} not: {list_some(errors)}"
            )
        return errors

    def _load_common_modules(
        self, lora: "LoraFile", file_modules: Mapping[str, Factors], network_modules: Mapping[str, Factors]
    ) -> int:
        """Load the factors of those modules that both the file and the network have; return their number."""
        from networks import loading  # only for --network_weights

        _reject_other_sizes(lora.path, file_modules, network_modules)
        common = {name: factors for name, factors in file_modules.items() if name in network_modules}
        if not common:
            loading.reject_unknown(lora, "--network_weights")
            raise _make_misfit_error(lora, file_modules)
        state = self.state_dict()
        # some tools store alpha as a list with one element
        shaped = {name: tensor.reshape(state[name].shape) for name, tensor in ungroup(common).items()}
        self.load_state_dict(shaped, strict=False)
        return len(common)

    def _read_initial_lora(
        self, path: Path, network_modules: Mapping[str, Factors], modules: Collection[str]
    ) -> "LoraFile":
        """Read the file of --network_weights, with its blocks mapped to the model's blocks."""
        from networks import loading  # only for --network_weights
        from networks.depth_variants import fit_depths

        trains_text_encoders = any(get_prefix(name) != UNET for name in network_modules)
        weighted_lora = loading.WeightedLora(
            loading.read_lora(path, with_texts=trains_text_encoders, with_embeddings=True)
        )
        (weighted_lora,) = fit_depths([weighted_lora], modules)
        lora = weighted_lora.lora
        # training uses magnitudes that refer to different norms
        if lora.has_frozen_norms:
            raise CheckpointError(
                f"--network_weights {path} is a DoRA in ComfyUI's form, which depends on the model's "
                "weights.\n  Convert it back first: convert_lora.py --target default --dit MODEL.",
                path,
            )
        file_rule = read_rank_rule(lora.metadata)
        if file_rule is not None and file_rule != self.settings.rank_rule:
            logger.warning(
                f"--network_weights {path} is {named(file_rule.kind)}, and continues with different ranks at "
                f"each level: pass the --network_args that it was trained with, {file_rule.in_words()}"
            )
        return lora

    @torch.no_grad()
    def scale_norms(self, max_norm: float, device: torch.device) -> Tensor:
        """Scale down each layer whose change has a norm above `max_norm`; call after an optimizer step.

        Returns:
            The three numbers of a `NormReport` as a tensor on the device, without synchronizing.
        """
        norms = torch.stack([layer.norm() for layer in self.layers])
        # the inner clamp only avoids a division by 0: ratios above 1 become 1
        ratios = (max_norm / norms.clamp(min=max_norm / 2)).clamp(max=1)
        for layer, ratio in zip(self.layers, ratios, strict=True):
            layer.shrink(ratio)
        scaled_norms = norms * ratios
        report = ((ratios < 1).sum(), scaled_norms.mean(), scaled_norms.max())
        return torch.stack([number.to(device, torch.float32) for number in report])

    def set_dropout_seed(self, seed: int) -> None:
        """Seed all dropout masks until the next call; call it before each micro-batch."""
        self._seed.value = seed
        if self.settings.dropouts:
            tables = self._seed.tables(self.layers, next(self.parameters()).device)
            for layer, table in zip(self.layers, tables.unbind(), strict=True):
                layer.seed_table = table

    def parameter_groups(
        self,
        learning_rate: float,
        unet_lr: float | None = None,
        text_encoder_lr: Sequence[float] | None = None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return parameter groups for the optimizer, and the name of each group for logs.

        1. Select the rate of each network: the DiT and the trained text encoders.
        2. For each layer, prefer the rate of the last matching pattern in network_reg_lrs, and multiply by
           the factor of the layer's block.
        3. Group the parameters by rate. With LoRA+, up factors have their own groups. Layers with a rate of 0
           are left out.

        Args:
            learning_rate: Default learning rate.
            unet_lr: Rate of the DiT's modules; None for `learning_rate`.
            text_encoder_lr: Rates of the trained text encoders in order; the last rate applies to all other
                encoders. None for `learning_rate`.
        """
        rates = {UNET: learning_rate if unet_lr is None else unet_lr}  # of each network, by prefix
        encoders = [prefix for prefix in dict.fromkeys(map(get_prefix, self.names)) if prefix != UNET]
        if encoders:
            text_rates = [learning_rate] if text_encoder_lr is None else text_encoder_lr
            rates |= _get_encoder_rates(encoders, text_rates)
        # for each layer, the indices of the patterns in network_reg_lrs that match its name
        matches: list[tuple[int, ...]] = [()] * len(self.names)
        if self.settings.pattern_learning_rates:
            # The indices of the patterns in network_reg_lrs that match the name of each layer
            matches = [find_by_pattern(self.settings.pattern_learning_rates, name) for name in self.names]
            log_overlaps("network_reg_lrs", self.settings.pattern_learning_rates, matches)
        groups: dict[str, dict[str, Any]] = {}  # by label
        for name, layer, matching_patterns in zip(self.names, self.layers, matches, strict=True):
            prefix = get_prefix(name)
            selected = self._select_rate(layer, prefix, rates[prefix], matching_patterns)
            if selected.rate == 0 and any(rates.values()):
                continue  # frozen. If all rates are 0, groups are kept, because an optimizer needs a group
            for parameter in layer.parameters():
                label = selected.label
                rate = selected.rate
                if selected.plus_ratio is not None and parameter is layer.lora_up.weight:
                    label = f"{label} plus"
                    rate = rate * selected.plus_ratio
                groups.setdefault(label, {"params": [], "lr": rate})["params"].append(parameter)
        labels = [*groups]
        if any(label.endswith(" plus") for label in labels):  # each LoRA+ group follows its modules' group
            labels = _sort_labels(labels)
        return [groups[label] for label in labels], labels

    def _select_rate(
        self, layer: Any, prefix: str, network_rate: float, matching_patterns: Sequence[int]
    ) -> "_LayerRate":
        """Select the learning rate of a layer; see `parameter_groups`."""
        rate = network_rate
        label = prefix
        plus_ratio = self.settings.loraplus_encoder_ratio
        if prefix == UNET:
            label = "unet"
            plus_ratio = self.settings.loraplus_lr_ratio
        if matching_patterns:
            pattern, rate = self.settings.pattern_learning_rates[matching_patterns[-1]]
            label = f"{label} {pattern.pattern}"
        factor = getattr(layer, "rate_factor", 1.0)  # from --network_args with rates by block
        if factor != 1:
            label = f"{label} x {factor:g}"
            rate = rate * factor
        return _LayerRate(rate, label, plus_ratio)

    @torch.no_grad()
    def before_optimizer_step(self) -> None:
        """Update LoRA-GGPO's noise from weights and gradients; call it after clipping, before the step."""
        sigma_and_beta = self.settings.ggpo_sigma_and_beta
        for name, base_norm in self._base_norms.items():
            assert sigma_and_beta is not None
            layer = getattr(self, name)
            down = layer.lora_down.weight
            up = layer.lora_up.weight
            # the layer has not run since the last step
            if down.grad is None or up.grad is None:
                continue
            strengths = row_strengths(
                factors=(down, up),
                gradients=(down.grad, up.grad),
                scale=layer.scale,
                base_norm=base_norm.to(down.device),
                sigma_and_beta=sigma_and_beta,
            )
            getattr(self.additional_state["ggpo"], name).copy_(strengths)


def _get_encoder_rates(prefixes: Sequence[str], rates: Sequence[float]) -> dict[str, float]:
    """Return the learning rate of each text encoder; the last rate applies to all encoders after it."""
    last = len(rates) - 1
    return {prefix: rates[min(index, last)] for index, prefix in enumerate(prefixes)}


def _sort_labels(labels: Collection[str]) -> list[str]:
    """Sort parameter group labels so that each LoRA+ group follows the group of the same modules."""
    indices = {label: index for index, label in enumerate(labels)}

    def key(label: str) -> tuple[int, bool]:
        label_without_plus = label.removesuffix(" plus")
        return indices.get(label_without_plus, indices[label]), label.endswith(" plus")

    return sorted(labels, key=key)


def _factors_for_network(
    lora: "LoraFile", network_modules: Mapping[str, Factors]
) -> dict[str, dict[str, Tensor]]:
    """Convert a LoRA file's tensors to the network's modules; return {module name: factors}."""
    num_rows = {name: len(factors[UP]) for name, factors in network_modules.items() if UP in factors}
    # an OFT rotation applies to all rows, so any number of rows will do
    for name, delta in read_deltas(network_modules).items():
        if delta.rotation is not None:
            num_rows[name] = 1
    text_tensors = rename_texts(lora.text_tensors, {get_prefix(name) for name in network_modules})
    # split or join them to match the network's modules
    tensors = convert_fused_layers({**lora.tensors, **text_tensors}, num_rows.get)
    return group_by_module(add_missing_alphas(tensors))


def _make_misfit_error(lora: "LoraFile", file_modules: Mapping[str, Factors]) -> CheckpointError:
    """Return the error for a LoRA file if the network has none of its modules."""
    from networks import unused_tensors  # only for --network_weights

    text_parts = unused_tensors.describe_text_side(file_modules)
    reason = f"it changes only {text_parts}" if text_parts else f"there is no {next(iter(file_modules))}"
    return CheckpointError(
        f"--network_weights {lora.path} does not fit this network: {reason}. Pass a file for this model, "
        "or another --network_module.",
        lora.path,
    )


def _reject_other_sizes(
    path: Path, file_modules: Mapping[str, Factors], network_modules: Mapping[str, Factors]
) -> None:
    """Raise CheckpointError if factor names or shapes of modules differ between file and network."""
    misfits = []
    for name, factors in file_modules.items():
        if name in network_modules and _list_shapes(factors) != _list_shapes(network_modules[name]):
            misfits.append(name)
    if not misfits:
        return
    lines = ""
    # the first modules are enough for a message
    for name in misfits[:3]:
        in_file = _describe_shapes(file_modules[name])
        lines += f"  {name} has {in_file}, but the network {_describe_shapes(network_modules[name])}\n"
    advice = _advise(file_modules, network_modules[misfits[0]], misfits[0])
    raise CheckpointError(
        f"--network_weights {path} does not fit this network in {len(misfits)} of {len(file_modules)} "
        f"modules:\n{lines}  {advice}",
        path,
    )


def _advise(file_modules: Mapping[str, Factors], factors: Factors, name: str) -> str:
    """Return advice for the error that a file's module does not fit the network."""
    if DOWN not in factors:  # the network is not a LoRA
        return "Pass its --network_module, --network_dim and --network_args, or --dim_from_weights."
    # the file is not a plain LoRA
    if file_modules[name].keys() != factors.keys():
        return (
            "This network trains plain LoRAs. Merge the file into the model instead (--base_weights), or "
            "continue with the --network_module that made it, such as lycoris.kohya."
        )
    if _read_outer_sizes(file_modules[name]) != _read_outer_sizes(factors):
        return "Pass a LoRA that was trained for a model of this size."
    # the sizes of the layers fit, so only the ranks differ
    ranks = {get_lora_rank(factors) for factors in file_modules.values()}
    single_rank = f"--network_dim {ranks.pop()}, or " if len(ranks) == 1 else ""
    return f"Pass {single_rank}--dim_from_weights."


def _read_outer_sizes(factors: Factors) -> tuple[torch.Size, int]:
    """Return the input size (with the kernel) and the output size of the layer that the factors change."""
    return factors[DOWN].shape[1:], len(factors[UP])


def get_prefix(name: str) -> str:
    """Return the prefix of a module name, which shows its network: `lora_unet`, `lora_te1`."""
    return "_".join(name.split("_", 2)[:2])


def rename_texts(texts: Mapping[str, Tensor], prefixes: Collection[str]) -> dict[str, Tensor]:
    """Return text encoder tensors with the prefixes that a model uses.

    Some models call their only or first encoder `lora_te`, others `lora_te1`. In models with two CLIPs,
    `lora_te` is not renamed, because it can only come from a different model.

    Args:
        texts: Tensors of text encoders.
        prefixes: Prefixes of the model's text encoders.
    """
    first_names = {"lora_te": "lora_te1", "lora_te1": "lora_te"}
    if "lora_te2" in prefixes:
        first_names = {"lora_te1": "lora_te"}
    new_prefixes = {old: new for old, new in first_names.items() if new in prefixes and old not in prefixes}
    renamed: dict[str, Tensor] = {}
    for name, tensor in texts.items():
        prefix = get_prefix(name)
        renamed[new_prefixes.get(prefix, prefix) + name.removeprefix(prefix)] = tensor
    return renamed


def _list_shapes(factors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return the shape of each factor except alpha."""
    return {part: list(tensor.shape) for part, tensor in without_alpha(factors).items()}


def _describe_shapes(factors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{part} {shape}" for part, shape in _list_shapes(factors).items())
