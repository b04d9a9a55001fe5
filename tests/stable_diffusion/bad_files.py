"""Files for gen_img.py that are good, that are of another kind, damaged, or made to do harm."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.faults import damage
from tests.tiny import flux
from tests.tiny.guides import vgg_state, write_clip
from tests.tiny.picture_encoders import write_autoencoder
from tests.tiny.stable_diffusion import tokenizer_folder, unet_state, write_folder, write_sd1, write_sdxl

RANK = 4
# of the U-Net, and of the text encoders
LORA_MODULES = ("attn1.to_q", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v", "ff.net.2")


def write_lora(path: Path, kind: str = "sd1", seed: int = 0, strength: float = 0.5) -> Path:
    """A LoRA in the layout of sd-scripts, for the U-Net's attention and the first text encoder."""
    tensors: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(1000 + seed)
    prefix = "lora_te1" if kind == "sdxl" else "lora_te"

    def add(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.lora_down.weight"] = torch.randn((RANK, columns), generator=generator) / columns**0.5
        up = torch.randn((rows, RANK), generator=generator) * strength / RANK**0.5
        tensors[f"{name}.lora_up.weight"] = up
        tensors[f"{name}.alpha"] = torch.tensor(float(RANK))

    for name, weight in unet_state(kind).items():
        if name.endswith(tuple(f"{module}.weight" for module in LORA_MODULES)):
            add(f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}", *weight.shape)
    for layer in range(2):
        add(f"{prefix}_text_model_encoder_layers_{layer}_self_attn_q_proj", 64, 64)
        add(f"{prefix}_text_model_encoder_layers_{layer}_mlp_fc1", 128, 64)
    return save(path, tensors)


def save(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def write_picture(path: Path, width: int = 64, height: int = 64, seed: int = 0) -> Path:
    dice = np.random.default_rng(seed)
    small = dice.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


def write_mask(path: Path, width: int = 64, height: int = 64) -> Path:
    """Red on the left, green on the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = pixels[:, width // 2 :, 1] = 255
    Image.fromarray(pixels).save(path)
    return path


def write_good(folder: Path) -> Path:
    """A project that works: sd1.safetensors, tokenizers, lora.safetensors, guide.png, mask.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    write_sd1(folder)
    tokenizer_folder(folder / "tokenizers")
    write_lora(folder / "lora.safetensors")
    write_picture(folder / "picture.png")
    write_mask(folder / "mask.png")
    (folder / "prompts.txt").write_text("a cat\na dog --d 2\n", encoding="utf-8")
    save(folder / "word.safetensors", {"emb_params": torch.ones(2, 64)})
    return folder


def write_bad(folder: Path, good: Path) -> Path:
    """The folder of bad files."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = good / "sd1.safetensors"
    write_sdxl(folder)
    flux.write_dit(folder, flux.tiny_state())
    write_autoencoder(folder / "flux_vae.safetensors")
    _write_flux_lora(folder / "flux_lora.safetensors")
    write_lora(folder / "sdxl_lora.safetensors", "sdxl")
    (folder / "text.txt").write_text("a cat\n", encoding="utf-8")
    (folder / "text.safetensors").write_text("no checkpoint\n", encoding="utf-8")
    (folder / "text.pt").write_text("no checkpoint\n", encoding="utf-8")
    for name in ("truncated", "one_byte_short", "empty", "web_page", "pickled_code", "old_pickled_code"):
        for kind, source in (("ckpt", checkpoint), ("lora", good / "lora.safetensors")):
            ending = "ckpt" if "pickled" in name else "safetensors"
            getattr(damage, name)(source, folder / f"{name}_{kind}.{ending}")
    damage.pickled_code(checkpoint, folder / "harmful.pt")
    state = load_file(checkpoint)
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    save(folder / "nan.safetensors", {**state, key: torch.full_like(state[key], torch.nan)})
    save(folder / "half.safetensors", {name: t for name, t in state.items() if "output_blocks" not in name})
    save(folder / "no_text.safetensors", _without(state, ("cond_stage_model.",)))
    save(folder / "no_vae.safetensors", _without(state, ("first_stage_model.",)))
    save(folder / "only_text.safetensors", _without(state, ("model.", "first_stage_model.")))
    save(folder / "other_size.safetensors", {**state, key: torch.ones(3, 5)})
    lora = load_file(good / "lora.safetensors")
    name = next(name for name in lora if name.endswith("lora_up.weight"))
    save(folder / "nan_lora.safetensors", {**lora, name: torch.full_like(lora[name], torch.nan)})
    save(folder / "wide_word.safetensors", {"emb_params": torch.ones(2, 99)})
    save(folder / "empty_word.safetensors", {"emb_params": torch.ones(0, 64)})
    save(folder / "flat_word.safetensors", {"emb_params": torch.tensor(1.0)})
    save(folder / "nan_word.safetensors", {"emb_params": torch.full((2, 64), torch.nan)})
    layers = ("IN01", "IN02", "MID", "OUT03", "OUT04", "OUT05")
    save(folder / "wide_layers.safetensors", {name: torch.ones(2, 99) for name in layers})
    _write_guides(folder)
    _write_folders(folder)
    shutil.copytree(good / "tokenizers", folder / "bad_tokenizers")
    for vocabulary in (folder / "bad_tokenizers").glob("*/vocab.json"):
        vocabulary.write_text("[1, 2", encoding="utf-8")
    _write_pictures(folder)
    return folder


def _without(state: Mapping[str, Tensor], starts: Iterable[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(tuple(starts))}


def _write_guides(folder: Path) -> None:
    """CLIP without its image tower or its projection; VGG16 with a part of a layer, or of its layers."""
    write_clip(folder / "clip")
    state = load_file(folder / "clip" / "model.safetensors")
    for name, missing in (("blind_clip", "vision_model."), ("clip_without_projection", "text_projection.")):
        (folder / name).mkdir()
        save(folder / name / "model.safetensors", _without(state, (missing,)))
        shutil.copy(folder / "clip" / "config.json", folder / name)
    layers = vgg_state()
    torch.save(_without(layers, ("features.19.bias",)), folder / "half_vgg16.pth")
    kept = {
        name: tensor for name, tensor in layers.items() if name.startswith(("features.0.", "features.2."))
    }
    torch.save(kept, folder / "short_vgg16.pth")


def _write_flux_lora(path: Path) -> None:
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    save(path, {f"{name}.lora_down.weight": torch.ones(4, 128), f"{name}.lora_up.weight": torch.ones(384, 4)})


def _write_folders(folder: Path) -> None:
    for name in ("no_unet", "no_config", "bad_config", "wide_config", "hostile_config"):
        write_folder("sd1", folder / name)
    shutil.rmtree(folder / "no_unet" / "unet")
    (folder / "no_config" / "unet" / "config.json").unlink()
    config = folder / "bad_config" / "unet" / "config.json"
    config.write_text("{", encoding="utf-8")
    _change(folder / "wide_config" / "unet" / "config.json", block_out_channels=[10**9, 10**9])
    hostile = {"_class_name": "os.system", "act_fn": "__import__('os')"}
    _change(folder / "hostile_config" / "unet" / "config.json", **hostile)
    _change(folder / "hostile_config" / "model_index.json", unet=["os", "system"])
    (folder / "empty_folder").mkdir()


def _change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def _write_pictures(folder: Path) -> None:
    (folder / "text.png").write_text("no picture", encoding="utf-8")
    write_picture(folder / "whole.png")
    (folder / "truncated.png").write_bytes((folder / "whole.png").read_bytes()[:100])
    (folder / "empty.png").write_bytes(b"")
    (folder / "no_pictures").mkdir()
    (folder / "latin.txt").write_bytes("a café\n".encode("latin-1"))
    (folder / "nothing.txt").write_text("# nothing\n\n", encoding="utf-8")
    (folder / "zeros.txt").write_bytes(b"\0" * 100)
    (folder / "module.py").write_text("raise ValueError('broken')\n", encoding="utf-8")
    (folder / "empty_module.py").write_text("x = 1\n", encoding="utf-8")
