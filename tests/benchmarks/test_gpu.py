"""The rows of the GPU benchmark do their work on tiny models on a CPU; what they take there says nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import generation, line_of, time_call, train_steps
from benchmarks.gpu_rows import HUNYUAN, ROWS, SMALL, WAN_14B, WAN_14B_I2V, Row, Size
from tests.manifests import manifest_names
from tests.tiny.hunyuan_dit import tiny_state as hunyuan_state
from tests.tiny.hunyuan_dit import write_dit as write_hunyuan
from tests.tiny.wan_dit import tiny_state, write_dit

CPU = torch.device("cpu")
TINY = Size(32, 32, 5)


@pytest.mark.parametrize(
    "options",
    [
        ("--gradient_checkpointing",),
        (
            "--gradient_checkpointing",
            "--gradient_checkpointing_cpu_offload",
            "--fp8_base",
            "--fp8_scaled",
            "--blocks_to_swap",
            "1",
        ),
    ],
)
def test_a_training_step_is_measured_and_planned(tmp_path: Path, options: tuple[str, ...]) -> None:
    path = write_dit(tmp_path, tiny_state("t2v", dtype=torch.bfloat16))

    bench = train_steps(Row("tiny", WAN_14B, TINY, options, text_tokens=7), path, CPU)

    assert time_call(bench.call, CPU, rounds=1, warm_up=1) > 0
    assert bench.planned > path.stat().st_size / 2
    assert bench.operations > 0


def test_a_training_step_of_hunyuan_video_is_measured(tmp_path: Path) -> None:
    path = write_hunyuan(tmp_path, hunyuan_state("t2v", dtype=torch.bfloat16))

    bench = train_steps(Row("tiny", HUNYUAN, TINY, ("--gradient_checkpointing",), text_tokens=7), path, CPU)

    assert time_call(bench.call, CPU, rounds=1, warm_up=1) > 0


def test_a_generation_is_measured(tmp_path: Path) -> None:
    path = write_dit(tmp_path, tiny_state("i2v", dtype=torch.bfloat16))

    bench = generation(
        Row("tiny", WAN_14B_I2V, TINY, ("--fp8_scaled",), generates=True, text_tokens=7), path, CPU
    )

    assert time_call(bench.call, CPU, rounds=1, warm_up=0) > 0


def test_every_row_names_a_list_of_tensors_that_is_there() -> None:
    assert {row.model.manifest for row in ROWS} <= set(manifest_names(""))


def test_a_line_says_how_much_of_the_peak_was_reached_and_how_far_the_plan_was_off() -> None:
    gib = 1 << 30
    found = {
        "seconds": 10.0,
        "operations": 5e15,
        "device": 50 * gib,
        "planned": 51 * gib,
        "host": gib,
        "loading": 17.0,
    }

    line = line_of("| a | b | c |", ROWS[0], found, peak=800e12)

    assert line == "| a | b | c | 10.00 | 500 | 62 % | 50.0 | 51.0 (+2 %) | 1.0 | 17 |"


def test_a_generation_is_told_for_all_steps_of_a_video() -> None:
    row = replace(ROWS[4], size=SMALL)
    found = {
        "seconds": 25.0,
        "operations": 1e16,
        "device": 1 << 30,
        "planned": float(1 << 30),
        "host": 1 << 30,
        "loading": 1.0,
    }

    assert "| 200 for 40 steps | 400 | 50 % | 1.0 | 1.0 (+0 %) |" in line_of("|", row, found, peak=800e12)
