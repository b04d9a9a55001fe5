"""Our network modules: build what `--network_module networks.lora_wan` and the like name."""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from modules.checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError, OptionError
from modules.run_blocks import spec_of
from networks.deltas import DORA, LORA, Factors, add_missing_alphas, group_by_module, rank_of
from networks.factored import FactoredLayer, MakeShapes, loha_shapes, lokr_shapes
from networks.key_formats import OURS
from networks.loading import list_some
from networks.lora_layer import LoraLayer
from networks.lora_network import OwnNetwork
from networks.lora_products import diagonal_blocks
from networks.lora_settings import (
    LoraRules,
    LoraSettings,
    find_by_pattern,
    fit_patterns,
    log_overlaps,
    read_settings,
)
from networks.module_names import replace_dots
from networks.names.stable_diffusion import published_path
from networks.parts import for_model

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
        anywhere = (re.compile(f".*{re.escape(part)}") for part in spec.lora_exclude if not spec.lora_choice)
        settings = replace(settings, exclude=(*settings.exclude, *anywhere))
    else:
        there = dict(unet.named_children())
        depths = {one: len(list(there[one].children())) for one in rules.indices.values() if one in there}
        check_blocks(settings, depths)
    found = _choose(_candidates(unet, settings), settings, OURS)
    if not found:
        raise OptionError(
            "--network_args: the LoRA has no module left. Exclude fewer (exclude_patterns, ranks of 0, "
            "numbers of blocks), or add some with include_patterns"
        )
    return found


def _candidates(unet: nn.Module, settings: LoraSettings) -> Iterator[tuple[str, LoraModule]]:
    """Yield the modules of a DiT, by path, among which patterns and ranks choose."""
    rules = settings.rules
    if rules is None:
        spec = spec_of(unet)
        found = _modules_below(unet, tuple(f"{name}." for name in (*spec.block_lists, *spec.lora_lists)))
        choice = [re.compile(pattern) for pattern in spec.lora_choice]
        return (one for one in found if not choice or any(pattern.match(one[0]) for pattern in choice))
    targets = rules.targets if settings.train_blocks is None else rules.choices[settings.train_blocks]
    outside = zip(rules.outside_paths, settings.outside_ranks, strict=False)
    starts = [targets, *((path,) for path, rank in outside if rank)]
    return (one for start in starts for one in _modules_below(unet, start))


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
    ranks = (
        settings.type_ranks[argument]
        for argument, kinds in rules.types
        if argument in settings.type_ranks and any(all(word in path for word in words) for words in kinds)
    )
    return next(ranks, settings.rank), settings.alpha


_IN_BLOCKS = ("double_blocks.", "single_blocks.")
_REFINERS = ("context_refiner.", "noise_refiner.")
# FLUX.1 and Chroma, also the modulation of blocks
FLUX_RULES = LoraRules(
    targets=_IN_BLOCKS,
    types=(
        *(
            (f"{stream}_{kind}_dim", ((f"{stream}_{kind}",),))
            for kind in ("attn", "mlp", "mod")
            for stream in ("img", "txt")
        ),
        ("single_dim", (("single_blocks", "linear"),)),
        ("single_mod_dim", (("single_blocks", "modulation"),)),
    ),
    choices={"all": _IN_BLOCKS, "double": _IN_BLOCKS[:1], "single": _IN_BLOCKS[1:]},
    indices={"train_double_block_indices": "double_blocks", "train_single_block_indices": "single_blocks"},
    outside="in_dims",
    outside_paths=("img_in", "time_in", "vector_in", "guidance_in", "txt_in"),
    fused={"attn.qkv": 3, "linear1": 4},
    encoders={"train_t5xxl": "lora_te3"},
)
# HunyuanImage-2.1, whose blocks' modulation it takes too
HUNYUAN_IMAGE_RULES = LoraRules(targets=_IN_BLOCKS, fused={"attn_qkv": 3, "linear1": 4})
# Lumina-Image-2.0: blocks, refiners and the last layer
LUMINA_RULES = LoraRules(
    targets=(*_REFINERS, "layers.", "final_layer."),
    types=(
        ("attn_dim", (("attention",),)),
        ("mlp_dim", (("mlp",), ("feed_forward",))),
        ("mod_dim", (("modulation",),)),
        ("refiner_dim", (("refiner",),)),
    ),
    choices={
        "all": (*_REFINERS, "layers.", "final_layer."),
        "transformer": ("layers.",),
        "refiners": _REFINERS,
        "noise_refiner": _REFINERS[1:],
        "context_refiner": _REFINERS[:1],
    },
    outside="embedder_dims",
    outside_paths=("x_embedder", "t_embedder", "cap_embedder"),
    fused={"attention.qkv": 3},
)


