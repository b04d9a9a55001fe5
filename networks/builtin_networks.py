"""Build the networks of our own values of --network_module, such as networks.lora_wan."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from logging import getLogger
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from checkpoints.opening import open_checkpoint
from modules.console import list_some
from modules.errors import CheckpointError, OptionError
from networks.builtin_modules import OWN_MODULES, WITH_FILE, read_own
from networks.fused_loras import convert_fused_layers
from networks.kinds.contract import LoraModule, NetworkKind, RankRule, Target
from networks.kinds.factors import Factors
from networks.lora_layer import LoraLayer
from networks.lora_network import OwnNetwork
from networks.lora_settings import LoraSettings, find_by_pattern, fit_patterns, log_overlaps
from networks.module_factors import add_missing_alphas, group_by_module
from networks.names.layouts import OURS, LoraRules
from networks.names.texts import published_path
from networks.options import NetworkOptions
from networks.rank_masks import mask_for
from networks.train.lora import find_training
from runtime.run_blocks import get_spec

logger = getLogger(__name__)


class ModuleWithPath(NamedTuple):
    """A module, and its path in the network that contains it."""

    path: str
    module: LoraModule


def select_modules(unet: nn.Module, settings: LoraSettings) -> dict[str, Target]:
    """Return the modules of a DiT that get a LoRA, by our names.

    Raises:
        OptionError: If no module is left, or if a block index exceeds the number of blocks.
    """
    spec = get_spec(unet)
    rules = settings.family_rules
    if rules is not None and settings.block_numbers:
        check_blocks(settings, _count_blocks(unet, rules))
    optional_parts: tuple[str, ...] = ()  # parts of paths of modules that get no layer by default
    if not spec.lora_include:  # otherwise the model lists the modules that get a layer
        optional_parts = tuple(
            part for part in spec.lora_exclude if part not in settings.enabled_optional_modules
        )
    if settings.block_settings is not None:
        settings = replace(settings, block_settings=settings.block_settings.fit(spec.block_numbering))
    targets = _select_targets(_list_candidates(unet, settings), settings, OURS, optional_parts)
    if not targets:
        raise OptionError(
            "--network_args: the LoRA has no module left. Exclude fewer (exclude_patterns, ranks of 0, "
            "block numbers), or add some with include_patterns"
        )
    return targets


def _count_blocks(unet: nn.Module, rules: LoraRules) -> dict[str, int]:
    """Return the number of blocks in those block lists of the family's arguments that this model has."""
    children = dict(unet.named_children())
    list_names = rules.block_lists_by_argument.values()
    return {name: len(list(children[name].children())) for name in list_names if name in children}


def _list_candidates(unet: nn.Module, settings: LoraSettings) -> Iterator[ModuleWithPath]:
    """Yield the modules of a DiT that may get a LoRA, before patterns and ranks in --network_args apply."""
    spec = get_spec(unet)
    # path prefixes of the blocks; the layers are in the order of these groups
    trained_lists = [name for name in spec.block_lists if name not in spec.frozen_lists]
    prefix_groups = [tuple(f"{name}." for name in (*trained_lists, *spec.lora_lists))]
    if settings.family_rules is not None:
        # The path prefixes of the blocks that train_blocks selects, then modules outside the blocks
        rules = settings.family_rules
        if settings.train_blocks is not None:
            prefix_groups = [rules.train_blocks_choices[settings.train_blocks]]
        # not strict: `outside_ranks` is () if no ranks are given for modules outside the blocks
        for path, rank in zip(rules.outside_paths, settings.outside_ranks, strict=False):
            if rank:
                prefix_groups = [*prefix_groups, (path,)]
    patterns = [re.compile(pattern) for pattern in spec.lora_include]
    excluded = () if settings.has_convolutions else spec.conv_lora_modules
    for prefixes in prefix_groups:
        for candidate in _list_modules_below(unet, prefixes):
            is_excluded = any(part in f".{candidate.path}" for part in excluded)
            is_included = not patterns or any(pattern.match(candidate.path) for pattern in patterns)
            if is_included and not is_excluded:
                yield candidate


