"""Build the networks that `--network_module networks.lora_wan` and the like name."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from logging import getLogger
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from modules.checkpoints.opening import open_checkpoint
from modules.console import list_some
from modules.errors import CheckpointError, OptionError
from modules.run_blocks import spec_of
from networks.deltas import DORA, LORA, Factors, add_missing_alphas, group_by_module, rank_of, without_alpha
from networks.factored import FactoredLayer
from networks.lora_layer import LoraLayer
from networks.lora_network import OwnNetwork
from networks.lora_products import diagonal_blocks, fused_heights
from networks.lora_settings import LoraSettings, find_by_pattern, fit_patterns, log_overlaps
from networks.names.layouts import OURS
from networks.names.texts import published_path
from networks.own_kinds import BESIDE_FILE, OWN_MODULES, read_own

logger = getLogger(__name__)
LoraModule = nn.Linear | nn.Conv2d


# a module that gets a LoRA, its rank and alpha, and the heights of parts that get factors of their own
Target = tuple[LoraModule, int, float, tuple[int, ...]]


def choose_modules(unet: nn.Module, settings: LoraSettings) -> dict[str, Target]:
    """Return the modules of a DiT that its spec, rules and patterns choose, by our names.

    Raises OptionError if no module is left, or for blocks that the DiT does not have.
    """
    spec, rules = spec_of(unet), settings.rules
    if rules is not None and settings.block_numbers:
        there = dict(unet.named_children())
        depths = {one: len(list(there[one].children())) for one in rules.indices.values() if one in there}
        check_blocks(settings, depths)
    unasked = () if spec.lora_choice else spec.lora_exclude
    found = _choose(_candidates(unet, settings), settings, OURS, unasked)
    if not found:
        raise OptionError(
            "--network_args: the LoRA has no module left. Exclude fewer (exclude_patterns, ranks of 0, "
            "numbers of blocks), or add some with include_patterns"
        )
    return found


def _candidates(unet: nn.Module, settings: LoraSettings) -> Iterator[tuple[str, LoraModule]]:
    """Yield the modules of a DiT, by path, among which patterns and ranks choose."""
    spec, rules = spec_of(unet), settings.rules
    starts = [tuple(f"{name}." for name in (*spec.block_lists, *spec.lora_lists))]
    if rules is not None:
        if settings.train_blocks is not None:
            starts = [rules.choices[settings.train_blocks]]
        outside = zip(rules.outside_paths, settings.outside_ranks, strict=False)
        starts += [(path,) for path, rank in outside if rank]
    choice = [re.compile(pattern) for pattern in spec.lora_choice]
    found = (one for start in starts for one in _modules_below(unet, start))
    return (one for one in found if not choice or any(pattern.match(one[0]) for pattern in choice))


def _choose(
    candidates: Iterator[tuple[str, LoraModule]],
    settings: LoraSettings,
    start: str,
    unasked: tuple[str, ...] = (),
) -> dict[str, Target]:
    """Choose modules. unasked: parts of paths to leave out unless a pattern or a rank of their kind asks."""
    found: dict[str, Target] = {}
    fitting = []
    for path, module in candidates:
        name = start + path.replace(".", "_")
        places = find_by_pattern(settings.reg_ranks, name) if settings.reg_ranks else ()
        fitting.append(places)
        size = _size(path, module, settings)
        if places:
            size = int(settings.reg_ranks[places[-1]][1]), settings.alpha
        is_unasked = any(part in f".{path}" for part in unasked) and _rank_of_kind(path, settings) is None
        may_go = is_unasked or settings.exclude
        if size is None or size[0] <= 0 or (may_go and _is_excluded(path, settings, is_unasked)):
            size = None
        if settings.verbose:
            logger.info(f"  {path}: {'left out' if size is None else f'rank {size[0]}, alpha {size[1]:g}'}")
        if size is not None:
            found[name] = module, *size, _heights(path, module, settings) if settings.splits else ()
    if settings.reg_ranks:
        log_overlaps("network_reg_dims", settings.reg_ranks, fitting)
    return found


def _is_excluded(path: str, settings: LoraSettings, is_unasked: bool = False) -> bool:
    is_excluded = is_unasked or any(one.match(path) for one in settings.exclude)
    return is_excluded and not any(one.match(path) for one in settings.include)


def _modules_below(unet: nn.Module, starts: tuple[str, ...]) -> Iterator[tuple[str, LoraModule]]:
    """Yield (path, module) of each Linear and Conv2d whose path begins so, in the model's order."""
    for path, module in unet.named_modules():
        if f"{path}.".startswith(starts) and isinstance(module, (nn.Linear, nn.Conv2d)):
            yield path, module


