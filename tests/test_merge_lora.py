"""merge_lora.py through its command line."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import merge_lora
from frame_pack.checkpoints import load_dit as load_framepack
from modules.contract.loading import Placement
from modules.errors import CheckpointError
from networks.apply import LoraPatch
from networks.loading import LoraUse, read_lora
from networks.metadata import save_network
from tests.frame_pack.making import tiny_model as tiny_framepack
from tests.networks.making import randomize, tiny_dit, wan_network
from tests.networks.making_hunyuan import saved as saved_hunyuan_lora
from tests.tiny import framepack_dit
from tests.tiny.loras import make_lora
from tests.tiny.wan_dit import diffusers_name, tiny_state, write_dit


def merge(*arguments: object) -> None:
    merge_lora.main([*map(str, arguments), "--device", "cpu"])


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    path = tmp_path / "lora.safetensors"
    save_network(wan_network(tiny_dit(tmp_path / "model")), path, torch.bfloat16, {})
    return path


@pytest.mark.parametrize(
    "dialect", ["pth", "safetensors", "sharded", "prefixed", "all_in_one", "diffusers", "diffusers_sharded"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layout_of_a_model_is_merged_under_its_own_names(
    tmp_path: Path, lora: Path, dialect: str, dtype: torch.dtype
) -> None:
    state = tiny_state("t2v", dtype=dtype)
    model = write_dit(tmp_path, state, dialect)

    merge(
        *("--dit", model, "--lora_weight", lora, "--lora_multiplier", 0.5),
        *("--save_merged_model", tmp_path / "merged.safetensors"),
    )

    patch = LoraPatch([LoraUse(read_lora(lora), 0.5)])
    expected = {name: patch(name, tensor) for name, tensor in state.items()}
    merged = load_file(tmp_path / "merged.safetensors")
    for name, tensor in expected.items():
        stored = diffusers_name(name) if "diffusers" in dialect else name
        stored = f"model.diffusion_model.{name}" if dialect in {"prefixed", "all_in_one"} else stored
        assert torch.equal(merged[stored], tensor), name
    assert len(merged) == len(expected) + (2 if dialect == "all_in_one" else 0)


def test_metadata_are_kept_but_for_stale_hashes(tmp_path: Path, lora: Path) -> None:
    save_file(
        tiny_state("t2v"),
        tmp_path / "dit.safetensors",
        metadata={"modelspec.title": "A title", "modelspec.hash_sha256": "0x1"},
    )

    merge(
        *("--dit", tmp_path / "dit.safetensors", "--lora_weight", lora),
        *("--save_merged_model", tmp_path / "out.safetensors"),
    )

    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {
            "modelspec.title": "A title",
            "modelspec.merged_from": "dit.safetensors, lora.safetensors",
        }


@pytest.mark.parametrize("dialect", ["fp8", "fp8_scaled"])
def test_fp8_weights_are_refused(tmp_path: Path, lora: Path, dialect: str) -> None:
    model = write_dit(tmp_path, tiny_state("t2v"), dialect)

    with pytest.raises(CheckpointError, match="too coarse to add a LoRA to"):
        merge("--dit", model, "--lora_weight", lora, "--save_merged_model", tmp_path / "out.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dialect", framepack_dit.DIALECTS)
def test_framepacks_and_hunyuans_loras_are_merged_into_every_layout_of_framepack(
    tmp_path: Path, dialect: str, dtype: torch.dtype
) -> None:
    own = make_lora("lora_framepack", 4, 3.0, tiny_framepack())
    randomize(own)
    save_network(own, tmp_path / "own.safetensors", torch.bfloat16, {"ss_base_model_version": "framepack"})
    saved_hunyuan_lora(tmp_path / "hv.safetensors", dtype=torch.bfloat16)
    state = framepack_dit.tiny_state(dtype=dtype)
    model = framepack_dit.write_dit(tmp_path / "model", state, dialect)
    loras, output = (tmp_path / "own.safetensors", tmp_path / "hv.safetensors"), tmp_path / "out.safetensors"

    merge(
        "--dit", model, "--lora_weight", *loras, "--lora_multiplier", 0.5, -2, "--save_merged_model", output
    )

    patch = LoraPatch(
        [LoraUse(read_lora(path), multiplier) for path, multiplier in zip(loras, (0.5, -2), strict=True)]
    )
    merged = load_framepack(output, Placement(torch.device("cpu"))).state_dict()
    for name, tensor in state.items():
        assert torch.equal(merged[name].to(dtype), patch(name, tensor)), name
    assert patch.unused() == []
    changed = [name for name, tensor in state.items() if not torch.equal(merged[name].to(dtype), tensor)]
    assert len(changed) == len(own.layers) == 2 * 12 + 3 * 5
