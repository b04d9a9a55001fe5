"""The rows of the GPU benchmark do their work on tiny models on a CPU; what they take there says nothing."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_measuring import measure_row
from benchmarks.gpu_rows import BY_NAME, Row, Size
from tests.tiny import flux, wan_dit

CPU = torch.device("cpu")
CLIP, SECTION, PICTURE = Size(32, 32, 5), Size(32, 32, 37), Size(64, 64)
SWAPPED = (
    *("--gradient_checkpointing", "--gradient_checkpointing_cpu_offload", "--fp8_base", "--fp8_scaled"),
    *("--blocks_to_swap", "1"),
)
Write = Callable[[Path], Path]


def _wan(kind: str) -> Write:
    return lambda folder: wan_dit.write_dit(folder, wan_dit.tiny_state(kind, dtype=torch.bfloat16))


def _flux(kind: str) -> Write:
    return lambda folder: flux.write_dit(folder, flux.tiny_state(kind, dtype=torch.bfloat16))


def _tiny(name: str, size: Size, *options: str) -> Row:
    """A row with a tiny size, and other options if there are any; nothing is compiled."""
    row = BY_NAME[name]
    kept = tuple(word for word in row.options if word != "--compile")
    return replace(row, size=size, options=options or kept, text_tokens=7, steps=2)


TRAINED = {
    "wan14b-fp8-swap38-offload": (_wan("t2v"), CLIP, SWAPPED),
    "flux-bf16": (_flux("dev"), PICTURE, ()),
}
GENERATED = {
    "gen-wan14b-i2v": (_wan("i2v"), CLIP, ("--fp8_scaled",)),
    "gen-flux": (TRAINED["flux-bf16"][0], PICTURE, ()),
}


# one of each kind by default
USUAL = {"flux-bf16", "gen-flux"}


def _slow(names: Iterable[str]) -> list[Any]:
    """The usual rows, and the others marked as slow."""
    return [pytest.param(name, marks=[] if name in USUAL else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", _slow(TRAINED))
def test_a_training_step_is_measured_and_planned(tmp_path: Path, name: str) -> None:
    write, size, options = TRAINED[name]
    path = write(tmp_path)

    found = measure_row(_tiny(name, size, *options), path, None, CPU, enough=0)

    assert found["calls"] == 2
    assert len(found["losses"]) == 3
    assert min(found["losses"]) > 0.1
    assert found["planned"] > path.stat().st_size / 2
    assert found["operations"] > found["model_operations"] > 0


@pytest.mark.parametrize("name", _slow(GENERATED))
def test_a_generation_is_measured_and_planned(tmp_path: Path, name: str) -> None:
    write, size, options = GENERATED[name]
    path = write(tmp_path)

    found = measure_row(_tiny(name, size, *options), path, None, CPU, enough=0)

    assert found["per"] == 2
    assert found["whole"] > 20
    assert found["planned"] > path.stat().st_size / 2
    assert found["operations"] > 0


# The command


def test_the_plan_of_all_rows_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--dry", "--rows", "wan14b-bf16", "load-bf16", "gen-lumina"])

    lines = capsys.readouterr().out.splitlines()
    assert (
        "| wan14b-bf16 | goals, training | Wan2.1 14B T2V | 832x480x81 | bf16, eager | 6.19 | 28.6 | "
        in lines[2]
    )
    assert lines[3].startswith("| load-bf16 | loading | Wan2.1 1.3B T2V | - |")
    assert lines[-1].startswith("3 rows, about ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_nothing_is_measured() -> None:
    with pytest.raises(SystemExit, match="needs a CUDA device; --dry shows the rows without one"):
        gpu.main(["--rows", "gen-flux"])
    with pytest.raises(SystemExit, match="loading has no steps"):
        gpu.main(["--profile", "load-bf16"])