@dataclass(frozen=True)
class OwnModule:
    """One of our network modules: a LoRA, or a network of another kind."""

    rules: LoraRules | None = None  # of a family; None: the network's `DitSpec` alone decides
    kind: str = "LoRA"
    first: tuple[str, ...] = LORA[:1]  # each module of a file has one of these factors


OWN_MODULES = {
    "networks.lora": OwnModule(),
    "networks.loha": OwnModule(kind="LoHa", first=("hada_w1_a",)),
    "networks.lokr": OwnModule(kind="LoKr", first=("lokr_w1", "lokr_w1_a")),
    # plain LoRAs under the names that other LoRA tuners have
    **dict.fromkeys(
        (
            *("networks.lora_wan", "networks.lora_hunyuan", "networks.lora_framepack"),
            *("networks.lora_flux_2", "networks.lora_qwen_image", "networks.lora_zimage"),
            "networks.lora_ltx2",
        ),
        OwnModule(),
    ),
    "networks.lora_flux": OwnModule(FLUX_RULES),
    "networks.lora_hunyuan_image": OwnModule(HUNYUAN_IMAGE_RULES),
    "networks.lora_lumina": OwnModule(LUMINA_RULES),
}
_SWITCH = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}
# settings that go beside what a file says with --dim_from_weights
_BESIDE_FILE = {
    *("rank_dropout", "module_dropout", "verbose", "split_qkv", "network_reg_lrs", "ggpo_sigma", "ggpo_beta"),
    *("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"),
}


def read_own(
    name: str, rank: int | None, alpha: float | None, dropout: float | None, arguments: Mapping[str, Any]
) -> tuple[LoraSettings, MakeShapes]:
    """Read the settings of one of our modules, and how a LoHa or LoKr makes its factors.

    Of a LoKr, `factor=8` splits sizes into 8 and the rest (-1, the default: as equal as can be);
    `decompose_both=True` gives the smaller matrix two factors too. A `--network_dim` of half the larger
    matrix's side or more keeps that matrix whole.
    Raises OptionError for a setting that is unknown or out of range, or that only LoRAs have.
    """
    own, rest = OWN_MODULES[name], dict(arguments)
    make_shapes: MakeShapes = loha_shapes
    if own.kind == "LoKr":
        factor, decompose_both = rest.pop("factor", -1), str(rest.pop("decompose_both", False))
        try:
            size = int(factor)
        except ValueError:
            size = 0
        if size < 1 and size != -1:
            raise OptionError(
                f"--network_args factor={factor}: give a whole number from 1, or -1 for equal parts"
            )
        if decompose_both not in _SWITCH:
            raise OptionError(f"--network_args decompose_both={decompose_both}: give True or False")
        decomposes = _SWITCH[decompose_both]
        make_shapes = functools.partial(lokr_shapes, factor=size, decompose_both=decomposes)
    settings = read_settings(rank, alpha, dropout, rest, own.rules)
    ratios = settings.loraplus_lr_ratio, settings.loraplus_encoder_ratio
    others = settings.dropouts, settings.decomposes, settings.reg_rates, settings.perturbation
    if own.kind != "LoRA" and (any(others) or any(ratio is not None for ratio in ratios)):
        raise OptionError(
            "--network_dropout, and rank_dropout, module_dropout, dora_wd, loraplus_..., network_reg_lrs and "
            "ggpo_... of --network_args, are for LoRAs only: leave them out, or use --network_module "
            "networks.lora"
        )
    return settings, make_shapes


