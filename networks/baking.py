"""Convert LoHas, LoKrs and DoRAs to plain LoRAs, for tools that do not know these."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path

import torch
from torch import Tensor

from modules.checkpoints.dialects import cut_parts, join_parts
from modules.checkpoints.dits import bare_names
from modules.checkpoints.opening import Checkpoint, open_checkpoint, plain_sources
from modules.checkpoints.quantising import in_values
from modules.console import count_of
from modules.contract.loading import TensorSource
from modules.errors import CheckpointError, OptionError
from networks import deltas
from networks.apply import Change
from networks.deltas import CPU, DORA, LORA, META, Factors, weight_delta, without_alpha
from networks.extracting import decompose_change
from networks.key_formats import module_of_tensor
from networks.loading import LoraFile, LoraUse
from networks.lora_network import prefix_of
from networks.metadata import DORA_FORM, FROZEN_NORMS
from networks.module_names import alias
from networks.names.layouts import OURS, SWAPPED, FamilyNames, joined_tensors, tensor_patterns
from networks.text_loras import is_whole, pieces_of
from networks.writing import in_own_form

logger = getLogger(__name__)
OTHER_KINDS = {DORA, "hada_w1_a", "lokr_w1", "lokr_w1_a", "lora_mid.weight"}
_PLAIN = "networks.lora"
A_LOT = 0.1  # loss above which messages advise a higher rank


@dataclass(frozen=True)
class Baking:
    """Settings of the conversion: the rank of plain LoRAs, and the model that a DoRA was trained for.

    Without a rank, DoRAs stay DoRAs, and only the norms that their magnitudes refer to change.
    """

    rank: int | None
    device: torch.device
    models: Sequence[Path] = ()  # its transformer, then its text encoders


# module as in LoRA files (without prefix if the file does not name the network) -> its weights
Weights = Mapping[str, Sequence[tuple[Checkpoint, TensorSource]]]


@torch.no_grad()
def bake(lora: LoraFile, family: FamilyNames | None, baking: Baking) -> tuple[LoraFile, str]:
    """Replace each LoHa, LoKr and DoRA by the best LoRA of a given rank for its change at multiplier 1;
    return the LoRA, and a text about the loss.

    Other modules stay as they are. Memory: the LoRA, and one weight with its change in float32. Raises
    OptionError if there is nothing to replace, or a DoRA without its model, CheckpointError if the model does
    not fit.
    """
    assert baking.rank is not None
    # a DoRA for parts of a fused weight becomes one for the whole weight, as the model has it
    is_dora = any(name.endswith(DORA) for name in lora.tensors)
    own = in_own_form(lora.tensors, family) if is_dora and family is not None else lora.tensors
    modules = deltas.group_by_module({**own, **lora.text_tensors})
    found = {name: factors for name, factors in modules.items() if factors.keys() & OTHER_KINDS}
    if not found:
        raise OptionError(
            f"--bake: {lora.path} has plain LoRAs alone, whose rank stays as it is. Leave --bake out"
        )
    decomposed = [name for name, factors in found.items() if DORA in factors]
    if decomposed and not baking.models:
        raise OptionError(
            f"--bake: {lora.path} is a DoRA ({decomposed[0]}), whose change depends on the weights that it "
            "was trained for. Add --dit with the model's file; after it those of the text encoders that it "
            "changes"
        )
    losses: dict[str, tuple[float, float]] = {}  # module -> norms of the change, and of what is lost of it
    with _open_weights(baking.models if decomposed else (), family) as weights:
        for name, factors in found.items():
            change = _change(name, factors, lora, weights, baking.device)
            modules[name], losses[name] = _as_lora(name, factors, change, baking.rank)
    ranks = {len(factors[LORA[0]]) for factors in modules.values() if LORA[0] in factors}
    shown = str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic"
    module = lora.metadata.get("ss_network_module", _PLAIN)
    metadata = {
        **lora.metadata,
        "ss_network_module": module if module.startswith(_PLAIN) else _PLAIN,
        "ss_network_dim": shown,
        "ss_network_alpha": shown,
        "ss_network_args": "{}",
    }
    metadata.pop(DORA_FORM, None)
    return _with(lora, modules, metadata), _in_words(losses, len(modules), baking.rank)


@torch.no_grad()
def with_norms(
    lora: LoraFile, family: FamilyNames | None, baking: Baking | None, are_frozen: bool, target: str
) -> LoraFile:
    """Convert a DoRA's magnitudes by output to division by the norms of the frozen weights, as in ComfyUI, or
    of the changed weights (`are_frozen` = False). Other LoRAs are returned unchanged.

    m' = m * |W| / |W + dW|, row by row, is exact; the metadata are marked. target: for messages.
    Raises OptionError if a model is given for nothing, CheckpointError if one is missing or does not fit.
    """
    tensors = {**lora.tensors, **lora.text_tensors}
    is_dora = any(name.endswith(DORA) and len(one) == one.numel() for name, one in tensors.items())
    if baking is not None and (not is_dora or lora.has_frozen_norms == are_frozen):
        state = "no DoRA by output" if not is_dora else "a DoRA of this form already"
        raise OptionError(
            f"--dit: {lora.path} is {state}, so that --target {target} needs no model. Leave --dit out"
        )
    if not is_dora or lora.has_frozen_norms == are_frozen or (baking is None and target == "default"):
        return lora
    if baking is None and lora.has_frozen_norms:
        raise CheckpointError(
            f"{lora.path} is a DoRA in ComfyUI's form, which others read otherwise.\n"
            "  Add --dit with the model's file; after it those of the text encoders that it changes.",
            lora.path,
        )
    if baking is None:
        logger.warning(
            f"{lora.path} is a DoRA: ComfyUI divides its magnitudes by other norms, which makes it 3 to 24 % "
            "different there. Add --dit with the model that it was trained for: then it is exact"
        )
        return lora
    return _with_norms(lora, family, baking, are_frozen)


def _with_norms(lora: LoraFile, family: FamilyNames | None, baking: Baking, are_frozen: bool) -> LoraFile:
    own = lora.tensors if family is None else in_own_form(lora.tensors, family)
    modules = deltas.group_by_module({**own, **lora.text_tensors})
    with _open_weights(baking.models, family) as weights:
        for name, factors in modules.items():
            if DORA not in factors or deltas.has_input_magnitudes(factors):
                continue
            change = weight_delta(factors, baking.device)
            assert change is not None
            weight, path = _weight_of(name, len(change), lora, weights)
            Change(LoraUse(lora), factors).fit(None, weight, name, str(path))
            frozen = weight.to(baking.device, torch.float32)
            share = (deltas.norms_of(frozen) / deltas.norms_of(frozen + change.reshape(frozen.shape))).cpu()
            magnitudes = factors[DORA].float().reshape(share.shape)
            # float32: rounding to 16 bits here would add a loss
            modules[name] = {**factors, DORA: magnitudes * share if are_frozen else magnitudes / share}
    metadata = {key: value for key, value in lora.metadata.items() if key != DORA_FORM}
    return _with(lora, modules, metadata | ({DORA_FORM: FROZEN_NORMS} if are_frozen else {}))


def _with(lora: LoraFile, modules: Mapping[str, Factors], metadata: Mapping[str, str]) -> LoraFile:
    texts = deltas.ungroup({name: one for name, one in modules.items() if not name.startswith(OURS)})
    own = deltas.ungroup({name: one for name, one in modules.items() if name.startswith(OURS)})
    return replace(lora, tensors=own, text_tensors=texts, metadata=metadata)


def _as_lora(
    name: str, factors: Factors, change: Tensor, rank: int
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """Return the best LoRA for a change, out x in (x kernel), and the norms of the change and the loss."""
    dtype = next(one.dtype for part, one in factors.items() if part != "alpha")
    flat = change.flatten(1)
    down, up = decompose_change(flat, rank, 1.0, name)
    root = up.norm(dim=0).clamp(min=torch.finfo(torch.float32).tiny).sqrt()  # equal size: for 16 bits
    down, up = (down * root[:, None]).to(dtype), (up / root).to(dtype)
    size = float(flat.norm())
    lost = float(flat.addmm_(up.float(), down.float(), alpha=-1).norm())
    made = {
        LORA[0]: down.unflatten(1, change.shape[1:]).cpu().contiguous(),
        LORA[1]: up.reshape(*up.shape, *[1] * (change.ndim - 2)).cpu().contiguous(),
        "alpha": torch.tensor(float(len(down))),
    }
    bias = deltas.bias_delta(factors, CPU)
    return (made if bias is None else {**made, "diff_b": bias.to(dtype)}), (size, lost)


def _change(name: str, factors: Factors, lora: LoraFile, weights: Weights, device: torch.device) -> Tensor:
    """Return the addition of factors to their weight at multiplier 1, float32."""
    is_dora = DORA in factors
    change = weight_delta(without_alpha(factors), META) if is_dora else weight_delta(factors, device)
    assert change is not None
    if not is_dora:
        return change
    weight, path = _weight_of(name, len(change), lora, weights)
    one = Change(LoraUse(lora), factors).fit(None, weight, name, str(path))
    total = torch.zeros(weight.shape, device=device)
    one.add_to(total, None, weight.to(device))
    return total


def _weight_of(name: str, rows: int, lora: LoraFile, weights: Weights) -> tuple[Tensor, Path]:
    """Return the weight that a DoRA module changes, and its file. Raises CheckpointError if it is missing."""
    alone = name.replace("lora_te1_", "lora_te_", 1)  # Stable Diffusion 1 and 2 have one encoder
    names = (name, alone, name.removeprefix(f"{prefix_of(name)}_"))
    for checkpoint, source in (each for one in dict.fromkeys(names) for each in weights.get(one, ())):
        # text encoders in files of their own share names
        if len(weight := source.make([checkpoint.read(one) for one in source.names])) == rows:
            break
    else:
        raise CheckpointError(
            f"{lora.path}: the weight that {name} was trained for is not in the files of --dit.\n  Give the "
            "model that the DoRA was trained for, and after it the files of text encoders that it changes.",
            lora.path,
        )
    return weight, checkpoint.path


@contextmanager
def _open_weights(paths: Sequence[Path], family: FamilyNames | None) -> Iterator[Weights]:
    """Open model files of any layout; only their headers are read."""
    found: dict[str, list[tuple[Checkpoint, TensorSource]]] = {}
    with ExitStack() as stack:
        for path in paths:
            opened = in_values(stack.enter_context(open_checkpoint(path)))
            bare = bare_names(opened)
            # text encoders inside a whole checkpoint, by their names in LoRA files
            texts = (
                (opened, f"{piece.network}_{piece.name}", TensorSource((name,), piece.of))
                for name in (opened.tensors if is_whole(opened.tensors) else ())
                for piece in pieces_of(name)
                if piece.network
            )
            # our names -> how their tensors are made from the file's, as far as the family's lists go
            sources = plain_sources(bare)
            if family is not None:
                turned = [part for part in family.parts if part.index == SWAPPED]
                swapped = [f"{one.ours}.weight" for one in turned if f"{one.theirs}.weight" in sources]
                joined = join_parts(sources, tensor_patterns(family), swapped)
                sources = cut_parts(joined, joined_tensors(family))
            of_network = ((bare, *each) for each in sources.items())
            for checkpoint, name, source in (*texts, *of_network):
                module, leaf = module_of_tensor(name)
                if leaf == "weight":
                    module = module if family is None else alias(module, family)
                    found.setdefault(module, []).append((checkpoint, source))
        yield found


def _in_words(losses: Mapping[str, tuple[float, float]], modules: int, rank: int) -> str:
    """Describe the loss as relative Frobenius norms: of all modules together, and of the worst one."""
    shares = {name: lost / size if size else 0.0 for name, (size, lost) in losses.items()}
    worst = max(shares, key=lambda name: shares[name])
    whole = math.hypot(*(size for size, _ in losses.values()))
    share = math.hypot(*(lost for _, lost in losses.values())) / whole if whole else 0.0
    more = "; a higher rank loses less" if share > A_LOT else ""
    return (
        f"{len(losses)} of {count_of(modules, 'module')} at rank {rank}: {100 * share:.2g} % of the change "
        f"is lost, at most {100 * shares[worst]:.2g} % ({worst}){more}"
    )
