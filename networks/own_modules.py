"""Build the networks that `--network_module networks.lora_wan` and the like name."""

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
from networks.deltas import add_missing_alphas, group_by_module
from networks.kinds.contract import LoraModule, RankRule, Target
from networks.lora_layer import LoraLayer
from networks.lora_network import OwnNetwork
from networks.lora_settings import LoraSettings, find_by_pattern, fit_patterns, log_overlaps
from networks.names.layouts import OURS, LoraRules
from networks.names.texts import published_path
from networks.own_kinds import OWN_MODULES, WITH_FILE, NetworkArguments, read_own
from networks.rank_masks import mask_for
from runtime.run_blocks import spec_of

logger = getLogger(__name__)


class PlacedModule(NamedTuple):
    """A module of a network, and its path in the network."""

    path: str
    module: LoraModule


class LoraSize(NamedTuple):
    """Rank and alpha of the LoRA of a module."""

    rank: int
    alpha: float


def select_modules(unet: nn.Module, settings: LoraSettings) -> dict[str, Target]:
    """Return the modules of a DiT to train: our module name -> target.

    Raises:
        OptionError: If no module is left, or if a block number exceeds the DiT's blocks.
    """
    spec = spec_of(unet)
    rules = settings.rules
    if rules is not None and settings.block_numbers:
        children = dict(unet.named_children())
        lists = [name for name in rules.indices.values() if name in children]
        check_blocks(settings, {name: len(list(children[name].children())) for name in lists})
    optional: tuple[str, ...] = ()
    if not spec.lora_choice:  # a model with a positive list of modules has no optional ones
        optional = tuple(part for part in spec.lora_exclude if part not in settings.switched_on)
    if settings.blocks is not None:
        settings = replace(settings, blocks=settings.blocks.fit(spec.numbered))
    targets = _choose(_list_candidates(unet, settings), settings, OURS, optional)
    if not targets:
        raise OptionError(
            "--network_args: the LoRA has no module left. Exclude fewer (exclude_patterns, ranks of 0, "
            "numbers of blocks), or add some with include_patterns"
        )
    return targets


def _list_candidates(unet: nn.Module, settings: LoraSettings) -> Iterator[PlacedModule]:
    """Yield the modules of a DiT from which patterns and ranks then select."""
    spec = spec_of(unet)
    rules = settings.rules
    starts = [tuple(f"{name}." for name in (*spec.block_lists, *spec.lora_lists))]
    if rules is not None:
        if settings.train_blocks is not None:
            starts = [rules.choices[settings.train_blocks]]
        outside = zip(rules.outside_paths, settings.outside_ranks, strict=False)
        starts += [(path,) for path, rank in outside if rank]
    patterns = [re.compile(pattern) for pattern in spec.lora_choice]
    without = () if settings.has_convolutions else spec.with_convolutions
    for start in starts:
        for candidate in _list_modules_below(unet, start):
            if any(part in f".{candidate.path}" for part in without):
                continue
            if not patterns or any(pattern.match(candidate.path) for pattern in patterns):
                yield candidate


def _choose(
    candidates: Iterable[PlacedModule],
    settings: LoraSettings,
    prefix: str,
    optional: tuple[str, ...] = (),
) -> dict[str, Target]:
    """Select the modules to train: our module name -> target, with rank and alpha.

    Args:
        candidates: Modules with their paths.
        settings: Settings of the network.
        prefix: Prefix of our names.
        optional: Parts of paths that are left out unless a pattern or a rank for their type selects them.
    """
    targets: dict[str, Target] = {}
    matches: list[tuple[int, ...]] = []
    for path, module in candidates:
        name = prefix + path.replace(".", "_")
        matching: tuple[int, ...] = ()
        if settings.reg_ranks:
            matching = find_by_pattern(settings.reg_ranks, name)
            matches.append(matching)
        size = _select_size(path, module, settings, matching, optional)
        if settings.verbose:
            state = "left out" if size is None else f"rank {size.rank}, alpha {size.alpha:g}"
            logger.info(f"  {path}: {state}")
        if size is not None:
            targets[name] = Target(
                module=module,
                rank=size.rank,
                alpha=size.alpha,
                split_sizes=settings.split_sizes_of(path, module) if settings.splits else (),
                rate_factor=1.0 if settings.blocks is None else settings.blocks.factor_of(path),
            )
    if settings.reg_ranks:
        log_overlaps("network_reg_dims", settings.reg_ranks, matches)
    return targets