def _select_targets(
    candidates: Iterable[ModuleWithPath],
    settings: LoraSettings,
    prefix: str,
    optional_parts: tuple[str, ...] = (),
) -> dict[str, Target]:
    """Select the modules that get a LoRA, with rank and alpha; return them by our names."""
    targets: dict[str, Target] = {}
    matches: list[tuple[int, ...]] = []
    for path, module in candidates:
        name = prefix + path.replace(".", "_")
        matching_patterns: tuple[int, ...] = ()
        if settings.pattern_ranks:
            # indices of the patterns that match; the last one sets the rank
            matching_patterns = find_by_pattern(settings.pattern_ranks, name)
            matches.append(matching_patterns)
        target = _select_target(
            path, module, settings, matching_patterns=matching_patterns, optional_parts=optional_parts
        )
        blocks = settings.block_settings
        if settings.verbose:
            description = "left out" if target is None else f"rank {target.rank}, alpha {target.alpha:g}"
            logger.info(f"  {path}: {description}")
        if target is not None:
            targets[name] = target._replace(
                split_sizes=settings.split_sizes_of(path, module) if settings.splits_fused_layers else (),
                rate_factor=1.0 if blocks is None else blocks.get_rate_factor(path),
            )
    if settings.pattern_ranks:
        log_overlaps("network_reg_dims", settings.pattern_ranks, matches)
    return targets


def _select_target(
    path: str,
    module: LoraModule,
    settings: LoraSettings,
    matching_patterns: tuple[int, ...],
    optional_parts: tuple[str, ...],
) -> Target | None:
    """Return a module with the rank and alpha of its LoRA; None if the module gets no LoRA."""
    is_optional = any(part in f".{path}" for part in optional_parts)
    # a rank for its type selects an optional module
    if is_optional and settings.family_rules is not None:
        is_optional = _find_type_rank(path, settings.family_rules, settings) is None
    may_be_excluded = is_optional or bool(settings.exclude)
    if may_be_excluded and _is_excluded(path, settings, is_optional):
        return None
    if settings.block_settings is not None and settings.block_settings.is_left_out(path):
        return None
    if matching_patterns:
        _, rank = settings.pattern_ranks[matching_patterns[-1]]
        target: Target | None = Target(module, int(rank), settings.alpha)
    else:
        target = _target_by_block_and_type(path, module, settings)
    return None if target is None or target.rank <= 0 else target


def _is_excluded(path: str, settings: LoraSettings, is_optional: bool = False) -> bool:
    """Return whether a module is optional or excluded by a pattern, and matches no include pattern."""
    is_excluded = is_optional or any(pattern.match(path) for pattern in settings.exclude)
    return is_excluded and not any(pattern.match(path) for pattern in settings.include)


def _list_modules_below(unet: nn.Module, starts: tuple[str, ...]) -> Iterator[ModuleWithPath]:
    """Yield each Linear and Conv2d whose path starts with one of the prefixes, in model order."""
    for path, module in unet.named_modules():
        if f"{path}.".startswith(starts) and isinstance(module, (nn.Linear, nn.Conv2d)):
            yield ModuleWithPath(path, module)


def check_blocks(settings: LoraSettings, depths: Mapping[str, int]) -> None:
    """Raise OptionError if --network_args list block indices that the model does not have.

    Args:
        settings: Settings of the network.
        depths: Number of blocks by attribute name of the block list; lists of unknown depth are missing.
    """
    rules = settings.family_rules
    if rules is None:
        return
    for argument, numbers in settings.block_numbers.items():
        depth = depths.get(rules.block_lists_by_argument[argument])
        # unknown depth, all blocks (None) or no blocks
        if depth is None or not numbers:
            continue
        beyond = sorted(number for number in numbers if number >= depth)
        if beyond:
            raise OptionError(
                f"--network_args {argument}: there is no block {beyond[0]}; the model has {depth} such "
                f"blocks, 0 to {depth - 1}"
            )


def _target_by_block_and_type(path: str, module: LoraModule, settings: LoraSettings) -> Target | None:
    """Return a module with rank and alpha by its block and type; None if it gets no LoRA."""
    # A rank for the block takes precedence over conv_dim, and both take precedence over the family's rules.
    # 1x1 convolutions are treated like linear layers
    is_convolution = not isinstance(module, nn.Linear) and module.kernel_size != (1, 1)
    if settings.block_settings is not None:
        block_size = settings.block_settings.get_rank_and_alpha(path, is_convolution)
        if block_size is not None:
            rank, alpha = block_size
            default_alpha = settings.conv_alpha if is_convolution else settings.alpha
            return Target(module, rank, default_alpha if alpha is None else alpha)
    if is_convolution:
        return None if settings.conv_rank is None else Target(module, settings.conv_rank, settings.conv_alpha)
    rank_by_rules: int | None = settings.rank
    if settings.family_rules is not None:
        rank_by_rules = _find_rank_by_rules(path, settings.family_rules, settings)
    return None if rank_by_rules is None else Target(module, rank_by_rules, settings.alpha)


