"""What the console says while videos are generated."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from generation.progress import Queue, show_end, show_start
from modules.contract.requests import Request
from tests.generation.toy_family import ToyFamily
from tests.preparing import prepare

PREPARED = prepare(Request("a [red]cat[/]\nruns", 7, 48, 32, 5, 10, 5.0, None, 5.0, "unipc", 16.0, "bad"))


def test_a_file_of_prompts_says_where_it_is_and_how_long_it_takes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    times = iter([0.0, 120.0, 360.0])
    queue = Queue([PREPARED, replace(PREPARED, frames=10), PREPARED], now=lambda: next(times))

    for line in (1, 2, 4):
        queue.begin(f"line {line}")

    size = "48 x 32 (width x height), 5 frames, 10 steps, seed 7: a [red]cat[/] runs"
    assert caplog.messages[0] == f"1 of 3 (line 1): {size}"
    assert caplog.messages[1].startswith("2 of 3, about 6 min left (line 2): 48 x 32")
    assert caplog.messages[2] == f"3 of 3, about 2 min left (line 4): {size}"


def test_boxes_name_loras_and_count_the_files_of_folders(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "frames").mkdir()
    for index in range(3):
        (tmp_path / "frames" / f"{index}.png").write_bytes(b"12")

    show_start(ToyFamily(), [PREPARED] * 2, {"": [("a.safetensors", 0.8)]}, tmp_path, torch.device("cpu"))
    show_end([tmp_path / "frames"], 3, torch.device("cpu"))

    assert "  LoRAs:  a.safetensors, strength 0.8\n  clips:  2; the first: 48 x 32" in caplog.text
    assert f"  result:      {tmp_path / 'frames'} (6 bytes)" in caplog.text
