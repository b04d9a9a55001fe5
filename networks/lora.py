"""LoRA for the Linear layers of a network's blocks: `--network_module networks.lora`, whatever the network.

Which modules take part is stated by the network's `DitSpec`: those in its lists of blocks, except
`lora_exclude`. `networks/lora_<family>.py` are this module under the names that LoRA tuners know, some with
rules of their own (`LoraRules`).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from modules.checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError, OptionError
from modules.run_blocks import spec_of
from networks.deltas import DORA, LORA, Factors, group_by_module
from networks.key_formats import OURS, to_native
from networks.loading import list_some
from networks.lora_layer import LoraLayer
from networks.lora_network import LoraNetwork
from networks.lora_products import diagonal_blocks
from networks.lora_settings import LoraRules, LoraSettings, find_by_pattern, log_overlaps, read_settings
from networks.module_names import replace_dots
from networks.names.text_encoders import published_path
from networks.parts import for_model
from networks.writing import add_missing_alphas

logger = getLogger(__name__)
LoraModule = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class Target:
    """A module that gets a LoRA."""

    module: LoraModule
    rank: int
    alpha: float
    heights: tuple[int, ...] = ()  # of the parts that get factors of their own


def choose_modules(unet: nn.Module, settings: LoraSettings) -> dict[str, Target]:
    """Return the modules of a DiT that rules, spec and patterns choose, by our names.

    Raises OptionError if no module is left, or for blocks that the DiT does not have.
    """
    rules = settings.rules
    if rules is None:
        spec = spec_of(unet)
        settings = replace(settings, exclude=(*settings.exclude, *map(_anywhere, spec.lora_exclude)))
        candidates = _modules_below(unet, tuple(f"{name}." for name in spec.block_lists))
    else:
        there = dict(unet.named_children())
        lists = [one for one in rules.indices.values() if one in there]
        check_blocks(settings, {one: len(list(there[one].children())) for one in lists})
        candidates = _candidates(unet, settings, rules)
    found = _choose(candidates, settings, OURS)
    if not found:
        raise OptionError(
            "--network_args: the LoRA has no module left. Exclude fewer (exclude_patterns, ranks of 0, "
            "numbers of blocks), or add some with include_patterns"
        )
    return found


def choose_encoder_modules(encoder: nn.Module, prefix: str, settings: LoraSettings) -> dict[str, Target]:
    """Return the modules in the blocks of a text encoder, named by the prefix and the published paths.

    Ranks by type and numbers of blocks are for the DiT alone.
    """
    plain = replace(settings, rules=None, splits=False)
    lists = tuple(f"{name}." for name in spec_of(encoder).block_lists)
    modules = ((published_path(path), module) for path, module in _modules_below(encoder, lists))
    return _choose(modules, plain, f"{prefix}_")


def named_modules_of(unet: nn.Module, encoders: Mapping[str, nn.Module]) -> dict[str, LoraModule]:
    """Return all modules that a LoRA may be on, by our names. encoders: by prefix."""
    networks = {OURS: unet, **{f"{prefix}_": encoder for prefix, encoder in encoders.items()}}
    return {
        start + replace_dots(path if start == OURS else published_path(path)): module
        for start, network in networks.items()
        for path, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


def _choose(
    candidates: Iterator[tuple[str, LoraModule]], settings: LoraSettings, start: str
) -> dict[str, Target]:
    found: dict[str, Target] = {}
    fitting = []
    for path, module in candidates:
        name = start + replace_dots(path)
        places = find_by_pattern(settings.reg_ranks, name)
        fitting.append(places)
        size = (
            (int(settings.reg_ranks[places[-1]][1]), settings.alpha)
            if places
            else _size(path, module, settings)
        )
        chosen = size is not None and size[0] > 0 and settings.takes(path)
        if settings.verbose:
            logger.info(
                f"  {path}: {f'rank {size[0]}, alpha {size[1]:g}' if size and chosen else 'left out'}"
            )
        if size is not None and chosen:
            found[name] = Target(module, *size, _heights(path, module, settings))
    log_overlaps("network_reg_dims", settings.reg_ranks, fitting)
    return found


def _candidates(
    unet: nn.Module, settings: LoraSettings, rules: LoraRules
) -> Iterator[tuple[str, LoraModule]]:
    """Yield the modules that a family's rules name: those in blocks, then those outside with a rank."""
    targets = rules.targets if settings.train_blocks is None else rules.choices[settings.train_blocks]
    yield from _modules_below(unet, targets)
    for path, rank in zip(rules.outside_paths, settings.outside_ranks, strict=False):
        if rank:
            yield from _modules_below(unet, (path,))


