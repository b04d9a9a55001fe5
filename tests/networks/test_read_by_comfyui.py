"""Files of convert_lora.py --target other are read whole by ComfyUI, by its rule, and change the same."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert_lora
from networks.apply import LoraPatch
from networks.loading import WeightedLora, read_lora
from tests.ltx_2.tiny_dit import dit_state
from tests.tiny import (
    flux,
    flux_2,
    flux_3,
    hunyuan_dit,
    hunyuan_image,
    krea2,
    lumina,
    qwen_image,
    wan_dit,
    z_image,
)
from tests.tiny.loras import unused

# Source: comfy/lora.py and comfy/weight_adapter in the repository Comfy-Org/ComfyUI


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

    DoRA by output goes by the norms of the frozen weight, by input by those of the changed one, each for the
    rows that the name stands for.
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
            old, new = state[target][part], state[target][part] + change
            is_by_output = len(own["dora_scale"]) == len(new)
            norms = old.norm(dim=1, keepdim=True) if is_by_output else new.norm(dim=0, keepdim=True)
            change = new * (own["dora_scale"] / norms) - old
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


RANK = 2
KINDS = ("LoRA", "LoHa", "LoKr", "whole LoKr", "DoRA", "difference")


@dataclass(frozen=True)
class Model:
    state: Mapping[str, Tensor]  # under our names
    there: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict  # under those of ComfyUI
    is_hunyuan: bool = False
    parts: Callable[[Mapping[str, Tensor]], Places] = lambda state: {}


def flux_parts(state: Mapping[str, Tensor]) -> Places:
    dim, found = len(state["img_in.weight"]), Places()
    for name, weight in state.items():
        theirs = flux.diffusers_parts(name)
        split_sizes = [dim] * (len(theirs) - 1)
        start = 0
        for part, rows in zip(theirs, [*split_sizes, len(weight) - sum(split_sizes)], strict=True):
            found[f"transformer.{part.removesuffix('.weight')}"] = name, slice(start, start + rows)
            start += rows
    return found


def z_image_parts(state: Mapping[str, Tensor]) -> Places:
    """Released names, which ComfyUI takes for Z-Image too: q, k and v are rows of one weight."""
    found = Places()
    for name, weight in state.items():
        path = name.removesuffix(".weight")
        if path.endswith(".qkv"):
            rows = len(weight) // 3
            places = {f"to_{x}": slice(n * rows, (n + 1) * rows) for n, x in enumerate("qkv")}
            found |= {f"diffusion_model.{path[:-3]}{x}": (name, place) for x, place in places.items()}
        elif path.endswith("attention.out"):
            found[f"diffusion_model.{path[:-3]}to_out.0"] = name, None
    return found


MODELS = {
    "wan": Model(wan_dit.tiny_state("i2v")),
    "hunyuan_video": Model(hunyuan_dit.tiny_state(), hunyuan_dit.comfy_state, is_hunyuan=True),
    "hunyuan_image": Model(hunyuan_image.tiny_state(), hunyuan_dit.comfy_state, is_hunyuan=True),
    "flux": Model(flux.tiny_state(), parts=flux_parts),
    "chroma": Model(flux.tiny_state("chroma"), parts=flux_parts),
    "lumina": Model(lumina.tiny_state()),
    "flux_2": Model(flux_2.tiny_state()),
    "flux_3": Model(flux_3.tiny_state()),
    "ltx_2": Model(dit_state()),
    "qwen_image": Model(qwen_image.tiny_state()),
    "krea2": Model(krea2.tiny_state()),
    "z_image": Model(z_image.tiny_state(), z_image.comfy_state, parts=z_image_parts),
}


def factors(kind: str, weight: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    rows, columns = weight.shape

    def draw(*shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    alpha = {"alpha": torch.tensor(3.0)}
    lora = {"lora_down.weight": draw(RANK, columns), "lora_up.weight": draw(rows, RANK), **alpha}
    match kind:
        case "LoHa":
            made = {
                f"hada_w{n}_{x}": draw(*((rows, RANK) if x == "a" else (RANK, columns)))
                for n in "12"
                for x in "ab"
            }
            return made | alpha
        case "LoKr":
            return {
                "lokr_w1": draw(2, 2),
                "lokr_w2_a": draw(rows // 2, 1),
                "lokr_w2_b": draw(1, columns // 2),
                **alpha,
            }
        case "whole LoKr":
            return {"lokr_w1": draw(2, 2), "lokr_w2": draw(rows // 2, columns // 2), **alpha}
        case "DoRA":
            return {**lora, "dora_scale": 0.5 + torch.rand(rows, 1, generator=generator)}
        case "difference":
            return {"diff": draw(rows, columns)}
    return lora


def write_lora(path: Path, kind: str, state: Mapping[str, Tensor], version: str, number: str = "") -> None:
    """Factors for every matrix of the blocks, those that training can reach. number: of a single block."""
    generator, tensors = torch.Generator().manual_seed(0), dict[str, Tensor]()
    for name, weight in state.items():
        module, _, leaf = name.rpartition(".")
        is_in_block = any(f"{each}.{number}" in name for each in ("blocks", "layers", "refiner"))
        if leaf == "weight" and weight.ndim == 2 and not len(weight) % 2 and is_in_block:
            for part, tensor in factors(kind, weight, generator).items():
                tensors[f"lora_unet_{module.replace('.', '_')}.{part}"] = tensor
    save_file(tensors, path, {"ss_base_model_version": version})


def convert(source: Path, output: Path, *more: object, target: str = "other") -> None:
    words = ("--input", source, "--output", output, "--target", target, *more)
    convert_lora.main([str(word) for word in words])


@pytest.mark.parametrize(
    ("name", "kind"),
    # forms of factors do not know the family, but for those whose parts are joined
    [
        *((name, "LoRA") for name in MODELS),
        *((name, kind) for name in ("flux", "z_image") for kind in KINDS[1:]),
        *((name, "DoRA") for name in ("hunyuan_image", "lumina", "ltx_2")),
    ],
)
def test_a_converted_file_of_every_kind_is_read_whole(tmp_path: Path, name: str, kind: str) -> None:
    model = MODELS[name]
    write_lora(tmp_path / "saved.safetensors", kind, model.state, name, "0.")
    patch = LoraPatch([WeightedLora(read_lora(tmp_path / "saved.safetensors"))])
    expected = {key: patch(key, one) - one for key, one in model.state.items()}
    frozen = ["--dit", tmp_path / "dit.safetensors"] if kind == "DoRA" else []
    save_file(dict(model.state), tmp_path / "dit.safetensors")

    convert(tmp_path / "saved.safetensors", tmp_path / "other.safetensors", *frozen)

    places = places_of(model.there(model.state), model.is_hunyuan, model.parts(model.there(model.state)))
    found = read(load_file(tmp_path / "other.safetensors"), places, model.there(model.state))
    assert found.unread == set()
    for key, change in model.there(expected).items():
        torch.testing.assert_close(
            found.changes.get(key, torch.zeros_like(change)), change, rtol=1e-4, atol=2e-5
        )
    again = LoraPatch([WeightedLora(read_lora(tmp_path / "other.safetensors"))])
    for key, one in model.state.items():
        torch.testing.assert_close(again(key, one) - one, expected[key], rtol=1e-4, atol=2e-5)
    assert unused(again) == []
    if kind == "DoRA":
        convert(tmp_path / "other.safetensors", tmp_path / "back.safetensors", *frozen, target="default")
        saved, back = load_file(tmp_path / "saved.safetensors"), load_file(tmp_path / "back.safetensors")
        for key, one in saved.items():
            if key.endswith("dora_scale"):
                torch.testing.assert_close(back[key], one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_only_some_models_need_a_conversion(tmp_path: Path, name: str) -> None:
    """The table of docs/generation.md, "What other tools read"."""
    model = MODELS[name]
    write_lora(tmp_path / "saved.safetensors", "LoRA", model.state, name, "0.")

    there = model.there(model.state)
    found = read(load_file(tmp_path / "saved.safetensors"), places_of(there, model.is_hunyuan), there)

    assert (found.unread == set()) == (name not in {"hunyuan_video", "hunyuan_image", "z_image"})


@pytest.mark.parametrize(
    ("prefix", "layer", "kind"),
    [
        ("lora_te1_", "text_model.encoder.layers.3.self_attn.q_proj", "LoRA"),
        ("lora_te1_", "text_model.encoder.layers.3.mlp.fc1", "DoRA"),
        ("lora_te3_", "encoder.block.2.layer.0.SelfAttention.q", "DoRA"),
        ("lora_te3_", "encoder.block.2.layer.1.DenseReluDense.wi_0", "LoRA"),
    ],
)
def test_text_encoders_of_flux_are_read_whole_once_converted(
    tmp_path: Path, prefix: str, layer: str, kind: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    state = {f"{layer}.weight": torch.randn(6, 4, generator=generator)}
    modules = {prefix + layer.replace(".", "_"): factors(kind, state[f"{layer}.weight"], generator)}
    modules["lora_unet_double_blocks_0_img_mlp_0"] = factors("LoRA", torch.ones(4, 4), generator)
    tensors = {f"{name}.{part}": one for name, parts in modules.items() for part, one in parts.items()}
    save_file(tensors, tmp_path / "saved.safetensors", {"ss_base_model_version": "flux1"})

    convert(tmp_path / "saved.safetensors", tmp_path / "other.safetensors")

    files = (tensors, load_file(tmp_path / "other.safetensors"))
    before, found = (read(file, text_places(prefix, state), state) for file in files)
    assert all("img_mlp" in name or ".ff." in name for name in found.unread)
    assert found.changes.keys() == before.changes.keys() == state.keys()
    for name, change in before.changes.items():
        torch.testing.assert_close(found.changes[name], change)
