"""LoRAs saved here load in diffusers and act there as here; those that diffusers and PEFT save load here."""

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from networks.convert import convert_file
from networks.loading import read_lora
from networks.lora import LoraNetwork
from networks.merge import LoraPatch, LoraUse
from tests.networks.making import inputs, tiny_dit, wan_network
from tests.wan.making import in_diffusers
from wan.model import WanModel

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@torch.no_grad()
def run_there(other: WanTransformer3DModel, dit: WanModel) -> Tensor:
    given = inputs(dit)
    texts = torch.stack([torch.nn.functional.pad(text, (0, 0, 0, 512 - len(text))) for text in given["text"]])
    return other(given["noisy"], given["timesteps"], texts, given.get("image_embeds"), return_dict=False)[0]


@torch.no_grad()
def run_here(dit: WanModel, network: LoraNetwork) -> Tensor:
    network.apply_to(None, dit)
    out = dit(**inputs(dit))
    network.remove()
    return out


def load_there(other: WanTransformer3DModel, path: Path) -> None:
    state = WanLoraLoaderMixin.lora_state_dict(str(path))
    other.load_lora_adapter(state, prefix="transformer")


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_a_lora_on_all_modules_acts_in_diffusers_as_here(tmp_path: Path, kind: str, converted: bool) -> None:
    dit = tiny_dit(tmp_path, kind)
    network = wan_network(dit, rank=4, alpha=3.0)
    path = tmp_path / "lora.safetensors"
    network.save_weights(path, torch.float32, {"ss_base_model_version": "wan"})
    if converted:
        convert_file(path, tmp_path / "other.safetensors", "other")
        path = tmp_path / "other.safetensors"
    other = in_diffusers(dit.config, dit.state_dict())
    plain = run_there(other, dit)

    load_there(other, path)

    here = run_here(dit, network)
    torch.testing.assert_close(run_there(other, dit), here, **TOLERANCE)
    assert float((here - plain).abs().max()) > 0.01


@pytest.mark.parametrize(
    "patterns", [r"[r'.*ffn.*', r'.*\.k$']", r"[r'blocks\.0\..*']", r"[r'.*cross_attn.*']"]
)
def test_a_filtered_lora_acts_in_diffusers_once_converted(tmp_path: Path, patterns: str) -> None:
    dit = tiny_dit(tmp_path, "i2v")
    network = wan_network(dit, rank=4, alpha=3.0, exclude_patterns=patterns)
    network.save_weights(tmp_path / "lora.safetensors", torch.float32, {})
    convert_file(tmp_path / "lora.safetensors", tmp_path / "other.safetensors", "other")
    other = in_diffusers(dit.config, dit.state_dict())

    load_there(other, tmp_path / "other.safetensors")

    torch.testing.assert_close(run_there(other, dit), run_here(dit, network), **TOLERANCE)


@pytest.mark.parametrize(
    ("with_settings", "patterns"),
    [
        (False, {}),
        (True, {}),
        (True, {"alpha_pattern": {"to_q": 9, "attn2.to_out.0": 1, "ffn.net.0.proj": 6}}),
        (
            True,
            {
                "alpha_pattern": {"attn1.to_q": 9, "to_q": 1, "proj": 5},
                "rank_pattern": {"to_q": 2, "attn1.to_out.0": 8},
            },
        ),
        (
            True,
            {
                "alpha_pattern": {
                    r"blocks\.[1-9]\d*\.attn\d\.to_.*": 9,
                    "^proj_out$": 1,
                    r"blocks\.0\.(ffn|attn1).*": 2,
                }
            },
        ),
    ],
)
def test_a_lora_saved_by_diffusers_acts_here_as_there(
    tmp_path: Path, with_settings: bool, patterns: dict[str, dict[str, int]]
) -> None:
    dit = tiny_dit(tmp_path)
    other = in_diffusers(dit.config, dit.state_dict())
    alpha = 3 if with_settings else 4  # without settings in the file alpha is the rank
    targets = ["to_q", "to_out.0", "net.0.proj", "time_proj", "proj_out"]
    other.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, **patterns))
    for name, parameter in other.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    if with_settings:
        other.save_lora_adapter(tmp_path, weight_name="lora.safetensors")
    else:
        names = {
            name.replace(".default", ""): tensor
            for name, tensor in other.state_dict().items()
            if "lora_" in name
        }
        save_file(
            {f"transformer.{name}": tensor for name, tensor in names.items()}, tmp_path / "lora.safetensors"
        )

    patch = LoraPatch([LoraUse(read_lora(tmp_path / "lora.safetensors"))])
    merged = {name: patch(name, weight) for name, weight in dit.state_dict().items()}
    patch.check()
    dit.load_state_dict(merged)

    assert patch.unused() == []
    torch.testing.assert_close(dit(**inputs(dit)), run_there(other, dit), **TOLERANCE)