def _find_rank_by_rules(path: str, rules: LoraRules, settings: LoraSettings) -> int | None:
    """Return a layer's rank by the family's rules; None if its block is not trained."""
    for outside_path, rank in zip(rules.outside_paths, settings.outside_ranks, strict=False):
        if path == outside_path or path.startswith(f"{outside_path}."):
            return rank
    for argument, numbers in settings.block_numbers.items():
        match = re.match(rf"{rules.block_lists_by_argument[argument]}\.(\d+)\.", path)
        if match is not None and numbers is not None and int(match[1]) not in numbers:
            return None
    type_rank = _find_type_rank(path, rules, settings)
    return settings.rank if type_rank is None else type_rank


def _find_type_rank(path: str, rules: LoraRules, settings: LoraSettings) -> int | None:
    """Return the rank that --network_args set for a module's type (words in its path); None if unset."""
    for argument, types in rules.rank_arguments:
        matches_type = any(all(word in path for word in fragments) for fragments in types)
        if argument in settings.type_ranks and matches_type:
            return settings.type_ranks[argument]
    return None


def build_network(
    name: str,
    options: NetworkOptions,
    dit: nn.Module | None,
    encoders: Mapping[str, nn.Module],
    initial_tensors: Mapping[str, Tensor] | None = None,
) -> OwnNetwork:
    """Build one of our networks on the modules that the settings select.

    Args:
        name: Value of --network_module, a key of OWN_MODULES.
        options: Options of the network.
        dit: The transformer; None if only text encoders are trained.
        encoders: Trained text encoders, by their `lora_prefix`.
        initial_tensors: Tensors of the file or state from which training continues, under our names. Their
            modules get layers too, with the rank and alpha of the tensors, unless --network_args exclude
            them.

    Raises:
        OptionError: If settings are invalid, or if they select no module.
    """
    settings, kind_settings = read_own(name, options)
    kind = OWN_MODULES[name].kind
    trained_encoders = {
        prefix: encoder for prefix, encoder in encoders.items() if prefix not in settings.disabled_encoders
    }
    if settings.include or settings.exclude or settings.pattern_ranks or settings.pattern_learning_rates:
        settings = _fit_typed_patterns(settings, dit, trained_encoders)
    if kind.rotates:  # some network kinds have no layers for text encoders
        trained_encoders = {}
    targets: dict[str, Target] = {}
    if dit is not None:
        targets = select_modules(dit, settings)
    # ranks by type and block numbers apply to the DiT only
    text_settings = replace(settings, family_rules=None, splits_fused_layers=False, block_settings=None)
    for prefix, encoder in trained_encoders.items():
        targets |= _select_targets(_list_encoder_modules(encoder), text_settings, f"{prefix}_")
    layers = find_training(kind).make_layers(targets, settings, kind_settings)
    if initial_tensors:
        modules_by_name = _modules_by_name(dit, trained_encoders)
        layers = _add_layers_from_tensors(layers, kind, settings, initial_tensors, modules_by_name)
    # a target's `rate_factor` multiplies the learning rate of its layer
    for layer_name, target in targets.items():
        if layer_name in layers:
            layers[layer_name].rate_factor = target.rate_factor  # type: ignore[assignment]
    if settings.rank_rule is not None:
        _mask_ranks(layers, settings.rank_rule, dit)
    return OwnNetwork(layers, settings)


def _fit_typed_patterns(
    settings: LoraSettings, dit: nn.Module | None, encoders: Mapping[str, nn.Module]
) -> LoraSettings:
    """Fit patterns that were typed with other separators to the names of all modules that may get a layer."""
    modules = [] if dit is None else [(OURS, path) for path, _ in _list_candidates(dit, settings)]
    for prefix, encoder in encoders.items():
        modules += [(f"{prefix}_", path) for path, _ in _list_encoder_modules(encoder)]
    return fit_patterns(settings, modules)