def _select_size(
    path: str,
    module: LoraModule,
    settings: LoraSettings,
    matching: tuple[int, ...],
    optional: tuple[str, ...],
) -> LoraSize | None:
    """Return the rank and alpha of a module; None if it gets no LoRA.

    The last matching pattern in `settings.reg_ranks` gives the rank, else the type of the module does.
    Include and exclude patterns are applied afterwards.

    Args:
        path: Path of the module.
        module: The module.
        settings: Settings of the network.
        matching: Indices of the patterns in `settings.reg_ranks` that match the module.
        optional: Parts of paths that are left out unless a pattern or a rank for their type selects them.
    """
    if matching:
        _, rank = settings.reg_ranks[matching[-1]]
        size: LoraSize | None = LoraSize(int(rank), settings.alpha)
    else:
        size = _size(path, module, settings)
    is_optional = any(part in f".{path}" for part in optional)
    if is_optional and settings.rules is not None:  # a rank for its type selects an optional module
        is_optional = _select_rank_of_kind(path, settings.rules, settings) is None
    may_be_excluded = is_optional or settings.exclude
    if may_be_excluded and _is_excluded(path, settings, is_optional):
        return None
    if settings.blocks is not None and settings.blocks.is_left_out(path):
        return None
    return None if size is None or size.rank <= 0 else size


def _is_excluded(path: str, settings: LoraSettings, is_optional: bool = False) -> bool:
    """Return whether the exclude patterns match a module and no include pattern brings it back.

    Args:
        path: Path of the module.
        settings: Settings of the network.
        is_optional: Whether the module is excluded unless an include pattern matches.
    """
    is_excluded = is_optional or any(pattern.match(path) for pattern in settings.exclude)
    return is_excluded and not any(pattern.match(path) for pattern in settings.include)


def _list_modules_below(unet: nn.Module, starts: tuple[str, ...]) -> Iterator[PlacedModule]:
    """Yield each Linear and Conv2d whose path has one of these prefixes, in the model's order."""
    for path, module in unet.named_modules():
        if f"{path}.".startswith(starts) and isinstance(module, (nn.Linear, nn.Conv2d)):
            yield PlacedModule(path, module)


def check_blocks(settings: LoraSettings, depths: Mapping[str, int]) -> None:
    """Raise OptionError if a block number exceeds the blocks of a model.

    Args:
        settings: Settings of the network.
        depths: Attribute of the block list -> number of blocks; lists of unknown depth are missing.
    """
    rules = settings.rules
    if rules is None:
        return
    for argument, numbers in settings.block_numbers.items():
        depth = depths.get(rules.indices[argument])
        if depth is None or not numbers:
            continue
        beyond = sorted(number for number in numbers if number >= depth)
        if beyond:
            raise OptionError(
                f"--network_args {argument}: there is no block {beyond[0]}; the model has {depth} such "
                f"blocks, 0 to {depth - 1}"
            )


def _size(path: str, module: LoraModule, settings: LoraSettings) -> LoraSize | None:
    """Return rank and alpha, or None if the module gets no LoRA."""
    is_convolution = not isinstance(module, nn.Linear) and module.kernel_size != (1, 1)
    if settings.blocks is not None:
        of_block = settings.blocks.size_of(path, is_convolution)
        if of_block is not None:
            rank, alpha = of_block
            default_alpha = settings.conv_alpha if is_convolution else settings.alpha
            return LoraSize(rank, default_alpha if alpha is None else alpha)
    if is_convolution:
        return None if settings.conv_rank is None else LoraSize(settings.conv_rank, settings.conv_alpha)
    if settings.rules is None:
        return LoraSize(settings.rank, settings.alpha)
    return _size_by_rules(path, settings.rules, settings)


