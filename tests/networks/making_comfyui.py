"""Which tensors of a LoRA file ComfyUI reads, and what they change: its rule, for models under its names."""
# Source: comfy/lora.py and comfy/weight_adapter in the repository Comfy-Org/ComfyUI

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Rows = slice | None  # of a weight; None: all
Places = dict[str, tuple[str, Rows]]  # how a file may call a module -> the tensor of the model, its rows
TEXT = {  # of FLUX: prefix of underscored names -> what stands before paths
    "lora_te1_": ("text_encoders.clip_l.transformer.", "text_encoder."),
    "lora_te3_": ("text_encoders.t5xxl.transformer.",),
}


@dataclass
class Read:
    """What ComfyUI takes from a file."""

    changes: dict[str, Tensor] = field(default_factory=dict)  # tensor of the model -> what is added to it
    unread: set[str] = field(default_factory=set)  # "lora key not loaded" in its console


def places_of(state: Mapping[str, Tensor], is_hunyuan: bool = False, parts: Places | None = None) -> Places:
    """How a file may call the modules of a transformer, whose tensors are `diffusion_model.` + its names.

    parts: names in diffusers' layout, of models that it takes those for.
    """
    found: Places = {}
    for name in state:
        path = name.removesuffix(".weight")
        if path == name:
            found[f"diffusion_model.{name}"] = name, None
            continue
        found["lora_unet_" + path.replace(".", "_")] = name, None
        found[f"diffusion_model.{path}"] = name, None
        if is_hunyuan:
            for theirs, others in (
                *(
                    ("_mod.lin.", "_mod.linear."),
                    ("_attn.qkv.", "_attn_qkv."),
                    ("_attn.proj.", "_attn_proj."),
                ),
                *(
                    ("mlp.0.", "mlp.fc1."),
                    ("mlp.2.", "mlp.fc2."),
                    (".modulation.lin.", ".modulation.linear."),
                ),
            ):
                path = f"{path}.".replace(theirs, others)[:-1]
            found[f"diffusion_model.{path}"] = found[f"transformer.{path}"] = name, None
    return found | (parts or {})


def text_places(prefix: str, state: Mapping[str, Tensor]) -> Places:
    """The same for FLUX's CLIP-L (lora_te1_) or T5 (lora_te3_)."""
    return {
        start + (path.replace(".", "_") if start == prefix else path): (name, None)
        for name in state
        if (path := name.removesuffix(".weight")) != name
        for start in (prefix, *TEXT[prefix])
    }


def read(file: Mapping[str, Tensor], places: Places, state: Mapping[str, Tensor]) -> Read:
    """Return what a file adds to the tensors of a model.

    For DoRA the weight is given its new norms as published, from the norms of the changed weight: what
    ComfyUI does there is no question of names.
    """
    found, used = Read(), set[str]()
    for name, (target, rows) in places.items():
        own = {key.removeprefix(f"{name}."): one for key, one in file.items() if key.startswith(f"{name}.")}
        change = _change(own)
        if change is None:
            continue
        used |= {f"{name}.{part}" for part in own if part in _KNOWN}
        total = found.changes.setdefault(target, torch.zeros_like(state[target]))
        part = slice(0, len(total)) if rows is None else rows
        if "dora_scale" in own:
            new = state[target][part] + change
            kept = 0 if len(own["dora_scale"]) == len(new) else 1
            change = new / new.norm(dim=1 - kept, keepdim=True) * own["dora_scale"] - state[target][part]
        total[part] += change.reshape(total[part].shape)
    found.unread = file.keys() - used
    return found


_KNOWN = {
    *("alpha", "dora_scale", "diff", "lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
}


def _change(own: Mapping[str, Tensor]) -> Tensor | None:
    alpha = None if "alpha" not in own else float(own["alpha"])

    def scaled(product: Tensor, rank: int) -> Tensor:
        return product if alpha is None else product * alpha / rank

    for down, up in (("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")):
        if up in own:
            return scaled(own[up] @ own[down], len(own[down]))
    if "hada_w1_a" in own:
        first, second = own["hada_w1_a"] @ own["hada_w1_b"], own["hada_w2_a"] @ own["hada_w2_b"]
        return scaled(first * second, len(own["hada_w1_b"]))
    if "lokr_w1" in own:
        if "lokr_w2" in own:
            return torch.kron(own["lokr_w1"], own["lokr_w2"])
        second = own["lokr_w2_a"] @ own["lokr_w2_b"]
        return scaled(torch.kron(own["lokr_w1"], second), len(own["lokr_w2_b"]))
    return own.get("diff")
