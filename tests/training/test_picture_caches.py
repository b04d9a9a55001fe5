"""The picture families with caches made inside the training command, and with files of other trainers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.faults.messages import succeed_here
from tests.tiny.families import FAMILIES, TinyFamily

PICTURES = [
    pytest.param(one, id=one.name) for one in FAMILIES if "dataset.toml" in one.train and not one.train_whole
]
TO_DISK = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")


def train(family: TinyFamily, folder: Path, name: str, *arguments: str) -> dict[str, torch.Tensor]:
    output = ["--output_dir", "output", "--output_name", name, "--seed", "1", "--no_page"]
    succeed_here(*family.train, *output, "--max_train_steps", "2", *arguments, folder=folder)
    return load_file(folder / "output" / f"{name}.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("family", PICTURES)
def test_where_caches_are_changes_nothing(family: TinyFamily, tmp_path: Path) -> None:
    family.prepare(tmp_path)

    memory = train(family, tmp_path, "memory", "--cache_latents", "--cache_text_encoder_outputs")
    disk = train(family, tmp_path, "disk", *TO_DISK)
    for path in (tmp_path / "clips").glob("*.npz"):  # as another trainer would have written them
        with np.load(path, allow_pickle=False) as file:
            known = {name: file[name] for name in file.files if not name.startswith("reelsmith")}
        np.savez(path, **known)
    foreign = train(family, tmp_path, "foreign", *TO_DISK)
    succeed_here(*family.cache_latents, folder=tmp_path)
    succeed_here(*family.cache_texts, folder=tmp_path)
    own = train(family, tmp_path, "own")

    assert any(tensor.any() for name, tensor in memory.items() if name.endswith("lora_up.weight"))
    assert same(memory, disk)
    assert same(memory, own)
    assert same(memory, foreign)


@pytest.mark.slow
@pytest.mark.parametrize("family", PICTURES)
def test_a_run_without_caches_encodes_texts_in_each_step(family: TinyFamily, tmp_path: Path) -> None:
    family.prepare(tmp_path)

    live = train(family, tmp_path, "live")
    cached = train(family, tmp_path, "cached", "--cache_latents", "--cache_text_encoder_outputs")

    assert live.keys() == cached.keys()
    assert all(torch.allclose(live[name], cached[name], atol=1e-4) for name in live)