def _size_by_rules(path: str, rules: LoraRules, settings: LoraSettings) -> LoraSize | None:
    """Return rank and alpha of a layer by the family's rules, or None if its block gets no LoRA."""
    for start, rank in zip(rules.outside_paths, settings.outside_ranks, strict=False):
        if path == start or path.startswith(f"{start}."):
            return LoraSize(rank, settings.alpha)
    for argument, numbers in settings.block_numbers.items():
        match = re.match(rf"{rules.indices[argument]}\.(\d+)\.", path)
        if match is not None and numbers is not None and int(match[1]) not in numbers:
            return None
    rank_of_kind = _select_rank_of_kind(path, rules, settings)
    return LoraSize(settings.rank if rank_of_kind is None else rank_of_kind, settings.alpha)


def _select_rank_of_kind(path: str, rules: LoraRules, settings: LoraSettings) -> int | None:
    """Return the rank from the first --network_args entry for this type of module; None without one."""
    for argument, kinds in rules.types:
        is_of_kind = any(all(word in path for word in words) for words in kinds)
        if argument in settings.type_ranks and is_of_kind:
            return settings.type_ranks[argument]
    return None


def build_network(
    name: str,
    typed: NetworkArguments,
    dit: nn.Module | None,
    encoders: Mapping[str, nn.Module],
    begun: Mapping[str, Tensor] | None = None,
) -> OwnNetwork:
    """Build one of our networks on the modules that the settings select.

    Args:
        name: Name of the module, one of OWN_MODULES.
        typed: Unparsed settings from the command line.
        dit: The transformer; None if only text encoders are trained.
        encoders: Trained text encoders, by their `lora_prefix`.
        begun: Initial tensors, under our names. Their modules are added to the network, with the rank and
            alpha of the tensors, unless `typed.arguments` exclude them.

    Raises:
        OptionError: If settings are invalid, or if no module is left.
    """
    settings, own = read_own(name, typed)
    trained_encoders = {
        prefix: encoder for prefix, encoder in encoders.items() if prefix not in settings.encoders_off
    }
    in_texts = {f"{prefix}_": list(_in_encoder(encoder)) for prefix, encoder in trained_encoders.items()}
    if settings.include or settings.exclude or settings.reg_ranks or settings.reg_rates:
        modules = [] if dit is None else [(OURS, path) for path, _ in _list_candidates(dit, settings)]
        for start, candidates in in_texts.items():
            modules += [(start, path) for path, _ in candidates]
        settings = fit_patterns(settings, modules)
    kind = OWN_MODULES[name].kind
    if not kind.is_for_texts:
        trained_encoders = {}
        in_texts = {}
    targets: dict[str, Target] = {}
    if dit is not None:
        targets = select_modules(dit, settings)
    # ranks by type and block numbers apply to the DiT only
    text_settings = replace(settings, rules=None, splits=False, blocks=None)
    for start, candidates in in_texts.items():
        targets |= _choose(candidates, text_settings, start)
    layers = kind.make_layers(targets, settings, own)
    if begun:
        by_name = _layers_by_name(dit, trained_encoders)
        joining = _joining_layers(
            layers,
            name,
            settings,
            begun=begun,
            by_name=by_name,
        )
        layers = _in_order(layers, joining, by_name)
    for layer_name, target in targets.items():
        if layer_name in layers:
            layers[layer_name].rate_factor = target.rate_factor  # type: ignore[assignment]
    if settings.rank_rule is not None:
        _mask_ranks(layers, settings.rank_rule, dit)
    return OwnNetwork(layers, settings)