def _mask_ranks(layers: Mapping[str, nn.Module], rule: RankRule, dit: nn.Module | None) -> None:
    """Add T-LoRA's rank masks to a transformer's LoRAs; text encoders have no noise level and get none."""
    if dit is None:
        raise OptionError(
            f"--network_args {rule.kind.switch}=True: the active ranks depend on the noise level, but only "
            "text encoders are trained, which have none. Omit it"
        )
    for name, layer in layers.items():
        if name.startswith(OURS) and isinstance(layer, LoraLayer):
            layer.rank_mask = mask_for(dit, rule, layer.rank)


def _add_layers_from_tensors(
    layers: dict[str, nn.Module],
    kind: NetworkKind,
    settings: LoraSettings,
    tensors: Mapping[str, Tensor],
    modules_by_name: Mapping[str, ModuleWithPath],
) -> dict[str, nn.Module]:
    """Return the layers plus layers for other modules with factors in a file or state, in model order."""
    added: dict[str, nn.Module] = {}
    for name, factors in _factors_for(modules_by_name, tensors).items():
        has_kind_factors = any(factor_name in factors for factor_name in kind.marks)
        if name not in modules_by_name or name in layers or not has_kind_factors:
            continue
        target = modules_by_name[name]
        if not _is_excluded_by_arguments(target, name, settings):
            added[name] = find_training(kind).make_layer(target.module, name, factors, settings)
    if not added:
        return layers
    logger.info(
        f"{len(added)} modules that are not selected by default are added to the network, because the "
        f"initial weights contain them: {list_some([*added], 3)}"
    )
    all_layers = {**layers, **added}
    return {name: all_layers[name] for name in modules_by_name if name in all_layers}


def _is_excluded_by_arguments(module_with_path: ModuleWithPath, name: str, settings: LoraSettings) -> bool:
    """Return whether --network_args exclude a module for which a file has a LoRA."""
    if not name.startswith(OURS):
        settings = replace(settings, family_rules=None)  # a text encoder: the rules are for the transformer
    rules = settings.family_rules
    if rules is not None and settings.train_blocks is not None:
        trained_prefixes = rules.train_blocks_choices[settings.train_blocks]
        if not module_with_path.path.startswith(trained_prefixes):
            return True
    if _is_excluded(module_with_path.path, settings):
        return True
    matching_patterns = find_by_pattern(settings.pattern_ranks, name)
    if matching_patterns:
        _, pattern_rank = settings.pattern_ranks[matching_patterns[-1]]  # the last match wins
        return pattern_rank == 0
    # convolutions get no LoRA by default, but a file's LoRAs for them are kept, so give them any rank
    with_convolutions = replace(settings, conv_rank=settings.conv_rank or 1)
    target = _target_by_block_and_type(module_with_path.path, module_with_path.module, with_convolutions)
    return target is None or target.rank == 0


def _modules_by_name(dit: nn.Module | None, encoders: Mapping[str, nn.Module]) -> dict[str, ModuleWithPath]:
    """Return all Linear and Conv2d modules by our names, with their published paths."""
    networks = {} if dit is None else {OURS: dit}
    networks |= {f"{prefix}_": encoder for prefix, encoder in encoders.items()}
    modules_by_name: dict[str, ModuleWithPath] = {}
    for prefix, network in networks.items():
        for path, module in network.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                if prefix != OURS:
                    path = published_path(path)
                modules_by_name[prefix + path.replace(".", "_")] = ModuleWithPath(path, module)
    return modules_by_name


