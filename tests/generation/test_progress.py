"""What the console says while videos are generated."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from generation.progress import Queue, in_short, show_end, show_start
from modules.contract.requests import Request
from tests.generation.test_run import prompts, run
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


def test_a_single_prompt_is_told_by_the_box_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    run(tmp_path / "out", "--prompt", "a [red]cat", "--seed", 7)

    (video,) = (tmp_path / "out").iterdir()
    start, end = (text for text in caplog.messages if text.startswith(("Generating", "Generation")))
    assert "  prompt: a [red]cat\n" in start
    assert "  clip:   48 x 32 (width x height), 5 frames, " in start
    assert f"  result:      {video} (" in end
    assert not [text for text in caplog.messages if text.startswith("1 of 1")]


def test_the_last_box_counts_what_failed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    with pytest.raises(Exception, match="1 of 3 failed"):
        run(tmp_path / "out", "--from_file", prompts(tmp_path, "cat", "dog --w x", "cow"))

    assert len([text for text in caplog.messages if text.startswith(("1 of 2", "2 of 2"))]) == 2
    (end,) = (text for text in caplog.messages if text.startswith("Generation"))
    assert "failed:      1\n" in end
    assert f"results:     2 in {tmp_path / 'out'} (" in end


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


def test_a_long_prompt_is_cut_for_a_line() -> None:
    assert in_short("a\n  b") == "a b"
    assert len(in_short("word " * 100)) == 100