def build_network(
    name: str,
    rank: int | None,
    alpha: float | None,
    dropout: float | None,
    arguments: Mapping[str, Any],
    dit: nn.Module | None,
    encoders: Mapping[str, nn.Module],
) -> OwnNetwork:
    """Build one of our networks on the modules that the settings choose.

    name: of the module, in OWN_MODULES. dit: None if only encoders learn. encoders: text encoders that learn,
    by their `lora_prefix`. Raises OptionError for wrong settings, or if no module is left.
    """
    settings, make_shapes = read_own(name, rank, alpha, dropout, arguments)
    learning = encoders.keys() - settings.encoders_off
    in_texts = {
        f"{prefix}_": list(_in_encoder(one)) for prefix, one in encoders.items() if prefix in learning
    }
    modules = [] if dit is None else [(OURS, path) for path, _ in _candidates(dit, settings)]
    modules += [(start, path) for start, inside in in_texts.items() for path, _ in inside]
    settings = fit_patterns(settings, modules)
    layers: dict[str, nn.Module] = {}
    if OWN_MODULES[name].kind != "LoRA":
        assert dit is not None  # they have no part for text encoders
        chosen = choose_modules(dit, replace(settings, conv_rank=None))
        for path, (module, its_rank, its_alpha, _) in chosen.items():
            if isinstance(module, nn.Linear):
                shapes = make_shapes(module.out_features, module.in_features, its_rank)
                layers[path] = FactoredLayer(module, shapes, its_rank, its_alpha)
        return OwnNetwork(layers, settings)
    targets = {} if dit is None else choose_modules(dit, settings)
    for start, inside in in_texts.items():
        # ranks by type and numbers of blocks are for the DiT alone
        targets |= _choose(iter(inside), replace(settings, rules=None, splits=False), start)
    for path, (module, its_rank, its_alpha, heights) in targets.items():
        layers[path] = LoraLayer(module, its_rank, its_alpha, settings.decomposes, heights)
    return OwnNetwork(layers, settings)


def _in_encoder(encoder: nn.Module) -> Iterator[tuple[str, LoraModule]]:
    """Yield the modules in the blocks of a text encoder, by published paths."""
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
    from_file = given - {*_BESIDE_FILE, *({} if own.rules is None else own.rules.encoders)}
    read_own(name, None, None, None, {key: value for key, value in arguments.items() if key in from_file})
    for key in sorted(from_file):
        logger.warning(
            f"--network_args {key} is ignored because --dim_from_weights takes the modules and ranks from "
            "the file"
        )
    others = {key: value for key, value in arguments.items() if key in _BESIDE_FILE}
    settings, _ = read_own(name, None, None, dropout, others)
    networks = {OURS: dit, **{f"{prefix}_": encoder for prefix, encoder in encoders.items()}}
    modules = {
        (start, path if start == OURS else published_path(path)): module
        for start, network in networks.items()
        for path, module in network.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    known = {start + replace_dots(path): module for (start, path), module in modules.items()}
    fitted = for_model(tensors, {path: len(module.weight) for path, module in known.items()}.get)
    layers: dict[str, nn.Module] = {}
    missed = []
    for path, factors in group_by_module(add_missing_alphas(fitted)).items():
        if not any(part in factors for part in own.first):
            raise CheckpointError(
                f"--dim_from_weights: {path} has {', '.join(factors)}, which is another kind of network.\n"
                "  Give the --network_module that the file was trained with."
            )
        if path not in known or (own.kind != "LoRA" and not isinstance(known[path], nn.Linear)):
            missed.append(path)
        elif own.kind == "LoRA":
            layers[path] = _layer_of_file(known[path], path, factors, settings)
        else:
            layers[path] = _factored_of_file(known[path], path, factors)
    if not layers:
        raise CheckpointError(
            "--dim_from_weights: the model has none of the file's modules, such as "
            f"{list_some(missed, 3)}.\n  Give a file that was trained for this model."
        )
    settings = fit_patterns(settings, [pair for pair in modules if pair[0] + replace_dots(pair[1]) in layers])
    if missed:
        logger.warning(
            f"--dim_from_weights: {len(missed)} modules of the file are not in this model: "
            f"{list_some(missed)}"
        )
    return OwnNetwork(layers, settings)


def _factored_of_file(module: LoraModule, name: str, factors: Factors) -> FactoredLayer:
    """Return a layer with a file's factors and alpha. Raises CheckpointError if they are no matrices."""
    shapes = {part: tuple(tensor.shape) for part, tensor in factors.items() if part != "alpha"}
    if not isinstance(module, nn.Linear) or any(len(shape) != 2 for shape in shapes.values()):
        raise CheckpointError(f"--dim_from_weights: {name} has {shapes}, and only matrices can be trained")
    rank = rank_of(factors) or 1
    alpha = float(factors["alpha"]) if "alpha" in factors and rank_of(factors) else rank
    return FactoredLayer(module, shapes, rank, alpha)


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
