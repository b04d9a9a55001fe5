"""--save_merged_model with two experts: a file for each."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import wan_generate_video
from modules.contract.rules import HIGH_NOISE, LOW_NOISE
from modules.errors import CheckpointError, OptionError
from networks.apply import LoraPatch
from networks.loading import LoraUse, read_lora
from tests.tiny.wan import TinyWan, write_tiny_wan


def write_lora(path: Path, *networks: str, width: int = 128) -> Path:
    """A LoRA of one module of each of these networks of diffusers' pipeline."""
    made, tensors = torch.Generator().manual_seed(len(path.stem)), dict[str, Tensor]()
    for network in networks or ("transformer",):
        name = f"{network}.blocks.0.attn1.to_q.lora_"
        tensors[f"{name}A.weight"] = torch.randn(2, width, generator=made)
        tensors[f"{name}B.weight"] = torch.randn(width, 2, generator=made)
    save_file(tensors, path)
    return path


def merge(files: TinyWan, output: Path, *more: object) -> None:
    models = [*files.models, "--task", "t2v-A14B", "--save_path", output.parent, "--device", "cpu"]
    wan_generate_video.main([str(each) for each in (*models, "--save_merged_model", output, *more)])


def merged_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("m*"))


@pytest.mark.parametrize("is_one_file", [False, True])
def test_the_file_of_each_expert_has_its_own_loras(
    tmp_path: Path, is_one_file: bool, caplog: pytest.LogCaptureFixture
) -> None:
    files = write_tiny_wan(tmp_path, experts=2)
    names = [("both", "transformer", "transformer_2")] * 2 if is_one_file else [("low",), ("high",)]
    low, high = (write_lora(tmp_path / f"{name}.safetensors", *networks) for name, *networks in names)

    merge(files, tmp_path / "m.safetensors", "--lora_weight", low, "--lora_weight_high_noise", high)

    assert merged_files(tmp_path) == ["m_high_noise.safetensors", "m_low_noise.safetensors"]
    for model, lora, expert in ((files.dit, low, LOW_NOISE), (files.dit_high_noise, high, HIGH_NOISE)):
        assert model is not None
        patch = LoraPatch([LoraUse(read_lora(lora, by_expert=True)).for_expert(expert)])
        found = load_file(tmp_path / f"m_{expert}.safetensors")
        for name, tensor in load_file(model).items():
            assert torch.equal(found[name], patch(name, tensor)), name
    assert "is loaded into the" not in caplog.text


def test_nothing_is_written_if_one_expert_cannot_be(tmp_path: Path) -> None:
    files = write_tiny_wan(tmp_path, experts=2)
    fits, wide = write_lora(tmp_path / "a.safetensors"), write_lora(tmp_path / "w.safetensors", width=64)

    with pytest.raises(CheckpointError, match="does not fit"):
        merge(files, tmp_path / "m.safetensors", "--lora_weight", fits, "--lora_weight_high_noise", wide)
    with pytest.raises(OptionError, match="nothing to merge"):
        merge(files, tmp_path / "m.safetensors")
    assert not merged_files(tmp_path)
