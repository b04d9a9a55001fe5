"""LoRA on HunyuanVideo: fidelity, files of other tools, conversion, merging, names."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hunyuan_model.checkpoints import load_dit
from modules.contract.loading import Placement
from networks.apply import LoraPatch
from networks.loading import LoraUse, read_lora
from networks.merging import merge_into_file
from networks.module_names import relatives, replace_dots
from networks.names.video import HUNYUAN_VIDEO
from tests.golden_cases import read_case
from tests.hunyuan_model.making import golden_model
from tests.manifests import tensor_list
from tests.networks.making import assert_recorded, golden_lora, saved_with_points
from tests.networks.making_hunyuan import assert_near, run_here, saved
from tests.tiny.hunyuan_dit import comfy_state, diffusers_parts, tiny_state, write_dit
from tests.tiny.loras import make_lora

CPU = torch.device("cpu")


def test_forward_loss_and_gradients_equal_the_recorded_ones() -> None:
    description, tensors = read_case("hv_lora")
    settings = description["lora"]
    dit, inputs, _ = golden_model("hv_dit_guidance")
    network = make_lora("lora_hunyuan", settings["rank"], settings["alpha"], dit)
    found = [
        [name, layer.lora_down.in_features, layer.lora_up.out_features]
        for name, layer in network.named_children()
    ]
    assert found == settings["modules_name_in_out"]
    golden_lora(network, settings["weights_model_key"], settings["lora_up_extra_scale"])
    network.attach()
    sigmas = torch.tensor(description["t_in_0_1"]).view(-1, 1, 1, 1, 1)
    inputs |= {
        "noisy": (1 - sigmas) * tensors["latents"] + sigmas * tensors["noise"],
        "timesteps": tensors["timesteps"],
        "llama": tensors["text_states"],
        "llama_mask": tensors["text_mask"],
        "clip_l": tensors["text_states_2"],
        "guidance": torch.ones(2),
    }

    out = dit(**inputs)
    loss = nn.functional.mse_loss(out, tensors["noise"] - tensors["latents"])
    loss.backward()

    torch.testing.assert_close(out, tensors["out"], rtol=0, **description["tolerance"]["out"])
    assert_near(out.detach(), tensors["out"])
    assert_recorded(network, dit, loss, description, tensors)


@pytest.mark.parametrize("start", ["diffusion_model.", "transformer.", "base_model.model."])
@pytest.mark.parametrize("state", [comfy_state, dict], ids=["ComfyUI", "official"])
def test_files_of_diffusion_pipe_and_comfyui_act_as_ours(
    tmp_path: Path, state: Callable[[dict[str, Tensor]], dict[str, Tensor]], start: str
) -> None:
    network = saved(tmp_path / "ours.safetensors", alpha=4)
    saved_with_points(network, tmp_path / "theirs.safetensors", HUNYUAN_VIDEO, start, state)

    out = run_here("t2v", tmp_path / "theirs.safetensors")

    assert torch.equal(out, run_here("t2v", tmp_path / "ours.safetensors"))


@pytest.mark.parametrize(
    "dialect", ["pt_wrapped", "safetensors", "prefixed", "comfy", "comfy_all_in_one", "diffusers_sharded"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layout_of_a_model_is_merged_to_the_same(
    tmp_path: Path, dialect: str, dtype: torch.dtype
) -> None:
    saved(tmp_path / "ours.safetensors")
    uses = [LoraUse(read_lora(tmp_path / "ours.safetensors"), 0.5)]
    state = tiny_state(dtype=dtype)

    merge_into_file(write_dit(tmp_path, state, dialect), uses, tmp_path / "merged.safetensors", CPU)

    patch = LoraPatch(uses)
    merged = load_dit(tmp_path / "merged.safetensors", Placement(CPU)).state_dict()
    for name, tensor in state.items():
        assert torch.equal(merged[name].to(dtype), patch(name, tensor)), name
    assert patch.unused() == []


def test_every_module_of_the_diffusers_layout_finds_what_it_is_part_of() -> None:
    for name in tensor_list("hunyuanvideo-t2v-dit"):
        path = replace_dots(name.removesuffix(".weight"))
        if not name.endswith(".weight") or path.endswith(("_norm1", "_norm2")):
            continue
        parts = [replace_dots(part.removesuffix(".weight")) for part in diffusers_parts(name)]
        assert [relative.name for relative in relatives(path, HUNYUAN_VIDEO)][: len(parts)] == parts
        for part in parts:
            assert [relative.name for relative in relatives(part, HUNYUAN_VIDEO)] == [path]