def _mask_ranks(layers: Mapping[str, nn.Module], rule: RankRule, dit: nn.Module | None) -> None:
    """Add rank masks to the LoRAs of a DiT; text encoders see no noise level, so their LoRAs have no masks.

    Raises:
        OptionError: If only text encoders are trained.
    """
    if dit is None:
        raise OptionError(
            f"--network_args {rule.kind.switch}=True: the noise of a sample decides which "
            "ranks act, and text encoders, which alone learn here, see none. Leave it out"
        )
    for name, layer in layers.items():
        if name.startswith(OURS) and isinstance(layer, LoraLayer):
            layer.rank_mask = mask_for(dit, rule, layer.rank)


def _joining_layers(
    layers: Mapping[str, nn.Module],
    name: str,
    settings: LoraSettings,
    begun: Mapping[str, Tensor],
    by_name: Mapping[str, PlacedModule],
) -> dict[str, nn.Module]:
    """Return layers for modules that occur only in the initial tensors: module name -> layer.

    Args:
        layers: Layers of the network by name.
        name: Name of the network's module.
        settings: Settings of the network.
        begun: Initial tensors, under our names.
        by_name: All modules that can have a LoRA, by name.
    """
    kind = OWN_MODULES[name].kind
    joining: dict[str, nn.Module] = {}
    for path, factors in _factors_for(by_name, begun).items():
        is_of_kind = any(part in factors for part in kind.marks)
        if path not in by_name or path in layers or not is_of_kind:
            continue
        placed = by_name[path]
        if not _is_left_out(placed, path, settings):
            joining[path] = kind.layer_of(placed.module, path, factors, settings)
    return joining


def _in_order(
    layers: dict[str, nn.Module], joining: Mapping[str, nn.Module], names: Iterable[str]
) -> dict[str, nn.Module]:
    """Merge the default layers with the joining ones, in the model's order.

    Args:
        layers: Default layers by name.
        joining: Layers to add, by name.
        names: Names of all modules, in the model's order.
    """
    if not joining:
        return layers
    logger.info(
        f"{len(joining)} modules that are no default join the network, because what it begins with has "
        f"them: {list_some([*joining], 3)}"
    )
    together = {**layers, **joining}
    return {name: together[name] for name in names if name in together}


def _is_left_out(placed: PlacedModule, name: str, settings: LoraSettings) -> bool:
    """Return whether --network_args exclude a module.

    Args:
        placed: The module and its path.
        name: Our name of the module.
        settings: Settings of the network.
    """
    if not name.startswith(OURS):
        settings = replace(settings, rules=None)  # the rules are about blocks of the transformer
    rules = settings.rules
    blocks = settings.train_blocks
    if rules is not None and blocks is not None and not placed.path.startswith(rules.choices[blocks]):
        return True
    if _is_excluded(placed.path, settings):
        return True
    matching = find_by_pattern(settings.reg_ranks, name)
    if matching:
        _, rank = settings.reg_ranks[matching[-1]]  # the last pattern that matches counts
        return not rank
    # Without conv_rank, convolutions get no LoRA by default, but that does not exclude those of a file: any
    # rank above 0 makes `_size` accept them
    with_convolutions = replace(settings, conv_rank=settings.conv_rank or 1)
    size = _size(placed.path, placed.module, with_convolutions)
    return size is None or not size.rank


def _layers_by_name(dit: nn.Module | None, encoders: Mapping[str, nn.Module]) -> dict[str, PlacedModule]:
    """Return all modules that can have a LoRA, by our names."""
    networks = {} if dit is None else {OURS: dit}
    networks |= {f"{prefix}_": encoder for prefix, encoder in encoders.items()}
    by_name: dict[str, PlacedModule] = {}
    for start, network in networks.items():
        for path, module in network.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                inner_path = path if start == OURS else published_path(path)
                by_name[start + inner_path.replace(".", "_")] = PlacedModule(inner_path, module)
    return by_name


