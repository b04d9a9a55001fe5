"""`--max_shard_size`: trained models as folders of several files, of every family that trains all weights."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from checkpoints.shard_options import INDEX, MODEL
from modules.text_files import read_text
from tests.faults.messages import succeed_here
from tests.tiny.families import FAMILIES, OUTPUT, TinyFamily
from tests.tiny.further_families import FURTHER
from tests.tiny.runs import make_project

# a single file of it has no other network, so that further options name those
ALL_IN_ONE = {"ltx_2 with sound"}
FULL = [family for family in (*FAMILIES, *FURTHER) if family.train_full]
DAILY = "krea2"
ENDS = ("--network_module", "--network_dim")
SIZE = ("--video_size", "32", "32", "--infer_steps", "2")
RATE = ("--learning_rate", "1e-3")


def full_words(family: TinyFamily) -> list[str]:
    end = next(place for place, word in enumerate(family.train) if word in ENDS)
    return [family.train_full, *family.train[1:end], *OUTPUT, *RATE]


def replace_dit(words: list[str], trained: str) -> list[str]:
    """A command with another transformer."""
    flags = ("--dit", "--pretrained_model_name_or_path", "--ltx2_checkpoint")
    flag = next(flag for flag in flags if flag in words)
    place = words.index(flag) + 1
    return [*words[:place], trained, *words[place + 1 :]]


def read_index(folder: Path) -> dict[str, Any]:
    return json.loads(read_text(folder / f"{MODEL}{INDEX}"))


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder, as its index says where they are."""
    files = {name: load_file(folder / name) for name in {*read_index(folder)["weight_map"].values()}}
    return {tensor: files[name][tensor] for tensor, name in read_index(folder)["weight_map"].items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []


def find_images(folder: Path) -> list[bytes]:
    return [
        path.read_bytes() for path in sorted(folder.rglob("*")) if path.suffix in (".png", ".mp4", ".wav")
    ]


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, id=family.name, marks=[pytest.mark.slow] * (family.name != DAILY))
        for family in FULL
    ],
)
def test_a_folder_of_shards_is_used_as_the_single_file_of_the_same_run(
    family: TinyFamily, tmp_path: Path
) -> None:
    """Each save; a second training that begins with it, and a resumed one."""
    make_project(family, tmp_path)
    words = [*full_words(family), "--max_train_steps", "2"]
    succeed_here(*words, "--output_dir", "single", folder=tmp_path)
    single = load_file(tmp_path / "single" / "lora.safetensors")
    sharded = [*words, "--max_shard_size", "40kB", "--save_every_n_steps", "1", "--save_state"]

    said = succeed_here(*sharded, folder=tmp_path)

    folder = tmp_path / "output" / "lora"
    assert_equal(read_folder(folder), single)
    assert not list((tmp_path / "output").glob("*.safetensors"))
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    count = len(shards)
    assert count > 1
    assert shards == [
        f"diffusion_pytorch_model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    commands = [shlex.split(line) for line in said.splitlines() if f"{family.generate[0]} " in line]
    assert "output/lora" in commands[-1]
    with safe_open(folder / shards[0], "pt") as file, safe_open(folder / shards[-1], "pt") as last:
        assert file.metadata()["ss_output_name"] == "lora"
        assert file.metadata() == last.metadata()

    generate = [*family.generate, *SIZE, "--prompt", "a cat", "--seed", "3", "--no_metadata", "--save_path"]
    if family.name not in ALL_IN_ONE:
        for trained, place in (("single/lora.safetensors", "a"), ("output/lora", "b")):
            succeed_here(*replace_dit(generate, trained), place, folder=tmp_path)
        assert find_images(tmp_path / "a") == find_images(tmp_path / "b") != []
    state = "output/lora-step00000001-state"
    succeed_here(*sharded, "--resume", state, "--output_dir", "resumed", folder=tmp_path)
    assert_equal(read_folder(tmp_path / "resumed" / "lora"), single)
    if family.name in ALL_IN_ONE:
        return
    again = replace_dit([*words, "--output_dir", "again", "--max_train_steps", "1"], "output/lora")
    succeed_here(*again, folder=tmp_path)
    assert load_file(tmp_path / "again" / "lora.safetensors").keys() == single.keys()