def _modules_below(unet: nn.Module, starts: tuple[str, ...]) -> Iterator[tuple[str, LoraModule]]:
    """Yield (path, module) of each Linear and Conv2d whose path begins so, in the model's order."""
    for path, module in unet.named_modules():
        if path.startswith(starts) and isinstance(module, (nn.Linear, nn.Conv2d)):
            yield path, module


def check_blocks(settings: LoraSettings, depths: Mapping[str, int]) -> None:
    """Raise OptionError for numbers of blocks that a model does not have. depths: by list of blocks."""
    for argument, numbers in settings.block_numbers.items():
        depth = None if settings.rules is None else depths.get(settings.rules.indices[argument])
        if depth is not None:
            numbers.check(argument, depth)


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
        if found is not None and not numbers.has(int(found[1])):
            return None
    kind = next((each for each in rules.types_of(path) if each in settings.type_ranks), None)
    return settings.rank if kind is None else settings.type_ranks[kind], settings.alpha


def _heights(path: str, module: LoraModule, settings: LoraSettings) -> tuple[int, ...]:
    if not settings.splits or settings.rules is None or not isinstance(module, nn.Linear):
        return ()
    return settings.rules.heights(path, module.out_features, module.in_features)


def _anywhere(part: str) -> re.Pattern[str]:
    """A pattern that matches, from its start, every module path with this part in it."""
    return re.compile(f".*{re.escape(part)}")


# settings that go beside what a file says with --dim_from_weights
_BESIDE_FILE = {
    *("rank_dropout", "module_dropout", "verbose", "split_qkv", "network_reg_lrs", "ggpo_sigma", "ggpo_beta"),
    *("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"),
}
_OF_THE_CALL = {"neuron_dropout", "file", "vae", "text_encoder"}  # what LoRA tuners pass along


