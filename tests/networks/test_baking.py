"""convert_lora.py --bake: plain LoRAs of LoHas, LoKrs and DoRAs, and how much of them is lost."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert_lora
from modules.errors import CheckpointError, OptionError
from networks.apply import LoraPatch
from networks.loading import LoraFile, LoraUse, read_lora
from networks.text_loras import WholePatch
from tests.networks.test_read_by_comfyui import MODELS, factors, write_lora
from tests.tiny import framepack_dit, hunyuan_dit, stable_diffusion

STATES = {name: model.state for name, model in MODELS.items()} | {"framepack": framepack_dit.tiny_state()}
PLAIN = {"lora_down.weight", "lora_up.weight", "alpha"}


def bake(folder: Path, rank: int, *more: str, target: str = "default") -> LoraFile:
    words = ["--input", str(folder / "saved.safetensors"), "--output", str(folder / "plain.safetensors")]
    convert_lora.main([*words, "--target", target, "--bake", str(rank), "--device", "cpu", *more])
    return read_lora(folder / "plain.safetensors", with_texts=True)


def effect(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    patch = LoraPatch([LoraUse(read_lora(path))])
    found = {name: patch(name, one.float()) - one.float() for name, one in state.items()}
    assert patch.unused() == []
    return found


def assert_same_effect(state: Mapping[str, Tensor], folder: Path, atol: float = 2e-5) -> None:
    expected = effect(state, folder / "saved.safetensors")
    for name, found in effect(state, folder / "plain.safetensors").items():
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=atol)


@pytest.mark.parametrize(
    ("kind", "target"), [("LoHa", "other"), ("LoKr", "diffusers"), ("DoRA", "default"), ("DoRA", "other")]
)
@pytest.mark.parametrize("name", STATES)
def test_a_plain_lora_of_enough_rank_does_the_same(tmp_path: Path, name: str, kind: str, target: str) -> None:
    state = STATES[name]
    write_lora(tmp_path / "saved.safetensors", kind, state, name, "0.")
    save_file(dict(state), tmp_path / "dit.safetensors")
    dit = ["--dit", str(tmp_path / "dit.safetensors")] if kind == "DoRA" else []

    found = bake(tmp_path, 5000 if kind == "DoRA" else 4, *dit, target=target)  # 2 of a LoHa are at most 4

    assert all(factors.keys() <= PLAIN for factors in found.modules().values())
    assert found.metadata["ss_network_module"] == "networks.lora"
    assert_same_effect(state, tmp_path)


def test_the_share_that_is_lost_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    state = STATES["wan"]
    write_lora(tmp_path / "saved.safetensors", "DoRA", state, "wan", "0.")
    save_file(dict(state), tmp_path / "dit.safetensors")

    found = bake(tmp_path, 8, "--dit", str(tmp_path / "dit.safetensors"))

    wanted, got = (effect(state, tmp_path / f"{name}.safetensors") for name in ("saved", "plain"))
    lost = {name: float((got[name] - one).norm()) for name, one in wanted.items() if one.any()}
    sizes = {name: float(wanted[name].norm()) for name in lost}
    share = sum(one**2 for one in lost.values()) ** 0.5 / sum(one**2 for one in sizes.values()) ** 0.5
    worst = max(lost, key=lambda name: lost[name] / sizes[name])
    told = re.search(r"at rank 8: (\S+) % of the change\s+is\s+lost, at most (\S+) % \((\w+)\)", caplog.text)
    assert told is not None
    assert float(told[1]) == pytest.approx(100 * share, rel=0.06)
    assert float(told[2]) == pytest.approx(100 * lost[worst] / sizes[worst], rel=0.06)
    assert told[3] == f"lora_unet_{worst.removesuffix('.weight').replace('.', '_')}"
    assert {len(factors["lora_down.weight"]) for factors in found.modules().values()} == {8}


@pytest.mark.parametrize(
    "dialect", ["comfy", "comfy_all_in_one", "diffusers", "comfy_fp8_scaled", "pt_wrapped"]
)
def test_a_dora_is_baked_from_a_model_in_any_layout(tmp_path: Path, dialect: str) -> None:
    state = STATES["hunyuan_video"]
    write_lora(tmp_path / "saved.safetensors", "DoRA", state, "hunyuan_video", "0.")
    dit = hunyuan_dit.write_dit(tmp_path, state, dialect)

    bake(tmp_path, 5000, "--dit", str(dit))

    assert_same_effect(state, tmp_path, atol=0.05 if "fp8" in dialect else 2e-5)


def test_a_dora_of_text_encoders_in_one_file_with_the_model(tmp_path: Path) -> None:
    model = stable_diffusion.write_sdxl(tmp_path)
    state = {name: one.float() for name, one in load_file(model).items()}
    generator = torch.Generator().manual_seed(0)
    layer, block = "text_model.encoder.layers.0.mlp.fc1", "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    weights = {
        f"lora_te1.{layer}": f"conditioner.embedders.0.transformer.{layer}.weight",
        f"lora_te2.{layer}": "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight",
        f"lora_unet.{block}": f"model.diffusion_model.{block}.weight",
    }
    tensors = {
        f"{module.replace('.', '_')}.{part}": tensor
        for module, name in weights.items()
        for part, tensor in factors("DoRA", state[name], generator).items()
    }
    save_file(tensors, tmp_path / "saved.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})

    bake(tmp_path, 5000, "--dit", str(model))

    expected, found = (
        {name: patch.add_to(name, one.clone()) - one for name, one in state.items() if patch.touches(name)}
        for file in ("saved", "plain")
        for lora in [read_lora(tmp_path / f"{file}.safetensors", with_texts=True)]
        for patch in [WholePatch([LoraUse(lora)], state, model)]
    )
    assert len(expected) == len(found) == 3
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("DoRA", [], "Add --dit"),
        ("LoRA", [], "plain LoRAs alone"),
        ("DoRA", ["--dit", "flux.safetensors"], "is not in the files of --dit"),
        ("LoHa", ["--dit", "missing.safetensors"], "no such file"),
    ],
)
def test_what_cannot_be_baked_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, more: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(dict(STATES["flux"]), "flux.safetensors")
    write_lora(tmp_path / "saved.safetensors", kind, STATES["wan"], "wan", "0.")

    with pytest.raises((OptionError, CheckpointError), match=message):
        bake(tmp_path, 4, *more)
    assert not Path("plain.safetensors").exists()
