"""LoRA on FramePack: fidelity, files of its own, and files that go to and come from diffusers."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoFramepackPipeline
from torch import Tensor, nn

from networks.convert import convert_file
from networks.metadata import save_network
from tests.frame_pack.making import golden_model, in_diffusers, run_there, tiny_inputs, tiny_model
from tests.golden_cases import FLOAT32_POWERS, read_case
from tests.networks.making import add_lora, assert_recorded, golden_lora, randomize, saved_by_diffusers
from tests.tiny.loras import make_lora

NEAR = 5e-6  # of the largest value; float32, summed in another order


def test_forward_loss_and_gradients_equal_the_recorded_ones() -> None:
    description, tensors = read_case("framepack_lora")
    settings, sigma = description["lora"], description["t_in_0_1"]
    dit, inputs, _ = golden_model()
    network = make_lora("lora_framepack", settings["rank"], settings["alpha"], dit)
    found = [
        [name, layer.lora_down.in_features, layer.lora_up.out_features]
        for name, layer in network.named_children()
    ]
    assert found == settings["modules_name_in_out"]
    golden_lora(network, settings["weights_model_key"], settings["lora_up_extra_scale"])
    network.attach()
    inputs |= {
        "noisy": (1 - sigma) * tensors["latents"] + sigma * tensors["noise"],
        "timesteps": tensors["timestep"],
        "guidance": torch.tensor([10000.0]),
    }

    out = dit(**inputs)
    loss = nn.functional.mse_loss(out, tensors["noise"] - tensors["latents"])
    loss.backward()

    assert (out - tensors["out"]).abs().max() <= FLOAT32_POWERS * tensors["out"].abs().max()
    assert_recorded(network, dit, loss, description, tensors)


# Files that go to and come from diffusers

IN_DIFFUSERS = {
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],
    "blocks": r".*blocks\.\d+\..*(to_\w|to_out\.0|add_\w_proj|to_add_out|"
    r"net\.0\.proj|net\.2|proj_mlp|proj_out|linear)",
    "last": r"norm_out\.linear|proj_out|time_text_embed.timestep_embedder.linear_2",
    "its own": r"image_projection\.\w+|clean_x_embedder\.proj\w*|.*to_v",
}


@torch.no_grad()
def run_here(path: Path) -> Tensor:
    """What the model with a LoRA file added gives."""
    return add_lora(tiny_model(), path)(**tiny_inputs())


def made_there(folder: Path, targets: Any, alpha: int, with_settings: bool = True) -> tuple[Path, Tensor]:
    """A LoRA that diffusers saves, and what its model gives with it."""
    theirs = in_diffusers()
    path = saved_by_diffusers(theirs, folder / "theirs.safetensors", targets, alpha, with_settings)
    with torch.no_grad():
        return path, run_there(theirs, tiny_inputs())


def load_there(theirs: Any, path: Path) -> None:
    """Load a LoRA file by the pipeline that users of diffusers call, of which only the transformer is
    there.
    """
    others = {
        name: None
        for name in inspect.signature(HunyuanVideoFramepackPipeline).parameters
        if name != "transformer"
    }
    HunyuanVideoFramepackPipeline(transformer=theirs, **others).load_lora_weights(
        str(path.parent), weight_name=path.name
    )


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= NEAR * expected.abs().max()


@pytest.mark.parametrize(
    "arguments", [{}, {"exclude_patterns": r"[r'.*ff.*', r'single_transformer_blocks\.1\..*']"}]
)
def test_a_lora_made_here_acts_in_diffusers_as_here(tmp_path: Path, arguments: dict[str, str]) -> None:
    network = make_lora("lora_framepack", 4, 3.0, tiny_model(), **arguments)
    randomize(network)
    save_network(
        network, tmp_path / "lora.safetensors", torch.float32, {"ss_base_model_version": "framepack"}
    )
    convert_file(tmp_path / "lora.safetensors", tmp_path / "other.safetensors", "other")
    theirs = in_diffusers()

    load_there(theirs, tmp_path / "other.safetensors")

    layers = {name for name, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert len(layers) == len(network.layers)

    with torch.no_grad():
        expected, plain = run_there(theirs, tiny_inputs()), tiny_model()(**tiny_inputs())
    assert_near(run_here(tmp_path / "lora.safetensors"), expected)
    assert (expected - plain).abs().max() > 0.01


@pytest.mark.parametrize("with_settings", [True, False])
@pytest.mark.parametrize("targets", IN_DIFFUSERS)
def test_a_lora_that_diffusers_saves_acts_here_as_there(
    tmp_path: Path, targets: str, with_settings: bool
) -> None:
    alpha = 3 if with_settings else 4  # without settings in the file alpha is the rank
    path, expected = made_there(tmp_path, IN_DIFFUSERS[targets], alpha, with_settings)

    out = run_here(path)

    assert_near(out, expected)
    assert (out - tiny_model()(**tiny_inputs())).abs().max() > 1e-3