def check_blocks(settings: LoraSettings, depths: Mapping[str, int]) -> None:
    """Raise OptionError for numbers of blocks that a model does not have. depths: by list of blocks."""
    for argument, numbers in settings.block_numbers.items():
        depth = None if settings.rules is None else depths.get(settings.rules.indices[argument])
        beyond = [] if depth is None else sorted(number for number in numbers or () if number >= depth)
        if beyond and depth is not None:
            raise OptionError(
                f"--network_args {argument}: there is no block {beyond[0]}; the model has {depth} such "
                f"blocks, 0 to {depth - 1}"
            )


def _size(path: str, module: LoraModule, settings: LoraSettings) -> tuple[int, float] | None:
    """Return (rank, alpha), or None if the module gets no LoRA."""
    if not isinstance(module, nn.Linear) and module.kernel_size != (1, 1):
        return None if settings.conv_rank is None else (settings.conv_rank, settings.conv_alpha)
    rules = settings.rules
    if rules is None:
        return settings.rank, settings.alpha
    for start, rank in zip(rules.outside_paths, settings.outside_ranks, strict=False):
        if path == start or path.startswith(f"{start}."):
            return rank, settings.alpha
    for argument, numbers in settings.block_numbers.items():
        found = re.match(rf"{rules.indices[argument]}\.(\d+)\.", path)
        if found is not None and numbers is not None and int(found[1]) not in numbers:
            return None
    of_kind = _rank_of_kind(path, settings)
    return settings.rank if of_kind is None else of_kind, settings.alpha


def _rank_of_kind(path: str, settings: LoraSettings) -> int | None:
    """Return the rank that an argument for this kind of module gives; None if there is none."""
    ranks = (
        settings.type_ranks[argument]
        for argument, kinds in (() if settings.rules is None else settings.rules.types)
        if argument in settings.type_ranks and any(all(word in path for word in words) for words in kinds)
    )
    return next(ranks, None)


def build_network(
    name: str,
    rank: int | None,
    alpha: float | None,
    dropout: float | None,
    arguments: Mapping[str, Any],
    dit: nn.Module | None,
    encoders: Mapping[str, nn.Module],
    begun: Mapping[str, Tensor] | None = None,
) -> OwnNetwork:
    """Build one of our networks on the modules that the settings choose.

    name: of the module, in OWN_MODULES. dit: None if only encoders learn. encoders: text encoders that learn,
    by their `lora_prefix`. begun: tensors under our names that the network begins with; those of its modules
    that are not default and not left out by `arguments` are added, with their own rank and alpha. Raises
    OptionError for wrong settings, or if no module is left.
    """
    settings, make_shapes = read_own(name, rank, alpha, dropout, arguments)
    learning = encoders.keys() - settings.encoders_off
    in_texts = {
        f"{prefix}_": list(_in_encoder(one)) for prefix, one in encoders.items() if prefix in learning
    }
    if settings.include or settings.exclude or settings.reg_ranks or settings.reg_rates:
        modules = [] if dit is None else [(OURS, path) for path, _ in _candidates(dit, settings)]
        modules += [(start, path) for start, inside in in_texts.items() for path, _ in inside]
        settings = fit_patterns(settings, modules)
    is_lora = OWN_MODULES[name].kind == "LoRA"
    able = {prefix: one for prefix, one in encoders.items() if is_lora and prefix in learning}
    of_dit = settings if is_lora else replace(settings, conv_rank=None)
    targets = {} if dit is None else choose_modules(dit, of_dit)
    for prefix in able:
        # ranks by type and numbers of blocks are for the DiT alone
        inside = iter(in_texts[f"{prefix}_"])
        targets |= _choose(inside, replace(settings, rules=None, splits=False), f"{prefix}_")
    layers: dict[str, nn.Module] = {}
    for path, (module, its_rank, its_alpha, heights) in targets.items():
        if is_lora:
            layers[path] = LoraLayer(module, its_rank, its_alpha, settings.decomposes, heights)
        elif isinstance(module, nn.Linear):
            shapes = make_shapes(module.out_features, module.in_features, its_rank)
            layers[path] = FactoredLayer(module, shapes, its_rank, its_alpha)
    if begun:
        layers = _with_begun(layers, name, settings, begun, dit, able)
    return OwnNetwork(layers, settings)


