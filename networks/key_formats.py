"""Dialects of tensor names in LoRA files: recognise them, convert to ours, write the other common one.

ours        lora_unet_blocks_0_self_attn_q.lora_down.weight   .lora_up.weight   .alpha other
diffusion_model.blocks.0.self_attn.q.lora_A.weight   .lora_B.weight        (diffusion-pipe, ComfyUI; alpha is
optional) diffusers   transformer.blocks.0.attn1.to_q.lora_A.weight, base_model.model. ...       (also PEFT,
also .lora.down / .lora.up) LyCORIS     lycoris_blocks_0_self_attn_q.hada_w1_a ...
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from networks.deltas import LORA, PARTS, group_by_module, rank_of, strength
from networks.module_names import alias, choose_family, module_path, underscored

OURS = "lora_unet_"
OTHER = "diffusion_model."
_UNDERSCORED = {OURS: "ours", "lycoris_": "LyCORIS", "lora_transformer_": "OneTrainer"}
_DOTTED = {
    "base_model.model.": "PEFT",
    "model.diffusion_model.": "other",
    OTHER: "other",
    "transformer.": "diffusers",
    "unet.": "diffusers",
}
_TEXT_ENCODERS = ("lora_te", "lycoris_te", "text_encoder", "te1", "te2", "cond_stage_model.", "conditioner.")
_ENDINGS = {
    ".lora_A.weight": "lora_down.weight",
    ".lora_B.weight": "lora_up.weight",
    ".lora_B.bias": "lora_up.bias",
    ".lora_A.default.weight": "lora_down.weight",
    ".lora_B.default.weight": "lora_up.weight",
    ".lora.down.weight": "lora_down.weight",
    ".lora.up.weight": "lora_up.weight",
    ".lora_magnitude_vector": "dora_scale",
    ".lora_magnitude_vector.weight": "dora_scale",
    **{f".{part}": part for part in PARTS},
}
_BY_LENGTH = sorted(_ENDINGS, key=len, reverse=True)


@dataclass(frozen=True)
class NativeTensors:
    """Tensors of a LoRA file under our names, and the keys that have none."""

    tensors: dict[str, Tensor]
    dialect: str  # for messages
    text_encoder: tuple[str, ...]  # keys that change a text encoder
    unknown: tuple[str, ...]  # keys that are not part of a LoRA, or are duplicates


def to_native(tensors: Mapping[str, Tensor], family_hint: str | None = None) -> NativeTensors:
    """Rename the tensors of any dialect to our names. Values are unchanged; a missing alpha stays missing."""
    split = {key: _split(key) for key in tensors}
    found = {key: place for key, place in split.items() if place is not None}
    names = rename_modules((module for module, _, _ in found.values()), family_hint)
    keys: dict[str, str] = {}  # our name -> key in the file; a second key of one name is reported
    for key, (module, part, _) in found.items():
        keys.setdefault(f"{OURS}{names[module]}.{part}", key)
    native = {name: tensors[key] for name, key in keys.items()}
    dialects = sorted({dialect for _, _, dialect in found.values()})
    used = set(keys.values())
    rest = [key for key in tensors if key not in used]
    texts = tuple(key for key in rest if key.startswith(_TEXT_ENCODERS))
    return NativeTensors(
        native, " + ".join(dialects), texts, tuple(key for key in rest if not key.startswith(_TEXT_ENCODERS))
    )


def rename_modules(modules: Iterable[str], family_hint: str | None = None) -> dict[str, str]:
    """Map underscored names of any layout to those of our layout.

    The names are compared together, because only all of them show which layout it is.
    """
    names = list(dict.fromkeys(modules))
    family = choose_family(names, family_hint)
    return {name: name if family is None else alias(name, family) for name in names}


def module_of_tensor(name: str) -> tuple[str, str]:
    """A checkpoint's `model.diffusion_model.blocks.0.ffn.0.weight` -> (`blocks_0_ffn_0`, `weight`)."""
    path, _, leaf = name.rpartition(".")
    for prefix in ("model.diffusion_model.", "model.model.", OTHER, "transformer.", "module.", "_orig_mod."):
        path = path.removeprefix(prefix)
    return underscored(path), leaf


def _split(key: str) -> tuple[str, str, str] | None:
    """Split a key into (underscored module, our part, dialect); None if it is not of a LoRA for a DiT."""
    ending = next((ending for ending in _BY_LENGTH if key.endswith(ending)), None)
    if ending is None or key.startswith(_TEXT_ENCODERS):
        return None
    module, part = key.removesuffix(ending), _ENDINGS[ending]
    for prefix, dialect in _UNDERSCORED.items():
        if module.startswith(prefix):
            return module.removeprefix(prefix), part, dialect
    dialects = [dialect for prefix, dialect in _DOTTED.items() if module.startswith(prefix)]
    for prefix in _DOTTED:
        module = module.removeprefix(prefix)
    return underscored(module), part, dialects[0] if dialects else "without prefix"


def with_rank_as_alpha(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in our order; a LoRA without alpha gets alpha = rank, an integer."""
    completed = {}
    for module, factors in group_by_module(tensors).items():
        if "alpha" not in factors and LORA[0] in factors:
            completed[f"{module}.alpha"] = torch.tensor(rank_of(factors), dtype=torch.int64)
        completed.update({f"{module}.{part}": tensor for part, tensor in factors.items()})
    return completed


@dataclass(frozen=True)
class OtherTensors:
    """A LoRA in the other dialect, and the modules that have no form there, each with the reason."""

    tensors: dict[str, Tensor]
    left_out: dict[str, str]


def to_other(tensors: Mapping[str, Tensor], family_hint: str | None = None) -> OtherTensors:
    """Convert our names to `diffusion_model.<path>.lora_A/lora_B.weight`.

    Both factors are multiplied by sqrt(alpha / rank); alpha is left out. Module paths come from the lists of
    the families' real modules; unknown names are left out and reported.
    """
    modules = {name.removeprefix(OURS): factors for name, factors in group_by_module(tensors).items()}
    family = choose_family(modules, family_hint)
    written: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    for name, factors in modules.items():
        path = None if family is None else module_path(name, family)
        if path is None:
            left_out[OURS + name] = "no known model has a module with this name"
        elif set(factors) - {"alpha", *LORA, "diff", "diff_b"}:
            left_out[OURS + name] = (
                f"{', '.join(sorted(set(factors) - {'alpha'}))} has no form in this dialect"
            )
        else:
            written.update({f"{OTHER}{path}.{part}": tensor for part, tensor in _folded(factors).items()})
    return OtherTensors(written, left_out)


def _folded(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold alpha / rank into the two LoRA factors, half (its root) in each; keep whole differences."""
    scale = strength(factors)
    halves = {
        LORA[0]: ("lora_A.weight", math.sqrt(abs(scale))),
        LORA[1]: ("lora_B.weight", math.copysign(math.sqrt(abs(scale)), scale)),
    }
    folded = {
        name: (factors[part].float() * half).to(factors[part].dtype)
        for part, (name, half) in halves.items()
        if part in factors
    }
    return folded | {part: factors[part] for part in ("diff", "diff_b") if part in factors}