def module_of_family(
    rules: LoraRules | None,
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Return the functions of a LoRA module: `check_settings`, `create_arch_network` and
    `create_arch_network_from_weights`, called as LoRA tuners call them.

    rules: meaning of `--network_args` for a family; None: the network's `DitSpec` alone decides.
    """

    def check(
        rank: int | None,
        alpha: float | None,
        dropout: float | None,
        arguments: Mapping[str, Any],
        depths: Mapping[str, int] | None = None,
    ) -> None:
        """Raise OptionError if a setting cannot be used. Nothing of the model is needed."""
        settings = read_settings(rank, alpha, dropout, arguments, rules)
        check_blocks(settings, depths or {})

    def create(
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: object,
        text_encoders: object,
        unet: nn.Module | None,
        neuron_dropout: float | None = None,
        **arguments: Any,
    ) -> LoraNetwork:
        """Build a network on the modules that the DiT's spec and the patterns choose.

        `vae` is not used. `text_encoders`: those that learn, by their `lora_prefix`; anything but a mapping
        is ignored. `unet` may be None if only encoders learn. Raises OptionError if no module is left.
        """
        settings = read_settings(network_dim, network_alpha, neuron_dropout, arguments, rules)
        return build_network(multiplier, settings, text_encoders, unet)

    def create_from_weights(
        multiplier: float,
        weights_sd: Mapping[str, Tensor],
        text_encoders: object = None,
        unet: nn.Module | None = None,
        **arguments: Any,
    ) -> LoraNetwork:
        """Build a network with the modules, ranks and alphas of a LoRA file's tensors, not their values."""
        return build_network_from_weights(multiplier, weights_sd, text_encoders, unet, arguments, rules)

    return check, create, create_from_weights


def build_network(
    multiplier: float, settings: LoraSettings, text_encoders: object, unet: nn.Module | None
) -> LoraNetwork:
    """Build a network on the modules that the settings choose. Raises OptionError if no module is left."""
    targets = {} if unet is None else choose_modules(unet, settings)
    for prefix, encoder in learning_encoders(text_encoders, settings).items():
        targets |= choose_encoder_modules(encoder, prefix, settings)
    layers = {
        name: LoraLayer(each.module, each.rank, each.alpha, settings.decomposes, each.heights)
        for name, each in targets.items()
    }
    return LoraNetwork(layers, settings, multiplier)


def learning_encoders(text_encoders: object, settings: LoraSettings) -> dict[str, nn.Module]:
    """Return those of the text encoders, by their prefixes, that get a LoRA."""
    if not isinstance(text_encoders, Mapping):
        return {}
    return {
        prefix: encoder for prefix, encoder in text_encoders.items() if prefix not in settings.encoders_off
    }


def build_network_from_weights(
    multiplier: float,
    weights: Mapping[str, Tensor],
    text_encoders: object,
    unet: nn.Module | None,
    arguments: Mapping[str, Any],
    rules: LoraRules | None = None,
) -> LoraNetwork:
    """Build a network with the modules, ranks and alphas of these tensors (any dialect).

    Modules that the model does not have are logged. Raises CheckpointError if nothing fits, or if the tensors
    are not a plain LoRA.
    """
    if unet is None:
        raise TypeError("create_arch_network_from_weights needs unet")
    given = {key for key, value in arguments.items() if value is not None}
    from_file = given - {*_BESIDE_FILE, *_OF_THE_CALL, *({} if rules is None else rules.encoders)}
    read_settings(
        None, None, None, {key: value for key, value in arguments.items() if key in from_file}, rules
    )
    for key in sorted(from_file):
        logger.warning(
            f"--network_args {key} is ignored because --dim_from_weights takes the modules and ranks from "
            "the file"
        )
    others = {key: value for key, value in arguments.items() if key in _BESIDE_FILE}
    settings = read_settings(None, None, arguments.get("neuron_dropout"), others, rules)
    native = to_native(weights)
    encoders = learning_encoders(text_encoders, replace(settings, encoders_off=frozenset()))
    known = named_modules_of(unet, encoders)
    fitted = for_model(
        {**native.tensors, **(native.texts if encoders else {})},
        lambda name: known[name].weight.shape[0] if name in known else None,
    )
    stored = group_by_module(add_missing_alphas(fitted))
    layers, missed = {}, []
    for name, factors in stored.items():
        if LORA[0] not in factors or not isinstance(factors.get("alpha"), Tensor):
            raise CheckpointError(f"--dim_from_weights needs a plain LoRA; {name} has {', '.join(factors)}")
        if name in known:
            layers[name] = _layer_of_file(known[name], name, factors, settings)
        else:
            missed.append(name)
    if not layers:
        raise CheckpointError(
            f"--dim_from_weights: the model has none of the file's modules, such as {list_some(missed, 3)}"
        )
    if missed:
        logger.warning(
            f"--dim_from_weights: {len(missed)} modules of the file are not in this model: "
            f"{list_some(missed)}"
        )
    return LoraNetwork(layers, settings, multiplier)


def smallest_lora_bytes(model: Path, rank: int) -> int:
    """Return how large a LoRA of this rank for a model is at least, from the header of its file.

    It counts the matrices of the blocks with one byte a number: a LoRA has two or four, but leaves some out.
    """
    with open_checkpoint(model) as checkpoint:
        shapes = [info.shape for name, info in checkpoint.tensors.items() if "blocks." in name]
    return sum(rank * sum(shape) for shape in shapes if len(shape) == 2 and min(shape) > rank)


def _layer_of_file(module: LoraModule, name: str, factors: Factors, settings: LoraSettings) -> LoraLayer:
    """Return a layer of a file's rank and alpha; split if that is asked for and its up factor has blocks."""
    rank, alpha = factors[LORA[0]].shape[0], float(factors["alpha"])
    if settings.splits and settings.rules is not None and isinstance(module, nn.Linear):
        heights = settings.rules.heights(name, module.out_features, module.in_features)
        if heights and diagonal_blocks(factors[LORA[1]], heights) is not None:
            parts = len(heights)
            return LoraLayer(module, rank // parts, alpha / parts, heights=heights)
    return LoraLayer(module, rank, alpha, DORA in factors)


check_settings, create_arch_network, create_arch_network_from_weights = module_of_family(None)