def _with_begun(
    layers: dict[str, nn.Module],
    name: str,
    settings: LoraSettings,
    begun: Mapping[str, Tensor],
    dit: nn.Module | None,
    encoders: Mapping[str, nn.Module],
) -> dict[str, nn.Module]:
    """Return the layers with those that `begun` adds (see `build_network`), in the model's order."""
    known = _layers_by_name(dit, encoders)
    joining: dict[str, nn.Module] = {}
    for path, factors in _factors_for(known, begun).items():
        is_of_kind = any(part in factors for part in OWN_MODULES[name].first)
        if path in known and path not in layers and is_of_kind:
            inside, module = known[path]
            if not _is_left_out(inside, path, module, settings):
                joining[path] = _layer_of(name, module, path, factors, settings)
    if not joining:
        return layers
    logger.info(
        f"{len(joining)} modules that are no default join the network, because what it begins with has "
        f"them: {list_some([*joining], 3)}"
    )
    together = {**layers, **joining}
    return {path: together[path] for path in known if path in together}


def _is_left_out(inside: str, name: str, module: LoraModule, settings: LoraSettings) -> bool:
    """Return whether arguments leave a module out. inside: path in its network; name: our name."""
    if not name.startswith(OURS):
        settings = replace(settings, rules=None)
    rules, blocks = settings.rules, settings.train_blocks
    if rules is not None and blocks is not None and not inside.startswith(rules.choices[blocks]):
        return True
    if _is_excluded(inside, settings):
        return True
    places = find_by_pattern(settings.reg_ranks, name)
    if places:
        return not settings.reg_ranks[places[-1]][1]
    size = _size(inside, module, replace(settings, conv_rank=settings.conv_rank or 1))
    return size is None or not size[0]


def _layers_by_name(
    dit: nn.Module | None, encoders: Mapping[str, nn.Module]
) -> dict[str, tuple[str, LoraModule]]:
    """Return (path, module) of all modules that can have a LoRA, by our names."""
    networks = {} if dit is None else {OURS: dit}
    networks |= {f"{prefix}_": encoder for prefix, encoder in encoders.items()}
    return {
        start + inside.replace(".", "_"): (inside, module)
        for start, network in networks.items()
        for path, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        for inside in [path if start == OURS else published_path(path)]
    }


