"""LoRAs of every dialect that is around change the same weights in the same way."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert_lora
import merge_lora
from modules.errors import OptionError
from moss_image.names import MOSS_IMAGE
from networks.builtin_modules import OWN_MODULES
from networks.lora_format import LoraFormat
from networks.names.layouts import COMFYUI, KNOWN
from tests.moss_image.making import CONFIG, tiny_model, tiny_weights
from tests.tiny.hunyuan_encoders import save
from tests.tiny.loras import make_lora
from tests.tiny.moss_image import in_comfyui_names

State = dict[str, Tensor]
LAYERS = ("q", "k", "v", "o", "ffn_up_gate", "ffn_down")


def stack(state: State) -> State:
    """The LoRA of stacked layers: factors of q, k and v in blocks along a diagonal."""
    stacked = dict(state)
    for name in [name for name in state if name.endswith(".proj.q.lora_A.weight")]:
        start = name.removesuffix("q.lora_A.weight")
        downs = [stacked.pop(f"{start}{character}.lora_A.weight") for character in "qkv"]
        ups = [stacked.pop(f"{start}{character}.lora_B.weight") for character in "qkv"]
        stacked[f"{start}qkv.lora_A.weight"] = torch.cat(downs)
        stacked[f"{start}qkv.lora_B.weight"] = torch.block_diag(*ups)
    return stacked


def rename(*pairs: tuple[str, str]) -> Callable[[State], State]:
    def renamed(state: State) -> State:
        found = {}
        for name, tensor in state.items():
            for old, new in pairs:
                name = name.replace(old, new, 1)
            found[name] = tensor
        return found

    return renamed


# name -> --target of the file that it is made from, and the change
DIALECTS: dict[str, tuple[str, Callable[[State], State]]] = {
    "ComfyUI": ("other", dict),
    "down and up": ("other", rename(("lora_A", "lora_down"), ("lora_B", "lora_up"))),
    "PEFT": ("other", rename(("diffusion_model.", "base_model.model."))),
    "PEFT with default": (
        "other",
        rename(
            ("diffusion_model.", "base_model.model."),
            ("lora_A.", "lora_A.default."),
            ("lora_B.", "lora_B.default."),
        ),
    ),
    "bare": ("other", rename(("diffusion_model.", ""))),
    "stacked": ("other", stack),
    "diffusers": ("diffusers", dict),
    "known": ("default", dict),
}


@pytest.fixture
def known(tmp_path: Path) -> Path:
    """A LoRA with the names that other LoRA trainers have."""
    network = make_lora("lora_moss_image", 4, 2.0, tiny_model())
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    path = tmp_path / "ours.safetensors"
    LoraFormat(KNOWN, MOSS_IMAGE).save(network, path, None, {"ss_base_model_version": MOSS_IMAGE.name})
    return path


def convert(lora: Path, target: str) -> State:
    path = lora.with_name(f"{target}.safetensors")
    path.unlink(missing_ok=True)
    convert_lora.main(["--input", str(lora), "--output", str(path), "--target", target])
    return load_file(path)


def merge(dit: Path, lora: Path) -> State:
    path = lora.with_name("merged.safetensors")
    path.unlink(missing_ok=True)
    words = ["--dit", dit, "--lora_weight", lora, "--save_merged_model", path]
    merge_lora.main([str(word) for word in words])
    return load_file(path)


def test_every_dialect_changes_the_same_weights(known: Path, tmp_path: Path) -> None:
    """Apart or stacked, under all prefixes, in transformers of both layouts."""
    before = tiny_weights()
    dit = save(tmp_path / "dit.safetensors", before)
    expected = merge(dit, known)
    changed = [name for name, weight in expected.items() if not torch.equal(before[name], weight)]
    assert len(changed) == 6 * CONFIG.num_layers
    for name, (target, change) in DIALECTS.items():
        path = tmp_path / "changed.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in change(convert(known, target)).items()}, path)
        for key, weight in merge(dit, path).items():
            torch.testing.assert_close(weight, expected[key], msg=f"{name}: {key}", rtol=0, atol=1e-6)

    stacked = save(tmp_path / "stacked.safetensors", in_comfyui_names(before))
    for key, weight in in_comfyui_names(merge(stacked, known)).items():
        torch.testing.assert_close(weight, in_comfyui_names(expected)[key], rtol=0, atol=1e-6)


def test_saved_names_are_those_of_comfyui(known: Path) -> None:
    """Of six layers of each block: `ffn_up_gate` is never split."""
    assert MOSS_IMAGE.default_format == COMFYUI
    assert "networks.lora_moss_image" in OWN_MODULES
    assert set(convert(known, "other")) == {
        f"diffusion_model.layers.{block}.proj.{layer}.lora_{character}.weight"
        for block in range(CONFIG.num_layers)
        for layer in LAYERS
        for character in "AB"
    }


def test_no_layer_is_fused_so_that_split_qkv_is_not_taken(known: Path) -> None:
    dit = tiny_model()

    with pytest.raises(OptionError, match="split_qkv"):
        make_lora("lora_moss_image", 4, 2.0, dit, split_qkv="True")
