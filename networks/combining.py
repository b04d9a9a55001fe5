"""Add up LoRAs: exactly, with the sum of their ranks, or into the nearest LoRA of a given rank."""
# Letters: R rank

from collections.abc import Mapping, Sequence
from logging import getLogger
from pathlib import Path

import torch
from torch import Tensor

from modules.atomic_write import save_tensors
from modules.console import as_size, show_box
from modules.errors import CheckpointError
from networks.deltas import LORA, Factors, group_by_module, strength
from networks.hashes import add_hashes
from networks.key_formats import OURS
from networks.loading import LoraFile, family_of
from networks.lora_network import prefix_of
from networks.module_names import choose_family, read_family
from networks.names.layouts import TRAINED_ON, FamilyNames
from networks.parts import fuse
from networks.renaming import rename_to_aliases

logger = getLogger(__name__)


def add_up(
    loras: Sequence[LoraFile], ratios: Sequence[float], concat: bool, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Return sum(ratio * alpha / rank * up @ down) of all files as a LoRA, module by module.

    concat: all ranks, exact. Otherwise the best approximation of each module's sum at the rank that it has in
    the first file with it. Raises CheckpointError for anything but plain LoRAs, for other sizes and for
    LoRAs of several models.
    """
    _refuse_several_models(loras)
    modules: dict[str, list[tuple[LoraFile, Factors, float]]] = {}
    for lora, ratio in zip(loras, ratios, strict=True):
        family = lora.family()
        tensors = {**fuse(lora.tensors, family=family), **lora.text_tensors}
        for name, factors in group_by_module(tensors).items():
            if set(factors) - {"alpha"} != set(LORA):
                raise CheckpointError(
                    f"{lora.path} cannot be merged into a LoRA: {name} has {', '.join(sorted(factors))}.\n"
                    "  Only plain LoRAs can; merge it into the model instead.",
                    lora.path,
                )
            modules.setdefault(name, []).append((lora, factors, ratio))
    merged: dict[str, Tensor] = {}
    for name, parts in modules.items():
        down, up = _sum(name, parts, device)
        if not concat and len(parts) > 1:
            down, up = truncate(down, up, len(parts[0][1][LORA[0]]))
        merged[f"{name}.{LORA[0]}"] = down.to("cpu", dtype).contiguous()
        merged[f"{name}.{LORA[1]}"] = up.to("cpu", dtype).contiguous()
        merged[f"{name}.alpha"] = torch.tensor(float(len(down)))
    return merged


def _refuse_several_models(loras: Sequence[LoraFile]) -> None:
    known = [(lora, made) for lora in loras if (made := read_family(lora.metadata)) is not None]
    for lora, made in known[1:]:
        first, wanted = known[0]
        if made is not wanted:
            raise CheckpointError(
                f"{lora.path} is for {made.name}, {first.path} for {wanted.name}: no model could use their "
                "sum.\n  Give LoRAs for one model.",
                lora.path,
            )


def _sum(
    name: str, parts: Sequence[tuple[LoraFile, Factors, float]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return down R x in and up out x R of a sum, whose ranks stand side by side; alpha is the rank."""
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    for lora, factors, ratio in parts:
        down, up = (factors[part].to(device, torch.float32) for part in LORA)
        if downs and (down[0].numel(), len(up)) == (downs[0][0].numel(), len(ups[0])):
            # a matrix may have the shape of a 1x1 convolution
            down, up = down.reshape(-1, *downs[0].shape[1:]), up.reshape(*up.shape[:2], *ups[0].shape[2:])
        if downs and (down.shape[1:], len(up)) != (downs[0].shape[1:], len(ups[0])):
            raise CheckpointError(
                f"{lora.path} does not fit {parts[0][0].path}: {name} changes {len(up)} x {down.shape[1]} "
                f"there, {len(ups[0])} x {downs[0].shape[1]} here. Give LoRAs for one model.",
                lora.path,
            )
        scale = ratio * strength(factors)
        root = abs(scale) ** 0.5  # on both, so that neither gets too small for 16 bits
        downs.append(down * (root if scale >= 0 else -root))
        ups.append(up * root)
    return torch.cat(downs), torch.cat(ups, 1)


def truncate(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best approximation of up @ down at this rank, without computing the product.

    down: R x in (x kernel). up: out x R (x 1 x 1). Eckart and Young 1936, by two QR decompositions.
    """
    left, small_left = torch.linalg.qr(up.flatten(1))
    right, small_right = torch.linalg.qr(down.flatten(1).T)
    u, s, vh = torch.linalg.svd(small_left @ small_right.T, full_matrices=False)
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    new_up, new_down = left @ (u[:, :rank] * root), (root[:, None] * vh[:rank]) @ right.T
    return new_down.unflatten(1, down.shape[1:]), new_up.reshape(*new_up.shape, *up.shape[2:])


def save_sum(
    output: Path,
    tensors: Mapping[str, Tensor],
    loras: Sequence[LoraFile],
    ratios: Sequence[float],
    no_metadata: bool,
) -> None:
    """Write a merged LoRA with metadata that name what it is made of."""
    metadata = made_of(tensors, loras, no_metadata)
    tensors = as_known(tensors, read_family(metadata))
    save_tensors(output, tensors, add_hashes(tensors, metadata))
    rows = [
        ("LoRAs", "\n".join(f"{one.path}, strength {r:g}" for one, r in zip(loras, ratios, strict=True))),
        ("result", f"{output} ({as_size(output.stat().st_size)})"),
        ("rank", metadata["ss_network_dim"]),
    ]
    show_box("The LoRAs are merged into one", rows)


def as_known(tensors: Mapping[str, Tensor], family: FamilyNames | None) -> Mapping[str, Tensor]:
    """Return a LoRA under the names that other tools of its family know."""
    by_aliases = family is not None and family.always_underscored == "aliases"
    return rename_to_aliases(tensors, family) if family is not None and by_aliases else tensors


def made_of(tensors: Mapping[str, Tensor], loras: Sequence[LoraFile], no_metadata: bool) -> dict[str, str]:
    """Return the metadata of a LoRA that is made of others."""
    ranks = sorted({len(one) for name, one in tensors.items() if name.endswith(LORA[0])})
    text = str(ranks[0]) if len(ranks) == 1 else "Dynamic"
    names = {name.partition(".")[0] for name in tensors}
    in_dit = [name.removeprefix(OURS) for name in names if f"{prefix_of(name)}_" == OURS]
    version = next((v for one in loras if (v := one.metadata.get(TRAINED_ON))), None)
    made = next((found for one in loras if (found := read_family(one.metadata)) is not None), None)
    hint = "flux" if made is None else made.name
    family = choose_family(in_dit, hint) or made
    if made is None and family is not None and family.text_width:
        family = family_of(group_by_module(tensors))
    module = "networks.lora_flux" if family is None else f"networks.lora_{family.name}"
    own = "flux1" if family is None or family.name == "flux" else family.written_version or family.name
    metadata = {
        "ss_network_module": "networks.lora" if family is not None and family.written_version else module,
        "ss_network_dim": text,
        "ss_network_alpha": text,
        "ss_network_args": "{}",
        TRAINED_ON: version or own,
    }
    if not no_metadata:
        metadata["modelspec.merged_from"] = ", ".join(one.path.name for one in loras)
        title = next((t for one in loras if (t := one.metadata.get("modelspec.architecture"))), None)
        metadata |= {} if title is None else {"modelspec.architecture": title}
    return metadata
