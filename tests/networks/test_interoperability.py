"""LoRAs saved here load in diffusers and act there as here; those that diffusers and PEFT save load here."""

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from torch import Tensor

from networks.convert import convert_file
from networks.loading import read_lora
from networks.lora_network import OwnNetwork
from networks.metadata import save_network
from tests.hunyuan_model import making as hunyuan
from tests.networks.making import add_lora, inputs, saved_by_diffusers, tiny_dit, wan_network
from tests.wan.making import in_diffusers
from wan.model import WanModel

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@torch.no_grad()
def run_there(other: WanTransformer3DModel, dit: WanModel) -> Tensor:
    given = inputs(dit)
    texts = torch.stack([torch.nn.functional.pad(text, (0, 0, 0, 512 - len(text))) for text in given["text"]])
    return other(given["noisy"], given["timesteps"], texts, given.get("image_embeds"), return_dict=False)[0]


@torch.no_grad()
def run_here(dit: WanModel, network: OwnNetwork) -> Tensor:
    network.attach()
    out = dit(**inputs(dit))
    network.set_multiplier(0.0)
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
    save_network(network, path, torch.float32, {"ss_base_model_version": "wan"})
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
    path = saved_by_diffusers(other, tmp_path / "lora.safetensors", targets, alpha, with_settings, **patterns)

    torch.testing.assert_close(add_lora(dit, path)(**inputs(dit)), run_there(other, dit), **TOLERANCE)


@pytest.mark.parametrize("target", [None, "default", "other"])
def test_a_lora_with_biases_acts_as_in_diffusers(tmp_path: Path, target: str | None) -> None:
    dit = tiny_dit(tmp_path)
    other = in_diffusers(dit.config, dit.state_dict())
    path = tmp_path / "lora.safetensors"
    saved_by_diffusers(other, path, ["to_q", "net.2"], 3, lora_bias=True)
    plain = in_diffusers(dit.config, dit.state_dict())
    expected = run_there(other, dit)
    if target is not None:
        convert_file(path, tmp_path / "converted.safetensors", target)
        path = tmp_path / "converted.safetensors"

    torch.testing.assert_close(add_lora(dit, path)(**inputs(dit)), expected, **TOLERANCE)
    assert float((expected - run_there(plain, dit)).abs().max()) > 0.01
    if target == "other":  # which diffusers reads again
        load_there(plain, path)
        torch.testing.assert_close(run_there(plain, dit), expected, **TOLERANCE)


@torch.no_grad()
def test_biases_of_the_parts_of_fused_weights_are_put_together(tmp_path: Path) -> None:
    theirs, dit, given = hunyuan.in_diffusers("t2v"), hunyuan.tiny_model("t2v"), hunyuan.tiny_inputs("t2v")
    targets, settings = (
        r".*\.(to_q|to_v|add_k_proj|proj_mlp)",
        {"alpha_pattern": {"to_q": 9}, "lora_bias": True},
    )
    path = saved_by_diffusers(theirs, tmp_path / "lora.safetensors", targets, 3, **settings)
    convert_file(path, tmp_path / "fused.safetensors", "default")

    add_lora(dit, tmp_path / "fused.safetensors")

    assert any("linear1.lora_up.bias" in name for name in read_lora(tmp_path / "fused.safetensors").tensors)
    torch.testing.assert_close(dit(**given), hunyuan.run_there(theirs, given), **TOLERANCE)