def _factors_for(
    by_name: Mapping[str, PlacedModule], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Convert tensors of any layout to the model's modules; return module name -> factors."""
    from networks.fused_parts import for_model  # only for a file or a state

    split_sizes = {name: len(placed.module.weight) for name, placed in by_name.items()}
    return group_by_module(add_missing_alphas(for_model(tensors, split_sizes.get)))


def _in_encoder(encoder: nn.Module) -> Iterator[PlacedModule]:
    """Yield the modules of a text encoder's blocks, with their published paths."""
    starts = tuple(f"{name}." for name in spec_of(encoder).block_lists)
    for path, module in _list_modules_below(encoder, starts):
        yield PlacedModule(published_path(path), module)


def build_from_tensors(
    name: str,
    tensors: Mapping[str, Tensor],
    typed: NetworkArguments,
    dit: nn.Module,
    encoders: Mapping[str, nn.Module],
) -> OwnNetwork:
    """Build one of our networks with the modules, ranks and alphas of a file's tensors, but not their values.

    Modules of the file that the model does not have are logged.

    Args:
        name: Name of the module, one of OWN_MODULES.
        tensors: Tensors under our names.
        typed: Unparsed settings from the command line; only dropout and arguments are used.
        dit: The transformer.
        encoders: Trained text encoders, by their `lora_prefix`.

    Raises:
        CheckpointError: If the model has none of the modules, or if the file holds another kind of network.
    """
    kind = OWN_MODULES[name].kind
    settings = _settings_with_file(name, typed)
    by_name = _layers_by_name(dit, encoders)
    layers: dict[str, nn.Module] = {}
    absent: list[str] = []
    for path, factors in _factors_for(by_name, tensors).items():
        if not any(part in factors for part in kind.marks):
            raise CheckpointError(
                f"--dim_from_weights: {path} has {', '.join(factors)}, which is another kind of network.\n"
                "  Give the --network_module that the file was trained with."
            )
        module = by_name[path].module if path in by_name else None
        if module is None or not (kind.is_for_convolutions or isinstance(module, nn.Linear)):
            absent.append(path)
        else:
            layers[path] = kind.layer_of(module, path, factors, settings)
    if not layers:
        raise CheckpointError(
            "--dim_from_weights: the model has none of the file's modules, such as "
            f"{list_some(absent, 3)}.\n  Give a file that was trained for this model."
        )
    modules: list[tuple[str, str]] = []
    for layer in layers:
        inner_path = by_name[layer].path
        modules.append((layer.removesuffix(inner_path.replace(".", "_")), inner_path))
    settings = fit_patterns(settings, modules)
    if absent:
        logger.warning(
            f"--dim_from_weights: {len(absent)} modules of the file are not in this model: "
            f"{list_some(absent)}"
        )
    if settings.rank_rule is not None:
        _mask_ranks(layers, settings.rank_rule, dit)
    return OwnNetwork(layers, settings)


def _settings_with_file(name: str, typed: NetworkArguments) -> LoraSettings:
    """Return the settings that still apply if modules and ranks come from a file; warn of ignored ones."""
    rules = OWN_MODULES[name].rules
    allowed = {*WITH_FILE}
    if rules is not None:
        allowed.update(rules.encoders)
    from_file = {key for key, value in typed.arguments.items() if value is not None and key not in allowed}
    checked = {key: value for key, value in typed.arguments.items() if key in from_file}
    # only for its errors: values that are ignored have to be valid too
    read_own(name, NetworkArguments(arguments=checked))
    for key in sorted(from_file):
        logger.warning(
            f"--network_args {key} is ignored because --dim_from_weights takes the modules and ranks from "
            "the file"
        )
    arguments = {key: value for key, value in typed.arguments.items() if key in WITH_FILE}
    settings, _ = read_own(name, NetworkArguments(dropout=typed.dropout, arguments=arguments))
    return settings


def smallest_lora_bytes(model: Path, rank: int) -> int:
    """Return a lower bound of a LoRA's size for a model, from the header of the model's file.

    It assumes one byte per value for all matrices of the blocks: a LoRA has two or four bytes per value, but
    skips some matrices.
    """
    with open_checkpoint(model) as checkpoint:
        shapes = [info.shape for name, info in checkpoint.tensors.items() if "blocks." in name]
    return sum(rank * sum(shape) for shape in shapes if len(shape) == 2 and min(shape) > rank)