def _factors_for(
    known: Mapping[str, tuple[str, LoraModule]], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Return the factors of each module, with other layouts converted to the model's modules."""
    from networks.parts import for_model

    heights = {path: len(module.weight) for path, (_, module) in known.items()}
    return group_by_module(add_missing_alphas(for_model(tensors, heights.get)))


def _in_encoder(encoder: nn.Module) -> Iterator[tuple[str, LoraModule]]:
    for path, module in _modules_below(encoder, tuple(f"{name}." for name in spec_of(encoder).block_lists)):
        yield published_path(path), module


def build_from_tensors(
    name: str,
    tensors: Mapping[str, Tensor],
    dropout: float | None,
    arguments: Mapping[str, Any],
    dit: nn.Module,
    encoders: Mapping[str, nn.Module],
) -> OwnNetwork:
    """Build one of our networks with the modules, ranks and alphas of a file's tensors, not their values.

    tensors: under our names. Modules that the model does not have are logged. Raises CheckpointError if
    nothing fits, or if the file holds another kind of network.
    """
    own = OWN_MODULES[name]
    given = {key for key, value in arguments.items() if value is not None}
    from_file = given - {*BESIDE_FILE, *({} if own.rules is None else own.rules.encoders)}
    read_own(name, None, None, None, {key: value for key, value in arguments.items() if key in from_file})
    for key in sorted(from_file):
        logger.warning(
            f"--network_args {key} is ignored because --dim_from_weights takes the modules and ranks from "
            "the file"
        )
    others = {key: value for key, value in arguments.items() if key in BESIDE_FILE}
    settings, _ = read_own(name, None, None, dropout, others)
    known = _layers_by_name(dit, encoders)
    layers: dict[str, nn.Module] = {}
    missed = []
    for path, factors in _factors_for(known, tensors).items():
        if not any(part in factors for part in own.first):
            raise CheckpointError(
                f"--dim_from_weights: {path} has {', '.join(factors)}, which is another kind of network.\n"
                "  Give the --network_module that the file was trained with."
            )
        if path not in known or (own.kind != "LoRA" and not isinstance(known[path][1], nn.Linear)):
            missed.append(path)
        else:
            layers[path] = _layer_of(name, known[path][1], path, factors, settings)
    if not layers:
        raise CheckpointError(
            "--dim_from_weights: the model has none of the file's modules, such as "
            f"{list_some(missed, 3)}.\n  Give a file that was trained for this model."
        )
    inside = [(path, known[path][0]) for path in layers]
    settings = fit_patterns(
        settings, [(path.removesuffix(one.replace(".", "_")), one) for path, one in inside]
    )
    if missed:
        logger.warning(
            f"--dim_from_weights: {len(missed)} modules of the file are not in this model: "
            f"{list_some(missed)}"
        )
    return OwnNetwork(layers, settings)


def _layer_of(
    name: str, module: LoraModule, path: str, factors: Factors, settings: LoraSettings
) -> LoraLayer | FactoredLayer:
    """Return a layer of a network module with the rank and alpha of factors; split if that is asked for and
    the up factor has blocks. Raises CheckpointError if factors of a LoHa or LoKr are no matrices.
    """
    if OWN_MODULES[name].kind != "LoRA":
        shapes = {part: tuple(tensor.shape) for part, tensor in without_alpha(factors).items()}
        if not isinstance(module, nn.Linear) or any(len(shape) != 2 for shape in shapes.values()):
            raise CheckpointError(
                f"--dim_from_weights: {path} has {shapes}, and only matrices can be trained"
            )
        rank = rank_of(factors) or 1
        alpha = float(factors["alpha"]) if "alpha" in factors and rank_of(factors) else rank
        return FactoredLayer(module, shapes, rank, alpha)
    rank, alpha = factors[LORA[0]].shape[0], float(factors["alpha"])
    heights = _heights(path, module, settings) if settings.splits else ()
    if heights and diagonal_blocks(factors[LORA[1]], heights) is not None:
        parts = len(heights)
        return LoraLayer(module, rank // parts, alpha / parts, heights=heights)
    return LoraLayer(module, rank, alpha, DORA in factors)


def _heights(path: str, module: LoraModule, settings: LoraSettings) -> tuple[int, ...]:
    """Return the rows of each part of a fused layer whose parts get their own factors; () for others."""
    if settings.rules is None or not isinstance(module, nn.Linear):
        return ()
    name = path.replace(".", "_")
    fused = settings.rules.fused.items()
    parts = next((count for ending, count in fused if name.endswith(ending.replace(".", "_"))), 0)
    return fused_heights(parts, module.out_features, module.in_features)


def smallest_lora_bytes(model: Path, rank: int) -> int:
    """Return a lower bound of a LoRA's size for a model, from the header of the model's file.

    It counts the matrices of the blocks with one byte a number: a LoRA has two or four, but leaves some out.
    """
    with open_checkpoint(model) as checkpoint:
        shapes = [info.shape for name, info in checkpoint.tensors.items() if "blocks." in name]
    return sum(rank * sum(shape) for shape in shapes if len(shape) == 2 and min(shape) > rank)
