"""Language models as text encoders in LoRAs: the names that ComfyUI reads, and back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert_lora
from anima.names import ANIMA
from lumina.names import LUMINA
from networks.lora_format import COMFYUI, LoraFormat

# family -> a module of its transformer, and where its text encoder is in ComfyUI. Source: the converter of
# sd-scripts (anima), ComfyUI's names of its text encoders
CASES = {
    "anima": ("blocks_0_self_attn_q_proj", "text_encoders.qwen3_06b.transformer.model."),
    "lumina": ("layers_0_attention_out", "text_encoders.gemma2_2b.transformer.model."),
}
TEXTS = {
    "layers_0_self_attn_q_proj": "layers.0.self_attn.q_proj",
    "layers_11_mlp_gate_proj": "layers.11.mlp.gate_proj",
}


def make_lora(module: str) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for name in (f"lora_unet_{module}", *(f"lora_te_{text}" for text in TEXTS)):
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, 8, generator=random)
        tensors[f"{name}.lora_up.weight"] = torch.randn(6, 2, generator=random)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    return tensors


@pytest.mark.parametrize("name", CASES)
def test_text_encoders_get_the_names_that_comfyui_reads(name: str, tmp_path: Path) -> None:
    module, start = CASES[name]
    lora = make_lora(module)
    save_file(lora, tmp_path / "lora.safetensors", {"ss_base_model_version": name})
    words = ["--input", str(tmp_path / "lora.safetensors"), "--output", str(tmp_path / "comfy.safetensors")]

    convert_lora.main([*words, "--target", "comfyui"])

    found = load_file(tmp_path / "comfy.safetensors")
    assert not [key for key in found if key.startswith("lora_te")]
    for ours, theirs in TEXTS.items():
        down, up = (found[f"{start}{theirs}.lora_{character}.weight"] for character in "AB")
        expected = lora[f"lora_te_{ours}.lora_up.weight"] @ lora[f"lora_te_{ours}.lora_down.weight"] / 2
        torch.testing.assert_close(up @ down, expected)
    back = ["--input", str(tmp_path / "comfy.safetensors"), "--output", str(tmp_path / "back.safetensors")]
    convert_lora.main([*back, "--target", "default"])
    assert load_file(tmp_path / "back.safetensors").keys() == lora.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_training_saves_the_same_names(name: str) -> None:
    module, start = CASES[name]
    family = {"anima": ANIMA, "lumina": LUMINA}[name]

    written = LoraFormat(COMFYUI, family).convert(make_lora(module)).tensors

    starts = {key.partition("layers.")[0] for key in written if key.startswith("text_encoders")}
    assert starts == {start}
    assert not [key for key in written if key.startswith("lora_te")]
