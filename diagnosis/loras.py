"""Findings about LoRA files: modules without effect, one loud block, and two files that clash."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_tools.report.diagnosis.finding import Finding
from modules.console import format_count
from modules.errors import CheckpointError
from networks.block_strengths import split_block_name
from networks.delta import Delta, read_deltas
from networks.loading import read_lora
from networks.module_factors import compute_scaling, group_by_module
from networks.typed_strengths import OTHER

CPU = torch.device("cpu")
LORA_FACTORS = frozenset({"lora_up.weight", "lora_down.weight", "alpha"})
EMPTY_FRACTION = 0.1  # of the modules that change nothing
ONE_BLOCK = 0.6  # fraction of the squared norm in a single block
MIN_BLOCKS = 4  # with fewer blocks, one naturally has most of the norm
OVERLAP = 0.25  # cosine of two LoRAs' changes; independent ones have almost 0
LOUD = 4.0  # how many times as large one LoRA's change is as the other's


@dataclass(frozen=True)
class MeasuredLora:
    """A LoRA file with its changes of weights, by module."""

    path: Path
    deltas: Mapping[str, Delta]  # of the transformer
    text_deltas: Mapping[str, Delta]  # of text encoders


@dataclass(frozen=True)
class BlockChange:
    """The change of one block's weights by a LoRA."""

    block: str  # such as "blocks_3"; "other" for modules outside of numbered blocks
    num_modules: int
    squared_norm: float  # of the changes of its modules, at multiplier 1
    num_unknown: int = 0  # modules whose change depends on the weights of the model (DoRA, OFT)


def measure_lora(path: Path) -> MeasuredLora:
    """Read a LoRA file of any program.

    Raises:
        CheckpointError: If the file is missing, damaged, not a LoRA, or has a LoRA for each of two experts.
    """
    lora = read_lora(path, with_texts=True)
    return MeasuredLora(
        path,
        deltas=read_deltas(lora.modules()),
        text_deltas=read_deltas(group_by_module(lora.text_tensors)),
    )


def list_block_changes(deltas: Mapping[str, Delta]) -> list[BlockChange]:
    """Return the change of each block, in the order of the blocks."""
    modules_by_block: dict[str, list[Delta]] = {}
    for name, delta in deltas.items():
        modules_by_block.setdefault(_name_block(name), []).append(delta)
    changes = []
    for block, modules in modules_by_block.items():
        known = [delta for delta in modules if not delta.depends_on_weight]
        changes.append(
            BlockChange(
                block,
                num_modules=len(modules),
                squared_norm=sum(_inner_product(delta, delta) for delta in known),
                num_unknown=len(modules) - len(known),
            )
        )
    return sorted(changes, key=lambda change: _sort_key(change.block))


def compute_overlaps(first: MeasuredLora, second: MeasuredLora) -> dict[str, float]:
    """Return the cosine between the changes of two LoRAs by block, for blocks that both change."""
    products: dict[str, float] = {}
    for name in first.deltas.keys() & second.deltas.keys():
        one, other = first.deltas[name], second.deltas[name]
        if not one.depends_on_weight and not other.depends_on_weight:
            block = _name_block(name)
            products[block] = products.get(block, 0.0) + _inner_product(one, other)
    norms = [
        {change.block: change.squared_norm**0.5 for change in list_block_changes(lora.deltas)}
        for lora in (first, second)
    ]
    overlaps = {}
    for block in sorted(products, key=_sort_key):
        size = norms[0][block] * norms[1][block]
        if size:
            overlaps[block] = products[block] / size
    return overlaps


