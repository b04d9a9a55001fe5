"""LoRAs of Qwen-Image-2.1 in every dialect change the transformer alike, in files of both layouts."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert_lora
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.parity.running import assert_equal
from tests.qwen_image_21.making import in_diffusers, predict_with, tiny_inputs
from tests.tiny.qwen_image_21 import CONFIG, in_comfyui_names, tiny_state, write_dit

RANK = 4
LAYERS = [
    *(f"attn.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"img_mlp.{layer}" for layer in ("proj", "gate_layer", "out")),
]
PATHS = [f"transformer_blocks.{block}.{layer}" for block in range(CONFIG.num_layers) for layer in LAYERS]
ALPHA = 2.0


def factors() -> dict[str, tuple[Tensor, Tensor]]:
    """Down and up of each of the seven layers of a block."""
    state = tiny_state()
    generator = torch.Generator().manual_seed(5)
    made = {}
    for path in PATHS:
        rows, columns = state[f"{path}.weight"].shape
        made[path] = (
            0.1 * torch.randn(RANK, columns, generator=generator),
            0.1 * torch.randn(rows, RANK, generator=generator),
        )
    return made


def as_known(made: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The known tuner's names, and ours."""
    tensors = {}
    for path, (down, up) in made.items():
        name = "lora_unet_" + path.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    return tensors


def as_peft(
    made: Mapping[str, tuple[Tensor, Tensor]], start: str = "", ending: str = "", letters: str = "AB"
) -> dict[str, Tensor]:
    """Names of peft without alphas, which are folded into the factors."""
    first, second = ("lora_A", "lora_B") if letters == "AB" else ("lora_down", "lora_up")
    tensors = {}
    for path, (down, up) in made.items():
        tensors[f"{start}{path}.{first}{ending}.weight"] = down
        tensors[f"{start}{path}.{second}{ending}.weight"] = up * ALPHA / RANK
    return tensors


def as_fused(made: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """For ComfyUI's file: one LoRA of twice the rank for both layers that it stacks."""
    tensors = as_peft(made, "diffusion_model.")
    for block in range(CONFIG.num_layers):
        start = f"diffusion_model.transformer_blocks.{block}.img_mlp."
        gate, proj = (
            [tensors.pop(f"{start}{layer}.lora_{character}.weight") for character in "AB"]
            for layer in ("gate_layer", "proj")
        )
        tensors[f"{start}gate_up.lora_A.weight"] = torch.cat([gate[0], proj[0]])
        tensors[f"{start}gate_up.lora_B.weight"] = torch.block_diag(gate[1], proj[1])
    return tensors


DIALECTS = {
    "the known tuner": as_known(factors()),
    "ComfyUI": as_peft(factors(), "diffusion_model."),
    "ComfyUI with lora_down": as_peft(factors(), "diffusion_model.", letters=""),
    "DiffSynth": as_peft(factors(), ending=".default"),
    "diffusers": as_peft(factors(), "transformer."),
    "peft": as_peft(factors(), "base_model.model."),
    "ComfyUI's stacked layers": as_fused(factors()),
}


def merge(folder: Path, dit: Path, lora: Path, merged: Path) -> None:
    words = ("--dit", dit, "--lora_weight", lora, "--save_merged_model", merged)
    succeed_here("merge_lora.py", *words, folder=folder)


def merged_by_hand() -> dict[str, Tensor]:
    state = tiny_state()
    for path, (down, up) in factors().items():
        state[f"{path}.weight"] = state[f"{path}.weight"] + ALPHA / RANK * up @ down
    return state


DAILY = {"the known tuner", "ComfyUI's stacked layers"}


@pytest.mark.parametrize(
    "dialect",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in DAILY)) for name in DIALECTS],
)
def test_each_dialect_changes_all_its_layers(tmp_path: Path, dialect: str) -> None:
    lora, merged = tmp_path / "lora.safetensors", tmp_path / "merged.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in DIALECTS[dialect].items()}, lora)
    dit = write_dit(tmp_path, tiny_state())
    merge(tmp_path, dit, lora, merged)
    found, expected = load_file(merged), merged_by_hand()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_a_lora_is_merged_into_comfyuis_file(tmp_path: Path) -> None:
    """Its stacked layers get the changes of both parts."""
    lora, merged = tmp_path / "lora.safetensors", tmp_path / "merged.safetensors"
    save_file(DIALECTS["the known tuner"], lora)
    dit = tmp_path / "qwen_image_2.1_bf16.safetensors"
    save_file(in_comfyui_names(tiny_state()), dit)
    merge(tmp_path, dit, lora, merged)
    found, expected = load_file(merged), in_comfyui_names(merged_by_hand())
    found = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in found.items()}
    for name, tensor in expected.items():
        bare = name.removeprefix("model.diffusion_model.")
        torch.testing.assert_close(found[bare], tensor, rtol=1e-5, atol=1e-6, msg=name)


@torch.no_grad()
def test_a_converted_lora_has_its_effect_in_diffusers_and_comes_back(tmp_path: Path) -> None:
    """Of all layers: under our names diffusers would lose every `gate_layer`."""
    from diffusers.loaders import QwenImageLoraLoaderMixin

    lora, made, back = (tmp_path / f"{name}.safetensors" for name in ("lora", "made", "back"))
    save_file(DIALECTS["the known tuner"], lora, {"ss_base_model_version": "qwen_image_21"})
    convert_lora.main(["--input", str(lora), "--output", str(made), "--target", "other"])
    tensors = load_file(made)
    assert len(tensors) == 2 * len(PATHS)
    assert all(name.startswith("diffusion_model.") and ".alpha" not in name for name in tensors)
    given = tiny_inputs()
    dit = in_diffusers(tiny_state())
    dit.load_lora_adapter(QwenImageLoraLoaderMixin.lora_state_dict(dict(tensors)), prefix="transformer")
    expected = predict_with(in_diffusers(merged_by_hand()), given)
    assert_equal(predict_with(dit, given), expected, "converted", 1e-5)

    convert_lora.main(["--input", str(made), "--output", str(back), "--target", "default"])
    assert load_file(back).keys() == load_file(lora).keys()
    with safe_open(back, "pt") as file:
        assert file.metadata().get("ss_base_model_version", "qwen_image_21") == "qwen_image_21"


def test_a_lora_of_qwen_image_is_refused_by_name(tmp_path: Path) -> None:
    layer = "transformer_blocks.0.attn.add_q_proj"
    lora = tmp_path / "lora.safetensors"
    sides = {"lora_A": torch.ones(1, 64), "lora_B": torch.ones(64, 1)}
    save_file({f"{layer}.{side}.weight": tensor for side, tensor in sides.items()}, lora)
    dit = write_dit(tmp_path, tiny_state())
    words = ["merge_lora.py", "--dit", dit, "--lora_weight", lora, "--save_merged_model", "x.safetensors"]
    assert_one_message(*run_here(*words, folder=tmp_path), "lora.safetensors")
