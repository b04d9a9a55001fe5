"""Choose the Linear and Conv2d modules of a model that get a LoRA.

The network's `DitSpec` states which take part: those in its lists of blocks, except `lora_exclude`; a family
may have rules of its own (`LoraRules`).
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from logging import getLogger

from torch import nn

from modules.errors import OptionError
from modules.run_blocks import spec_of
from networks.key_formats import OURS
from networks.lora_settings import LoraSettings, find_by_pattern, log_overlaps
from networks.module_names import replace_dots
from networks.names.stable_diffusion import published_path

logger = getLogger(__name__)
LoraModule = nn.Linear | nn.Conv2d


# a module that gets a LoRA, its rank and alpha, and the heights of parts that get factors of their own
Target = tuple[LoraModule, int, float, tuple[int, ...]]


def choose_modules(unet: nn.Module, settings: LoraSettings) -> dict[str, Target]:
    """Return the modules of a DiT that rules, spec and patterns choose, by our names.

    Raises OptionError if no module is left, or for blocks that the DiT does not have.
    """
    rules = settings.rules
    if rules is None:
        spec = spec_of(unet)
        anywhere = (re.compile(f".*{re.escape(part)}") for part in spec.lora_exclude)
        settings = replace(settings, exclude=(*settings.exclude, *anywhere))
        candidates = _modules_below(unet, tuple(f"{name}." for name in spec.block_lists))
    else:
        there = dict(unet.named_children())
        lists = [one for one in rules.indices.values() if one in there]
        check_blocks(settings, {one: len(list(there[one].children())) for one in lists})
        targets = rules.targets if settings.train_blocks is None else rules.choices[settings.train_blocks]
        outside = zip(rules.outside_paths, settings.outside_ranks, strict=False)
        starts = [targets, *((path,) for path, rank in outside if rank)]
        candidates = itertools.chain.from_iterable(_modules_below(unet, start) for start in starts)
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
        is_excluded = any(one.match(path) for one in settings.exclude)
        takes = not is_excluded or any(one.match(path) for one in settings.include)
        chosen = size is not None and size[0] > 0 and takes
        if settings.verbose:
            logger.info(
                f"  {path}: {f'rank {size[0]}, alpha {size[1]:g}' if size and chosen else 'left out'}"
            )
        if size is not None and chosen:
            heights: tuple[int, ...] = ()
            if settings.splits and settings.rules is not None and isinstance(module, nn.Linear):
                heights = settings.rules.heights(path, module.out_features, module.in_features)
            found[name] = module, size[0], size[1], heights
    log_overlaps("network_reg_dims", settings.reg_ranks, fitting)
    return found


def _modules_below(unet: nn.Module, starts: tuple[str, ...]) -> Iterator[tuple[str, LoraModule]]:
    """Yield (path, module) of each Linear and Conv2d whose path begins so, in the model's order."""
    for path, module in unet.named_modules():
        if path.startswith(starts) and isinstance(module, (nn.Linear, nn.Conv2d)):
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
    kind = next((each for each in rules.types_of(path) if each in settings.type_ranks), None)
    return settings.rank if kind is None else settings.type_ranks[kind], settings.alpha
