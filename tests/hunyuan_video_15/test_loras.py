"""LoRAs of HunyuanVideo 1.5 under the names of three programs change the same weights in the same way."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert_lora
import merge_lora
from networks import convert_hunyuan_video_1_5_lora_to_comfy
from tests.hunyuan_video_15.making import in_diffusers, tiny_model
from tests.tiny.hunyuan_video_15 import CONFIG, tiny_state, write_dit
from tests.tiny.loras import make_lora

RANK, ALPHA = 4, 2.0
LINEARS = 14  # of each block


@pytest.fixture
def known(tmp_path: Path) -> Path:
    """A LoRA with the names of musubi-tuner."""
    network = make_lora("lora_hv_1_5", RANK, ALPHA, tiny_model())
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    path = tmp_path / "known.safetensors"
    state = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    save_file(state, path, {"ss_base_model_version": "hunyuan_video_1_5"})
    return path


def changes(path: Path) -> dict[str, Tensor]:
    """What a file adds to each weight, by the name of its module."""
    state, found = load_file(path), {}
    for name, up in state.items():
        if name.endswith(".lora_up.weight"):
            module = name.removesuffix(".lora_up.weight")
            scale = float(state[f"{module}.alpha"]) / up.shape[1]
            found[module] = scale * up @ state[f"{module}.lora_down.weight"]
    return found


def test_a_lora_is_on_all_layers_of_the_blocks(known: Path) -> None:
    found = changes(known)

    assert len(found) == LINEARS * CONFIG.double_blocks
    assert {name.split("_")[2] for name in found} == {"double"}
    for module in ("img_attn_q", "txt_attn_v", "img_mlp_fc1", "txt_mod_linear", "img_attn_proj"):
        assert f"lora_unet_double_blocks_1_{module}" in found


def test_comfyui_s_form_joins_queries_keys_and_values(tmp_path: Path, known: Path) -> None:
    comfy, back = tmp_path / "comfy.safetensors", tmp_path / "back.safetensors"

    convert_hunyuan_video_1_5_lora_to_comfy.main([str(known), str(comfy)])
    convert_hunyuan_video_1_5_lora_to_comfy.main([str(comfy), str(back), "--reverse"])

    state, before, joined = load_file(comfy), changes(known), changes(comfy)
    block = "lora_unet_double_blocks_0_"
    assert state[f"{block}img_attn_qkv.lora_down.weight"].shape == (3 * RANK, CONFIG.dim)
    assert float(state[f"{block}img_attn_qkv.alpha"]) == 3 * ALPHA
    expected = torch.cat([before[f"{block}img_attn_{letter}"] for letter in "qkv"])
    torch.testing.assert_close(joined[f"{block}img_attn_qkv"], expected)
    for ours, theirs in (("mlp_fc1", "mlp_0"), ("mlp_fc2", "mlp_2"), ("mod_linear", "mod_lin")):
        torch.testing.assert_close(joined[f"{block}txt_{theirs}"], before[f"{block}txt_{ours}"])
    assert not any("attn_q." in name or "fc1" in name for name in state)
    after = changes(back)
    assert after.keys() == before.keys()
    for name, change in before.items():
        torch.testing.assert_close(after[name], change, msg=name)


@pytest.mark.parametrize("target", ["other", "diffusers", "default"])
def test_each_form_changes_the_same_weights(tmp_path: Path, known: Path, target: str) -> None:
    other, dit = tmp_path / "other.safetensors", write_dit(tmp_path, tiny_state(), name="dit")
    convert_lora.main(["--input", str(known), "--output", str(other), "--target", target])
    merged = {}
    for name, lora in (("known", known), ("other", other)):
        path = tmp_path / f"merged {name}.safetensors"
        words = ["--dit", dit, "--lora_weight", lora, "--save_merged_model", path]
        merge_lora.main([str(word) for word in words])
        merged[name] = load_file(path)

    for name, weight in merged["known"].items():
        torch.testing.assert_close(merged["other"][name], weight, msg=name)
    changed = [
        name for name, weight in tiny_state().items() if not torch.equal(merged["known"][name], weight)
    ]
    assert len(changed) == LINEARS * CONFIG.double_blocks


def test_diffusers_loads_its_form_with_the_same_effect(tmp_path: Path, known: Path) -> None:
    other, dit = tmp_path / "other.safetensors", write_dit(tmp_path, tiny_state(), name="dit")
    convert_lora.main(["--input", str(known), "--output", str(other), "--target", "diffusers"])
    merged = tmp_path / "merged.safetensors"
    merge_lora.main(["--dit", str(dit), "--lora_weight", str(known), "--save_merged_model", str(merged)])
    there = in_diffusers(tiny_state())

    there.load_lora_adapter(load_file(other), prefix="transformer")
    there.fuse_lora()

    expected = dict(in_diffusers(load_file(merged)).named_parameters())
    found = {name.replace(".base_layer", ""): weight for name, weight in there.named_parameters()}
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=1e-4, msg=name)
