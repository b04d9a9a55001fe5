"""The change of a model's weights by a LoRA, measured by block: its norm, and the cosine of two changes."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from networks.block_strengths import split_block_name
from networks.delta import Delta
from networks.module_factors import compute_scaling
from networks.typed_strengths import OTHER

CPU = torch.device("cpu")
LORA_FACTORS = frozenset({"lora_up.weight", "lora_down.weight", "alpha"})


@dataclass(frozen=True)
class BlockChange:
    """The change of one block's weights by a LoRA."""

    block: str  # such as "blocks_3"; "other" for modules outside of numbered blocks
    num_modules: int
    squared_norm: float  # of the changes of its modules, at multiplier 1
    num_unknown: int = 0  # modules whose change depends on the weights of the model (DoRA, OFT)


def list_block_changes(deltas: Mapping[str, Delta]) -> list[BlockChange]:
    """Return the change of each block, in the order of the blocks."""
    modules_by_block: dict[str, list[Delta]] = {}
    for name, delta in deltas.items():
        modules_by_block.setdefault(name_block(name), []).append(delta)
    changes = []
    for block, modules in modules_by_block.items():
        known = [delta for delta in modules if not delta.depends_on_weight]
        changes.append(
            BlockChange(
                block,
                num_modules=len(modules),
                squared_norm=sum(compute_inner_product(delta, delta) for delta in known),
                num_unknown=len(modules) - len(known),
            )
        )
    return sorted(changes, key=lambda change: get_block_order(change.block))


def compute_overlaps(first: Mapping[str, Delta], second: Mapping[str, Delta]) -> dict[str, float]:
    """Return the cosine between the changes of two LoRAs by block, for blocks that both change."""
    products: dict[str, float] = {}
    for name in first.keys() & second.keys():
        one, other = first[name], second[name]
        if not one.depends_on_weight and not other.depends_on_weight:
            block = name_block(name)
            products[block] = products.get(block, 0.0) + compute_inner_product(one, other)
    norms = [
        {change.block: change.squared_norm**0.5 for change in list_block_changes(deltas)}
        for deltas in (first, second)
    ]
    overlaps = {}
    for block in sorted(products, key=get_block_order):
        size = norms[0][block] * norms[1][block]
        if size:
            overlaps[block] = products[block] / size
    return overlaps


def compute_shared_parts(first: Mapping[str, Delta], second: Mapping[str, Delta]) -> dict[str, float]:
    """Return by block the part of the first LoRA's change that lies in directions that the second changes.

    The directions are the column and the row space of the second change of each weight. A part is a fraction
    of the squared norm: 1 if the second LoRA changes all that the first one changes, in any way, and about
    the product of rank / width of both sides for independent LoRAs. Only plain LoRAs have few directions, so
    blocks with modules of other kinds are left out.
    """
    shared: dict[str, float] = {}
    whole: dict[str, float] = {}
    other_kinds = set()
    for name in first.keys() & second.keys():
        block = name_block(name)
        one, other = _split_product(first[name]), _split_product(second[name])
        if one is None or other is None:
            other_kinds.add(block)
            continue
        up, down = one
        columns, rows = _find_directions(*other)
        # sum((C^T U D R)^2) without the matrix of the weight's size
        projected = (columns.mT @ up) @ (down @ rows)
        shared[block] = shared.get(block, 0.0) + float(projected.square().sum())
        whole[block] = whole.get(block, 0.0) + float(((up.mT @ up) * (down @ down.mT)).sum())
    return {
        block: shared[block] / whole[block]
        for block in sorted(shared, key=get_block_order)
        if whole[block] and block not in other_kinds
    }


def _find_directions(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthonormal columns that span the column space of up @ down, and those of its row space."""
    left, left_core = torch.linalg.qr(up)
    right, right_core = torch.linalg.qr(down.mT)
    inner_left, sizes, inner_right = torch.linalg.svd(left_core @ right_core.mT)
    rank = int((sizes > 1e-9 * sizes.max()).sum()) if sizes.numel() and float(sizes.max()) else 0
    return left @ inner_left[:, :rank], right @ inner_right.mT[:, :rank]


def name_block(module: str) -> str:
    """Return the block of a module as a table shows it, such as blocks_3."""
    block = split_block_name(module)
    return OTHER if block is None else f"{block[0]}_{block[1]}"


def get_block_order(block: str) -> tuple[str, int]:
    """Return the key that sorts blocks by the name of their list, then by number."""
    name, _, number = block.rpartition("_")
    return (name, int(number)) if number.isdigit() else (block, 0)


def compute_inner_product(first: Delta, second: Delta) -> float:
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
