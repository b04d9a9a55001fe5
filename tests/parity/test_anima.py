"""LoRAs of Anima in every dialect have the same effect in diffusers as merged with our tool."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert_lora
import merge_lora
from tests.anima.making import (
    conditioner_in_diffusers,
    predict_in_diffusers,
    text_in_diffusers,
    tiny_inputs,
    transformer_in_diffusers,
)
from tests.parity.anima import AnimaThere
from tests.parity.running import assert_equal
from tests.tiny.anima import write_tiny_anima

# what names in a file of the target begin with: of the transformer, of the adapter
TARGETS = {
    "other": ("diffusion_model.blocks.", "diffusion_model.llm_adapter."),
    "diffusers": ("transformer.transformer_blocks.", "text_conditioner."),
}
LAYERS = ("self_attn_q_proj", "cross_attn_v_proj", "cross_attn_output_proj", "mlp_layer1", "mlp_layer2")
ADAPTER = ("self_attn_q_proj", "cross_attn_o_proj", "mlp_0", "mlp_2")


def lora_of(state: dict[str, Tensor], kind: str = "lora") -> dict[str, Tensor]:
    """A network on layers of all blocks and of the adapter, under our names; alpha is half of the rank."""
    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, Tensor] = {}
    for name, weight in state.items():
        module = name.removesuffix(".weight").replace(".", "_")
        ends = ADAPTER if module.startswith("llm_adapter") else LAYERS
        if not module.endswith(ends) or weight.ndim < 2 or not name.endswith(".weight"):
            continue
        rows, columns = weight.shape
        start = f"lora_unet_{module}."
        tensors[f"{start}lora_down.weight"] = torch.randn(4, columns, generator=generator)
        tensors[f"{start}lora_up.weight"] = 0.05 * torch.randn(rows, 4, generator=generator)
        tensors[f"{start}alpha"] = torch.tensor(2.0)
    return tensors


def predict(dit: object, adapter: object) -> Tensor:
    given = tiny_inputs(2)
    return predict_in_diffusers(dit, given["noisy"], given["sigmas"], text_in_diffusers(adapter, given))


@torch.no_grad()
@pytest.mark.parametrize("target", TARGETS)
def test_every_dialect_has_its_effect_in_diffusers(tmp_path: Path, target: str) -> None:
    files = write_tiny_anima(tmp_path / "model")
    state = load_file(files.dit)
    lora, merged = tmp_path / "lora.safetensors", tmp_path / "merged.safetensors"
    save_file(lora_of(state), lora)
    words = ["--dit", str(files.dit), "--lora_weight", str(lora), "--save_merged_model", str(merged)]
    merge_lora.main([*words, "--device", "cpu"])
    changed = load_file(merged)
    expected = predict(transformer_in_diffusers(changed), conditioner_in_diffusers(changed))
    without = predict(transformer_in_diffusers(state), conditioner_in_diffusers(state))
    assert (expected - without).abs().max() > 1e-2

    made, back = tmp_path / "made.safetensors", tmp_path / "back.safetensors"
    convert_lora.main(["--input", str(lora), "--output", str(made), "--target", target])
    names = load_file(made).keys()
    assert len(names) == 2 * (5 + 4) * 2
    assert all(name.startswith(TARGETS[target]) and ".alpha" not in name for name in names)
    pipe = AnimaThere(files).pipe
    pipe.load_lora_weights(str(made))
    assert_equal(predict(pipe.transformer, pipe.text_conditioner), expected, target, 1e-5)

    convert_lora.main(["--input", str(made), "--output", str(back), "--target", "default"])
    assert load_file(back).keys() == load_file(lora).keys()


@torch.no_grad()
def test_names_of_other_programs_are_read(tmp_path: Path) -> None:
    """Of OneTrainer's older files, with `net.`, and the slips of the known converter."""
    files = write_tiny_anima(tmp_path / "model")
    lora = tmp_path / "lora.safetensors"
    save_file(lora_of(load_file(files.dit)), lora)
    made = {}
    for target in TARGETS:
        path = tmp_path / f"{target}.safetensors"
        convert_lora.main(["--input", str(lora), "--output", str(path), "--target", target])
        made[target] = load_file(path)
    comfy, diffusers = made["other"], made["diffusers"]
    layer = "layers.0.self_attn.q_proj."
    factors = {"lora_A.weight": torch.ones(2, 64), "lora_B.weight": torch.ones(128, 2)}
    variants = {
        "onetrainer": {
            name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): tensor
            for name, tensor in diffusers.items()
        },
        "net": {name.replace("diffusion_model.", "net."): tensor for name, tensor in comfy.items()},
        "converter": {name.replace("llm_adapter.", "llm.adapter."): one for name, one in comfy.items()}
        | {f"text_encoder.qwen3.{layer}{end}": one for end, one in factors.items()},
        "comfyui": comfy
        | {f"text_encoders.qwen3_06b.transformer.model.{layer}{end}": one for end, one in factors.items()},
    }
    expected = load_file(lora).keys()
    for variant, tensors in variants.items():
        path, back = tmp_path / f"{variant}.safetensors", tmp_path / f"{variant} back.safetensors"
        save_file(tensors, path)
        convert_lora.main(["--input", str(path), "--output", str(back), "--target", "default"])
        found = load_file(back).keys()
        texts = {name for name in found if name.startswith("lora_te_layers_0_self_attn_q_proj.")}
        assert found - texts == expected, variant
        assert bool(texts) == (variant in {"converter", "comfyui"}), variant