def _factors_for(
    modules_by_name: Mapping[str, ModuleWithPath], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Convert tensors of any layout to the model's modules; return {module name: {factor name: tensor}}."""
    num_rows = {name: len(target.module.weight) for name, target in modules_by_name.items()}
    return group_by_module(add_missing_alphas(convert_fused_layers(tensors, num_rows.get)))


def _list_encoder_modules(encoder: nn.Module) -> Iterator[ModuleWithPath]:
    """Yield the modules of a text encoder's blocks with their paths in published checkpoints."""
    prefixes = tuple(f"{name}." for name in get_spec(encoder).block_lists)
    for path, module in _list_modules_below(encoder, prefixes):
        yield ModuleWithPath(published_path(path), module)


def build_from_tensors(
    name: str,
    tensors: Mapping[str, Tensor],
    options: NetworkOptions,
    dit: nn.Module,
    encoders: Mapping[str, nn.Module],
) -> OwnNetwork:
    """Build one of our networks with the modules, ranks and alphas of a file's tensors, not their values.

    1. Make a layer for each module in the file that the model has too; log the others.
    2. Fit typed patterns to the names of these layers.
    3. Mask ranks by noise level if the settings have a rule for it (T-LoRA).

    Args:
        name: Value of --network_module, a key of OWN_MODULES.
        tensors: Tensors under our names.
        options: Options of the network; only --network_dropout and --network_args are used.
        dit: The transformer.
        encoders: Trained text encoders, by their `lora_prefix`.

    Raises:
        CheckpointError: If the model has none of the modules, or if the file contains a different network
            kind.
    """
    settings = _settings_with_file(name, options)
    modules_by_name = _modules_by_name(dit, encoders)
    factors_by_module = _factors_for(modules_by_name, tensors)
    layers = _make_file_layers(OWN_MODULES[name].kind, factors_by_module, modules_by_name, settings)
    absent = [module_name for module_name in factors_by_module if module_name not in layers]
    if not layers:
        raise CheckpointError(
            "--dim_from_weights: the model has none of the file's modules, such as "
            f"{list_some(absent, 3)}.\n  Pass a file that was trained for this model."
        )
    # patterns may be typed with dots or underscores
    prefixes_and_paths: list[tuple[str, str]] = []
    for layer_name in layers:
        path = modules_by_name[layer_name].path
        prefix = layer_name.removesuffix(path.replace(".", "_"))
        prefixes_and_paths.append((prefix, path))
    settings = fit_patterns(settings, prefixes_and_paths)
    if absent:
        logger.warning(
            f"--dim_from_weights: {len(absent)} modules of the file are not in this model: "
            f"{list_some(absent)}"
        )
    if settings.rank_rule is not None:
        _mask_ranks(layers, settings.rank_rule, dit)
    return OwnNetwork(layers, settings)


def _make_file_layers(
    kind: NetworkKind,
    factors_by_module: Mapping[str, Factors],
    modules_by_name: Mapping[str, ModuleWithPath],
    settings: LoraSettings,
) -> dict[str, nn.Module]:
    """Return a trainable layer for each module in a file that the model has, with the same factor shapes."""
    layers: dict[str, nn.Module] = {}
    for name, factors in factors_by_module.items():
        has_kind_factors = any(factor_name in factors for factor_name in kind.marks)
        if not has_kind_factors:
            raise CheckpointError(
                f"--dim_from_weights: {name} has {', '.join(factors)}, which are for another kind of "
                "network.\n  Pass the --network_module that the file was trained with."
            )
        module = modules_by_name[name].module if name in modules_by_name else None
        if module is not None and (not kind.rotates or isinstance(module, nn.Linear)):
            layers[name] = find_training(kind).make_layer(module, name, factors, settings)
    return layers


def _settings_with_file(name: str, options: NetworkOptions) -> LoraSettings:
    """Return the settings that apply if a file sets modules and ranks; warn of settings that are ignored."""
    rules = OWN_MODULES[name].rules
    # the training run has read these already, to select the text encoders; the network does not need them
    read_by_run: Mapping[str, str] = {} if rules is None else rules.encoder_switches
    used: list[str] = []
    ignored: dict[str, str] = {}
    for key, value in options.arguments().items():
        if key in WITH_FILE:
            used.append(f"{key}={value}")
        elif key not in read_by_run:
            ignored[key] = f"{key}={value}"
    # without rank and alpha, which the file has
    defaults = NetworkOptions.from_defaults(network_module=options.network_module)
    read_own(name, replace(defaults, network_args=tuple(ignored.values())))  # raises for an invalid value
    for key in sorted(ignored):
        logger.warning(
            f"--network_args {key} is ignored because --dim_from_weights takes the modules and ranks from "
            "the file"
        )
    settings, _ = read_own(
        name, replace(defaults, network_dropout=options.network_dropout, network_args=tuple(used))
    )
    return settings


def smallest_lora_bytes(model: Path, rank: int) -> int:
    """Return a lower bound for the size of a LoRA in bytes, computed from the model file's header.

    It counts one byte per value for all matrices of the blocks. A real LoRA has two or four bytes per value,
    but not for all matrices.
    """
    with open_checkpoint(model) as checkpoint:
        shapes = [info.shape for name, info in checkpoint.tensors.items() if "blocks." in name]
    return sum(rank * sum(shape) for shape in shapes if len(shape) == 2 and min(shape) > rank)
