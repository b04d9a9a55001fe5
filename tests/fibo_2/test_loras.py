"""LoRAs of Fibo 2.0 in diffusers' names and in ComfyUI's stacked ones, both ways."""

from pathlib import Path

import pytest
import torch
from diffusers.loaders.lora_pipeline import BriaFibo2LoraLoaderMixin
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert_lora
import merge_lora
from fibo_2.names import FIBO_2
from networks.lora_format import KNOWN, LoraFormat
from tests.fibo_2.making import in_diffusers, tiny_model
from tests.tiny.fibo_2 import in_comfyui_names, tiny_state
from tests.tiny.hunyuan_encoders import save
from tests.tiny.loras import make_lora

State = dict[str, Tensor]
MODULES = 4 * 7 + 2 * 4 + 11  # of 3 blocks and a refiner, of which 2 read the text, and a Perceiver's layer
STACKED = 4 * 4 + 2 * 3 + 3 + 3 + 2


@pytest.fixture
def known(tmp_path: Path) -> Path:
    """A LoRA with the names that other LoRA trainers have."""
    network = make_lora("lora_fibo_2", 4, 2.0, tiny_model())
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    path = tmp_path / "ours.safetensors"
    LoraFormat(KNOWN, FIBO_2).save(network, path, None, {"ss_base_model_version": FIBO_2.name})
    return path


def convert(lora: Path, target: str) -> Path:
    path = lora.with_name(f"{lora.stem} {target}.safetensors")
    convert_lora.main(["--input", str(lora), "--output", str(path), "--target", target])
    return path


def merge(dit: Path, lora: Path) -> State:
    path = lora.with_name("merged.safetensors")
    path.unlink(missing_ok=True)
    words = ["--dit", dit, "--lora_weight", lora, "--save_merged_model", path]
    merge_lora.main([str(word) for word in words])
    return load_file(path)


def test_every_dialect_changes_the_same_weights(known: Path, tmp_path: Path) -> None:
    """Apart or stacked, there and back, in transformers of both layouts."""
    before = tiny_state()
    dit = save(tmp_path / "dit.safetensors", before)
    expected = merge(dit, known)
    changed = [name for name, weight in expected.items() if not torch.equal(before[name], weight)]
    assert len(changed) == MODULES
    comfyui = convert(known, "comfyui")
    for path in (
        convert(known, "diffusers"),
        comfyui,
        convert(comfyui, "default"),
        convert(comfyui, "diffusers"),
    ):
        for key, weight in merge(dit, path).items():
            torch.testing.assert_close(weight, expected[key], msg=f"{path.name}: {key}", rtol=0, atol=1e-6)
    stacked = save(tmp_path / "stacked.safetensors", in_comfyui_names(before))
    merged = merge(stacked, comfyui)
    for key, weight in in_comfyui_names(expected).items():
        torch.testing.assert_close(merged[key], weight, rtol=0, atol=1e-6)


def test_comfyui_has_every_module_of_its_layout_once(known: Path) -> None:
    names = {name.rpartition(".lora_")[0] for name in load_file(convert(known, "comfyui"))}
    layers = {
        name.removesuffix(".weight")
        for name, tensor in in_comfyui_names(tiny_state()).items()
        if tensor.ndim == 2
    }
    assert len(names) == STACKED
    assert {name.removeprefix("diffusion_model.") for name in names} <= layers
    assert {name.rpartition(".")[2] for name in names} == {
        "qkv",
        "out",
        "to_q",
        "to_kv",
        "to_out",
        "w13",
        "w2",
    }


@torch.no_grad()
def test_diffusers_loads_every_module(known: Path) -> None:
    """Its loader converts nothing: the network changes as by our merge."""
    there = in_diffusers(tiny_state())
    state = load_file(convert(known, "diffusers"))
    BriaFibo2LoraLoaderMixin.load_lora_into_transformer(state, there)
    there.fuse_lora()
    there.unload_lora()
    merged = merge(save(known.with_name("dit.safetensors"), tiny_state()), known)
    for name, weight in there.state_dict().items():
        torch.testing.assert_close(weight, merged[name], rtol=0, atol=1e-5)


def test_a_lora_of_diffusers_names_is_read(known: Path, tmp_path: Path) -> None:
    state = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(convert(known, "diffusers")).items()
    }
    assert len(state) == 2 * MODULES
    bare = tmp_path / "bare.safetensors"
    save_file(state, bare)
    assert len(load_file(convert(bare, "default"))) == 3 * MODULES
