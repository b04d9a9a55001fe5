"""A file with more tensors than any model is refused before they are looked at; names are found quickly."""

import json
import struct
import time
from pathlib import Path

import pytest

from checkpoints.dialects import translate_name
from checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError
from modules.limits import MAX_TENSORS
from tests.commands import ROOT
from tests.faults.messages import assert_one_message, run_here
from wan.checkpoints import FROM_DIFFUSERS


def write_many(path: Path, count: int) -> Path:
    """The pocket transformer with so many empty tensors more."""
    raw = (ROOT / "pocket" / "dit.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    place = [len(data), len(data)]
    header |= {f"x.{index}": {"dtype": "F32", "shape": [0], "data_offsets": place} for index in range(count)}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_more_tensors_than_any_model_has_are_refused_at_once(tmp_path: Path) -> None:
    path = write_many(tmp_path / "many.safetensors", MAX_TENSORS)
    begin = time.process_time()
    with pytest.raises(CheckpointError, match=r"has 50,\d+ tensors, and no model has more than 50,000"):
        open_checkpoint(path)
    assert time.process_time() - begin < 10


def test_so_they_are_at_the_command_line(tmp_path: Path) -> None:
    write_many(tmp_path / "many.safetensors", MAX_TENSORS)
    pocket = [*("--vae", ROOT / "pocket" / "vae.safetensors"), *("--t5", ROOT / "pocket" / "t5.safetensors")]
    words = ["--task", "t2v-1.3B", "--dit", "many.safetensors", *pocket, "--prompt", "a", "--save_path", "o"]
    assert_one_message(
        *run_here("wan_generate_video.py", *words, folder=tmp_path), "tensors", "Pass the file"
    )


def test_names_of_no_table_are_left_alone_quickly() -> None:
    begin = time.process_time()
    assert all(translate_name(f"x.{index}", FROM_DIFFUSERS) == f"x.{index}" for index in range(20_000))
    assert time.process_time() - begin < 5
    assert translate_name("blocks.7.attn1.to_q.weight", FROM_DIFFUSERS) == "blocks.7.self_attn.q.weight"
