"""Files of HunyuanVideo and SkyReels V1 transformers: what only they have, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints.model_files import read_once
from hunyuan_model.checkpoints import identify, load_dit, read_dit_header
from modules.errors import CheckpointError
from protocols.loading import Placement
from tests.hunyuan_model.making import tiny_inputs
from tests.manifests import tensor_list, write_hollow
from tests.tiny.hunyuan_dit import tiny_state, write_dit

CPU = Placement(torch.device("cpu"))
META = Placement(torch.device("meta"))


def test_the_scales_of_the_official_map_are_exact(tmp_path: Path) -> None:
    path = write_dit(tmp_path, tiny_state(), "fp8_map")
    stored, scales = torch.load(path)["module"], torch.load(tmp_path / "mp_rank_00_model_states_fp8_map.pt")

    dit = load_dit(path, replace(CPU, compute_dtype=torch.float32))

    for name, scale in scales.items():
        assert torch.equal(dit.get_parameter(f"{name}.weight"), stored[f"{name}.weight"].float() * scale)


def test_fp8_weights_without_their_map_are_refused(tmp_path: Path) -> None:
    path = write_dit(tmp_path, tiny_state(), "fp8_map")
    (tmp_path / "mp_rank_00_model_states_fp8_map.pt").unlink()

    with pytest.raises(
        CheckpointError, match="mp_rank_00_model_states_fp8_map.pt, which is missing next to it"
    ):
        load_dit(path, CPU)


def test_a_map_of_another_file_is_refused(tmp_path: Path) -> None:
    path = write_dit(tmp_path, tiny_state(), "fp8_map")
    torch.save({"blocks.0": 1.0}, tmp_path / "mp_rank_00_model_states_fp8_map.pt")
    with pytest.raises(CheckpointError, match="has no scale for double_blocks.0.img_mod.linear.weight"):
        load_dit(path, CPU)

    torch.save([1.0], tmp_path / "mp_rank_00_model_states_fp8_map.pt")
    with pytest.raises(CheckpointError, match="is not a map of scales"):
        load_dit(path, CPU)


@pytest.mark.parametrize("part", ["blocks.", "txt_in."])
def test_a_mixed_file_keeps_its_dtypes_on_request_and_runs(tmp_path: Path, part: str) -> None:
    state = {
        name: tensor.to(torch.bfloat16)
        if part in name and name.endswith("weight") and tensor.ndim == 2
        else tensor
        for name, tensor in tiny_state().items()
    }

    dit = load_dit(write_dit(tmp_path, state), replace(CPU, keep_file_dtypes=True))

    assert dit.get_parameter("txt_in.input_embedder.weight").dtype == (
        torch.bfloat16 if part == "txt_in." else torch.float32
    )
    assert dit.get_parameter("single_blocks.0.linear1.bias").dtype == (
        torch.bfloat16 if part == "blocks." else torch.float32
    )
    velocity = dit(**tiny_inputs("t2v"))
    assert velocity.dtype == torch.float32
    assert (
        velocity - load_dit(write_dit(tmp_path, tiny_state()), CPU)(**tiny_inputs("t2v"))
    ).abs().max() < 0.1


@pytest.mark.parametrize(
    ("manifest", "what"),
    [
        ("framepack-dit", "a FramePack transformer"),
        ("hunyuanimage2.1-dit", "a HunyuanImage 2.1 transformer"),
        ("flux1-dev-dit", "a FLUX transformer"),
        ("chroma1-dit", "a Chroma transformer"),
        ("wan2.1-t2v-1.3b", "a Wan transformer"),
        ("umt5-xxl-comfy", "a T5 encoder"),
        ("hunyuanvideo-vae", "the HunyuanVideo VAE"),
        ("clip-vision-h", "a CLIP image encoder"),
    ],
)
def test_another_model_is_refused_by_name(tmp_path: Path, manifest: str, what: str) -> None:
    path = write_hollow(tmp_path / "other.safetensors", tensor_list(manifest))

    with pytest.raises(CheckpointError, match=what) as caught:
        load_dit(path, META)

    assert caught.value.path == path


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({"img_in.proj.weight": torch.zeros(128, 33, 1, 2, 2)}, "HunyuanVideo-I2V with 33 input channels"),
        (
            {"img_in.proj.weight": torch.zeros(128, 20, 1, 2, 2)},
            "an unknown variant of HunyuanVideo with 20 input channels",
        ),
        ({"cond_type_embedding.weight": torch.zeros(3, 2)}, "a HunyuanVideo 1.5 transformer"),
    ],
)
def test_relatives_are_refused_by_name(tmp_path: Path, tensors: dict[str, torch.Tensor], what: str) -> None:
    with pytest.raises(CheckpointError, match=f"{what}, which is not supported"):
        load_dit(write_dit(tmp_path, tiny_state() | tensors), CPU)


def test_a_lora_is_refused_as_one(tmp_path: Path) -> None:
    save_file(
        {"diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight": torch.zeros(2)},
        tmp_path / "x.safetensors",
    )

    with pytest.raises(CheckpointError, match="it looks like a LoRA"):
        load_dit(tmp_path / "x.safetensors", CPU)


def test_a_file_of_framepack_is_known(tmp_path: Path) -> None:
    framepack = write_hollow(tmp_path / "framepack.safetensors", tensor_list("framepack-dit"))
    assert identify(framepack) == "it looks like a FramePack transformer"


def test_heads_that_cannot_be_rotated_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="width 128 with heads of 16"):
        read_once(write_dit(tmp_path, tiny_state(num_heads=8)), read_dit_header)