def find_lora_findings(lora: MeasuredLora) -> Iterator[Finding]:
    """Yield findings about a single LoRA file."""
    if not lora.deltas:
        yield Finding(
            "lora-texts-only",
            lora.path.name,
            figure=0,
            limit=1,
            text=f"{lora.path.name} changes {format_count(len(lora.text_deltas), 'module')} of text "
            "encoders, and none of the network that draws.",
            meaning="It can only choose among what the model draws already.",
            remedy="Train without --network_train_text_encoder_only.",
        )
        return
    changes = list_block_changes(lora.deltas)
    known = [delta for delta in lora.deltas.values() if not delta.depends_on_weight]
    empty = [delta for delta in known if _inner_product(delta, delta) == 0]
    if known and len(empty) > EMPTY_FRACTION * len(known):
        yield Finding(
            "lora-empty",
            lora.path.name,
            figure=len(empty) / len(known),
            limit=EMPTY_FRACTION,
            text=f"{len(empty)} of {len(known)} modules of {lora.path.name} change nothing: one of their "
            "matrices is zero.",
            meaning="These modules have not been trained: their learning rate was 0, or no step was taken.",
            remedy="Compare --learning_rate and --network_args of the run with the modules that the file "
            "names.",
        )
    total = sum(change.squared_norm for change in changes)
    largest = max(changes, key=lambda change: change.squared_norm)
    if total and len(changes) >= MIN_BLOCKS and largest.squared_norm > ONE_BLOCK * total:
        yield Finding(
            "lora-one-block",
            largest.block,
            figure=largest.squared_norm / total,
            limit=ONE_BLOCK,
            text=f"{largest.squared_norm / total:.0%} of the change of {lora.path.name} is in "
            f"{largest.block}, one of {format_count(len(changes), 'block')}.",
            meaning="A single block that changes so far distorts pictures before the others have learned.",
            remedy="Train with a lower learning rate, or leave out this block with --network_args "
            "exclude_patterns.",
        )


def find_pair_findings(first: MeasuredLora, second: MeasuredLora) -> Iterator[Finding]:
    """Yield findings about two LoRAs that are used together."""
    if not first.deltas.keys() & second.deltas.keys():
        raise CheckpointError(
            f"{second.path} changes no module that {first.path} changes: they are for different models, or "
            "for different parts of one.",
            second.path,
        )
    sizes = [
        sum(change.squared_norm for change in list_block_changes(lora.deltas)) ** 0.5
        for lora in (first, second)
    ]
    small, large = sorted(zip(sizes, (first, second), strict=True), key=lambda pair: pair[0])
    if small[0] and large[0] > LOUD * small[0]:
        yield Finding(
            "loras-loud",
            large[1].path.name,
            figure=large[0] / small[0],
            limit=LOUD,
            text=f"{large[1].path.name} changes the weights {large[0] / small[0]:.1f} times as far as "
            f"{small[1].path.name}.",
            meaning=f"Beside it {small[1].path.name} is hardly seen.",
            remedy=f"Generate with --lora_multiplier below 1 for {large[1].path.name}, or above 1 for "
            f"{small[1].path.name}; compare makes the grid.",
        )
    overlaps = compute_overlaps(first, second)
    block, overlap = max(overlaps.items(), key=lambda item: abs(item[1]), default=("", 0.0))
    if abs(overlap) > OVERLAP:
        effect = (
            "the same direction: together they overshoot"
            if overlap > 0
            else "opposite directions: they cancel"
        )
        yield Finding(
            "loras-overlap",
            block,
            figure=overlap,
            limit=OVERLAP,
            text=f"In {block}, the changes of {first.path.name} and {second.path.name} have a cosine of "
            f"{overlap:.2f}.",
            meaning=f"They pull the same weights in {effect}.",
            remedy="Lower --lora_multiplier of both until samples are clean.",
        )


def _name_block(module: str) -> str:
    """Return the block of a module as a table shows it, such as blocks_3."""
    block = split_block_name(module)
    return OTHER if block is None else f"{block[0]}_{block[1]}"


def _sort_key(block: str) -> tuple[str, int]:
    """Sort blocks by the name of their list, then by number."""
    name, _, number = block.rpartition("_")
    return (name, int(number)) if number.isdigit() else (block, 0)


def _inner_product(first: Delta, second: Delta) -> float:
    """Return the inner product of two changes of the same weight."""
    pair = [_split_product(delta) for delta in (first, second)]
    if pair[0] is not None and pair[1] is not None:
        (up, down), (other_up, other_down) = pair[0], pair[1]
        # sum((U D) * (V E)) = sum((U^T V) * (D E^T)), without the matrices of the weight's size
        return float(((up.mT @ other_up) * (down @ other_down.mT)).sum())
    changes = [delta.compute_change(CPU) for delta in (first, second)]
    if changes[0] is None or changes[1] is None:
        return 0.0
    return float((changes[0] * changes[1]).sum())


def _split_product(delta: Delta) -> tuple[Tensor, Tensor] | None:
    """Return the scaled up matrix and the down matrix of a plain LoRA in float64; None for other kinds."""
    if not LORA_FACTORS.issuperset(delta.factors) or "lora_up.weight" not in delta.factors:
        return None
    up, down = (delta.factors[f"lora_{name}.weight"].double().flatten(1) for name in ("up", "down"))
    return up * compute_scaling(delta.factors), down
