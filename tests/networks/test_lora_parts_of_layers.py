"""LoRAs whose fused layers have factors of their own for q, k, v; and noise on weights (LoRA-GGPO)."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from networks.deltas import group_by_module, weight_delta
from networks.loading import read_lora
from networks.lora_network import OwnNetwork
from networks.metadata import save_network
from tests.golden_cases import read_case
from tests.networks.test_lora_image_families import skeleton
from tests.tiny.loras import make_lora

QKV, LINEAR1 = "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"
CPU = torch.device("cpu")


def small(**arguments: str) -> tuple[nn.Module, OwnNetwork]:
    """A network of three layers, 6 wide, and its LoRA of rank 2 and alpha 1 with random factors."""
    shapes = {QKV: (18, 6), LINEAR1: (42, 6), "single_blocks.0.linear2": (6, 30)}
    dit = skeleton(shapes).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in dit.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    made: OwnNetwork = make_lora("lora_flux", 2, 1.0, dit, **arguments)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    made.attach()
    return dit, made


def test_files_have_the_recorded_tensors_and_alphas() -> None:
    case, _ = read_case("lora_flux_split_qkv")
    table = case["lora"]["modules_name_in_out"]
    paths = {name: name.removeprefix("lora_unet_") for name, _, _ in table}
    for text in ("blocks_", "img_attn_", "txt_attn_", "img_mlp_", "txt_mlp_", "img_mod_", "txt_mod_"):
        paths = {name: path.replace(text, text[:-1] + ".") for name, path in paths.items()}
    for number in "01":
        paths = {n: p.replace(f"blocks.{number}_", f"blocks.{number}.") for n, p in paths.items()}
    paths = {name: path.replace("modulation_", "modulation.") for name, path in paths.items()}
    dit = skeleton(
        {
            paths[name]: (sum(rows) if isinstance(rows, list) else rows, columns)
            for name, columns, rows in table
        }
    )

    made = make_lora("lora_flux", 4, 2.0, dit, split_qkv="True")

    stored = made.state_dict()
    assert {name: list(tensor.shape) for name, tensor in stored.items()} == dict(case["file"]["tensors"])
    for name, alpha in case["file"]["alpha"].items():
        assert float(stored[f"{name}.alpha"]) == alpha


@pytest.mark.parametrize("path", [QKV, LINEAR1])
def test_each_part_learns_with_factors_of_its_own(path: str) -> None:
    dit, made = small(split_qkv="True")
    layer = dit.get_submodule(path)
    name = "lora_unet_" + path.replace(".", "_")
    x = torch.randn(3, 6)

    out = layer(x)

    factors = group_by_module(made.state_dict())[name]
    delta = weight_delta(factors, CPU)
    assert delta is not None
    torch.testing.assert_close(out, nn.functional.linear(x, layer.weight + delta, layer.bias))
    parts = len(factors["lora_down.weight"]) // 2
    up = factors["lora_up.weight"]  # the rows of q know the first two ranks only
    assert up[:6, 2:].count_nonzero() == 0
    assert float(factors["alpha"]) == parts
    assert made.get_parameter(f"{name}.lora_up.weight").shape == (len(up), 2)


def test_a_file_with_split_factors_goes_back_into_them(tmp_path: Path) -> None:
    _, made = small(split_qkv="True")
    save_network(made, tmp_path / "lora.safetensors", None, {})
    _, other = small(split_qkv="True")
    with torch.no_grad():
        other.get_parameter("lora_unet_single_blocks_0_linear1.lora_up.weight").zero_()

    other.load_weights(tmp_path / "lora.safetensors")

    for name, parameter in made.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


def test_split_files_of_sd_scripts_have_the_strength_that_they_were_trained_with(tmp_path: Path) -> None:
    _, made = small(split_qkv="True")
    state = made.state_dict()
    theirs = {name: torch.tensor(1.0) if name.endswith("alpha") else tensor for name, tensor in state.items()}
    metadata = {"ss_network_args": json.dumps({"split_qkv": "True"}), "ss_network_alpha": "1.0"}
    save_file(theirs, tmp_path / "theirs.safetensors", metadata)
    save_file(state, tmp_path / "ours.safetensors", metadata)
    save_file(theirs, tmp_path / "unsaid.safetensors")

    read = {
        name: read_lora(tmp_path / f"{name}.safetensors").tensors for name in ("theirs", "ours", "unsaid")
    }

    alpha = "lora_unet_single_blocks_0_linear1.alpha"
    assert [float(tensors[alpha]) for tensors in read.values()] == [4, 4, 1]


def test_keys_and_values_with_fewer_heads_are_parts_too() -> None:
    dit = skeleton({"layers.0.attention.qkv": (10, 6)})

    made = make_lora("lora_lumina", 2, 1.0, dit, split_qkv="True")

    assert made.layers[0].lora_up.heights == (6, 2, 2)


def test_norms_of_split_layers_are_limited_by_their_whole_change() -> None:
    _, made = small(split_qkv="True")
    with torch.no_grad():
        made.scale_norms(0.5, torch.device("cpu"))

    for factors in group_by_module(made.state_dict()).values():
        delta = weight_delta(factors, CPU)
        assert delta is not None
        assert float(delta.norm()) <= 0.5 * (1 + 1e-5)


def strengths(layer: nn.Module, weight: Tensor, sigma: float, beta: float) -> Tensor:
    """The formula of the paper, with whole matrices."""
    up, down = layer.lora_up.weight, layer.lora_down.weight
    gradient = layer.scale * (up @ down.grad + up.grad @ down)
    base = weight.norm(dim=1).mean()
    norms = (base**2 + (up @ down).square().sum(1)).sqrt()
    return (sigma * norms + beta * gradient.square().sum(1)) / math.sqrt(len(weight))


def test_noise_on_weights_is_as_strong_as_weights_and_gradients() -> None:
    dit, made = small(ggpo_sigma="0.03", ggpo_beta="0.01")
    layer, lora = dit.get_submodule(QKV), made.get_submodule("lora_unet_double_blocks_0_img_attn_qkv")
    x = torch.randn(4, 6, requires_grad=True)
    made.set_dropout_seed(5)
    calm = layer(x)
    calm.square().sum().backward()

    made.before_optimizer_step()

    expected = strengths(lora, layer.weight, 0.03, 0.01)
    torch.testing.assert_close(getattr(*lora.noise_of), expected)
    noisy = layer(x)
    assert torch.equal(noisy, layer(x))
    assert not torch.equal(noisy, calm)
    made.set_dropout_seed(6)
    assert not torch.equal(noisy, layer(x))
    made.eval()
    assert torch.equal(layer(x), calm)


def test_gradients_of_inputs_go_through_the_noise_that_the_output_had() -> None:
    dit, made = small(ggpo_sigma="0.5", ggpo_beta="0")
    layer = dit.get_submodule(QKV)
    made.set_dropout_seed(5)
    layer(torch.randn(4, 6)).sum().backward()
    made.before_optimizer_step()
    x = torch.randn(1, 6, requires_grad=True)

    (gradient,) = torch.autograd.grad(layer(x).sum(), x)

    unit = torch.eye(6)
    matrix = layer(unit) - layer(torch.zeros(6, 6))  # the layer's whole matrix, noise and all
    torch.testing.assert_close(gradient, matrix.sum(1)[None], rtol=1e-4, atol=1e-4)


def test_noise_is_saved_beside_the_file() -> None:
    _, made = small(ggpo_sigma="0.03", ggpo_beta="0.01")

    assert set(made.state_beside_file) == {"ggpo"}
    assert len(made.state_beside_file["ggpo"].state_dict()) == len(made.layers)
    assert not any("ggpo" in name for name in made.state_dict())
