"""LoRA on FramePack: fidelity, and files of its own."""

from pathlib import Path

import pytest
import torch
from torch import nn

from frame_pack.checkpoints import load_dit
from modules.records import Placement
from networks import lora_framepack
from networks.loading import import_network_module, read_lora
from networks.merge import LoraPatch, LoraUse
from tests.frame_pack.making import golden_model, tiny_inputs, tiny_model
from tests.golden_cases import read_case
from tests.networks.making import golden_lora, randomize
from tests.tiny.framepack_dit import tiny_state, write_dit

NEAR = 5e-6  # of the largest value; float32, summed in another order


def test_forward_loss_and_gradients_equal_the_recorded_ones() -> None:
    description, tensors = read_case("framepack_lora")
    settings, sigma = description["lora"], description["t_in_0_1"]
    dit, inputs, _ = golden_model()
    network = lora_framepack.create_arch_network(1.0, settings["rank"], settings["alpha"], None, None, dit)
    found = [[name, layer.lora_down.in_features, layer.lora_up.out_features] for name, layer in network.named_children()]
    assert found == settings["modules_name_in_out"]
    golden_lora(network, settings["weights_model_key"], settings["lora_up_extra_scale"])
    network.apply_to(None, dit)
    inputs |= {
        "noisy": (1 - sigma) * tensors["latents"] + sigma * tensors["noise"],
        "timesteps": tensors["timestep"],
        "guidance": torch.tensor([10000.0]),
    }

    out = dit(**inputs)
    loss = nn.functional.mse_loss(out, tensors["noise"] - tensors["latents"])
    loss.backward()

    assert (out - tensors["out"]).abs().max() <= NEAR * tensors["out"].abs().max()
    torch.testing.assert_close(loss.detach().view(1), tensors["loss"], atol=0, **description["tolerance"]["loss"])
    rtol = description["tolerance"]["grads"]["rtol"]
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        total, norm = description["grad_sum_and_l2norm"][name]
        assert float(parameter.grad.norm()) == pytest.approx(norm, rel=rtol)
        assert float(parameter.grad.sum()) == pytest.approx(total, rel=rtol, abs=rtol * norm)
    assert all(parameter.grad is None for parameter in dit.parameters())


def test_a_model_loaded_with_a_lora_equals_one_with_the_network_attached(tmp_path: Path) -> None:
    dit = tiny_model()
    module = import_network_module("networks.lora_framepack")
    network = module.create_arch_network(1.0, 4, 3.0, None, None, dit)
    randomize(network)
    network.save_weights(tmp_path / "lora.safetensors", torch.float32, {"ss_base_model_version": "framepack"})
    network.apply_to(None, dit)

    patch = LoraPatch([LoraUse(read_lora(tmp_path / "lora.safetensors"), 1.0)])
    loaded = load_dit(write_dit(tmp_path, tiny_state(), "folder"), Placement(torch.device("cpu"), patch=patch))

    assert patch.unused() == []
    with torch.no_grad():
        found, attached, plain = (one(**tiny_inputs()) for one in (loaded, dit, tiny_model()))
    assert (found - attached).abs().max() <= NEAR * attached.abs().max()
    assert (attached - plain).abs().max() > 0.01 * plain.abs().max()
