"""The GPU benchmark on a CPU: its rows, runner, profile, and what is made of its numbers."""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks import gpu
from benchmarks.gpu_checks import main
from benchmarks.gpu_rows import BEGIN, BY_NAME, END, TRAINING, Results, Row, Size, goals_of
from benchmarks.gpu_steps import (
    ATTENTION,
    ELEMENTWISE,
    PRODUCTS,
    THIN,
    classify_kernel,
    measure_row,
    profile_calls,
    report,
)
from tests.commands import ROOT
from tests.minimax_h3.tiny_dit import released, their_dit
from tests.tiny import flux, flux_3, moss_image, qwen_image_21, wan_dit
from tests.tiny.stable_diffusion import write_sd1, write_sdxl

CPU = torch.device("cpu")
CLIP, SECTION, IMAGE, SOUNDING = Size(32, 32, 5), Size(32, 32, 37), Size(64, 64), Size(64, 64, 22)
SWAPPED = (
    *("--gradient_checkpointing", "--gradient_checkpointing_cpu_offload", "--fp8_base", "--fp8_scaled"),
    *("--blocks_to_swap", "1"),
)
Write = Callable[[Path], Path]


def _wan(kind: str) -> Write:
    return lambda folder: wan_dit.write_dit(folder, wan_dit.tiny_state(kind, dtype=torch.bfloat16))


def _flux(kind: str) -> Write:
    return lambda folder: flux.write_dit(folder, flux.tiny_state(kind, dtype=torch.bfloat16))


def _flux_3(folder: Path) -> Path:
    return flux_3.write_dit(folder, flux_3.tiny_state(dtype=torch.bfloat16))


def _qwen_image_21(folder: Path) -> Path:
    return qwen_image_21.write_dit(folder, qwen_image_21.tiny_state(dtype=torch.bfloat16))


def _moss_image(folder: Path) -> Path:
    return moss_image.write_dit(folder, moss_image.tiny_state(dtype=torch.bfloat16), "comfyui")


def _h3(folder: Path) -> Path:
    path = folder / "h3.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in released(their_dit().state_dict()).items()}, path)
    return path


def _tiny(name: str, size: Size, *options: str) -> Row:
    """A row with a tiny size, and other options if there are any; nothing is compiled."""
    row = BY_NAME[name]
    kept = tuple(word for word in row.options if word != "--compile")
    text = 80 if row.model.family == "flux_3" else 7  # its texts have multiples of 80
    return replace(row, size=size, options=options or kept, text_tokens=text, steps=2, card=0)


TRAINED = {
    "wan14b-fp8-swap38-offload": (_wan("t2v"), CLIP, SWAPPED),
    "flux-bf16": (_flux("dev"), IMAGE, ()),
    "h3-bf16-swap48-16gib": (_h3, SOUNDING, (*SWAPPED[:2], *SWAPPED[4:])),
    "sdxl-fp8-weights": (write_sdxl, IMAGE, ()),
    "sd1.5-bf16": (write_sd1, IMAGE, ()),
    "flux3-bf16": (_flux_3, IMAGE, ()),
    "qwen-image-2.1-bf16": (_qwen_image_21, IMAGE, ()),
    "moss-image-bf16": (_moss_image, IMAGE, ()),
}
GENERATED = {
    "gen-wan14b-i2v": (_wan("i2v"), CLIP, ("--fp8_scaled",)),
    "gen-flux": (TRAINED["flux-bf16"][0], IMAGE, ()),
    "gen-h3": (_h3, SOUNDING, ()),
    "gen-flux3": (_flux_3, IMAGE, ()),
    "gen-qwen-image-2.1": (_qwen_image_21, IMAGE, ()),
    "gen-moss-image": (_moss_image, IMAGE, ()),
}


# one of each kind by default
DEFAULT = {"flux-bf16", "gen-flux"}


def _slow(names: Iterable[str]) -> list[Any]:
    """The usual rows, and the others marked as slow."""
    return [pytest.param(name, marks=[] if name in DEFAULT else pytest.mark.slow) for name in names]


@pytest.mark.slow_cases("flux-bf16")
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


def test_the_plan_of_a_row_that_is_known_ahead_is_kept(tmp_path: Path) -> None:
    path = _flux("dev")(tmp_path)

    found = measure_row(replace(_tiny("flux-bf16", IMAGE), planned=7.0), path, None, CPU, enough=0)

    assert found["planned"] == 7.0


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


GOOD = "def test_good(): pass\n"
FAILING = GOOD + "def test_bad():\n    assert 1 + 1 == 3, 'a wrong sum'\n"
HANGING = GOOD + "import time\ndef test_endless():\n    time.sleep(600)\n"
CRASHING = GOOD + "import os\ndef test_crash():\n    os._exit(7)\n"
SKIPPING = "import pytest\ndef test_away():\n    pytest.skip('no such device')\n"
MISSING = "import a_package_that_nobody_has\n" + GOOD
BROKEN = "import benchmarks.no_such_part\n" + GOOD


def checked(
    tmp_path: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[int, str, dict[str, dict[str, object]]]:
    """The exit code, what was printed, and the groups by the name of their file."""
    paths = [tmp_path / f"test_{name}.py" for name in files]
    for path, text in zip(paths, files.values(), strict=True):
        path.write_text(text, encoding="utf-8")
    found = tmp_path / "found.json"
    code = main([*map(str, paths), "--markers", "", "--output", str(found), *options])
    groups = json.loads(found.read_text(encoding="utf-8"))["groups"]
    return code, capsys.readouterr().out, {Path(group["name"]).stem[5:]: group for group in groups}


@pytest.mark.slow
def test_a_bad_file_does_not_lose_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"failing": FAILING, "hanging": HANGING, "crashing": CRASHING, "skipping": SKIPPING}
    files |= {"missing": MISSING, "broken": BROKEN, "good": GOOD}
    code, printed, groups = checked(tmp_path, files, capsys, "--group_seconds", "12", "--jobs", "2")

    assert code == 1
    assert {name: group["passed"] for name, group in groups.items()} == {
        **dict.fromkeys(("failing", "hanging", "crashing", "good"), 1),
        **dict.fromkeys(("skipping", "missing", "broken"), 0),
    }
    assert "a wrong sum" in printed
    assert "stopped after 12 seconds (in " in printed
    assert str(groups["hanging"]["running"]).endswith("test_endless")
    assert str(groups["crashing"]["ended"]).startswith("ended with exit code 7")
    assert str(groups["crashing"]["running"]).endswith("test_crash")
    assert groups["skipping"]["skipped"] == {"no such device": 1}
    assert groups["missing"]["skipped"] == {"needs a_package_that_nobody_has": 1}
    assert not groups["missing"]["failures"]
    assert groups["broken"]["failures"]  # a part of ours that is not there is a fault
    assert "Not good: " in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_at_once_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REELSMITH_TEST_DEVICE", raising=False)
    assert main([]) == 1
    assert capsys.readouterr().out.startswith("Nothing was checked: torch sees no CUDA device here.")


def test_a_real_profile_of_a_cpu_has_all_groups() -> None:
    """A frozen layer with a LoRA beside it, attention, a norm."""
    wide, down, up = nn.Linear(256, 768), nn.Linear(256, 16), nn.Linear(16, 768)
    x = torch.randn(1, 200, 256)

    def step() -> None:
        q, k, v = (wide(x) + up(down(x))).unflatten(-1, (3, 4, 64)).transpose(1, 3).unbind(2)
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        nn.functional.layer_norm(seen, seen.shape[-1:]).square().mean().backward()

    step()
    found = profile_calls(step, 2, torch.device("cpu"))

    groups = {classify_kernel(kernel) for kernel in found.kernels}
    assert {ATTENTION, PRODUCTS, THIN, ELEMENTWISE} <= groups
    assert 0 < found.busy <= found.wall
    thin = [kernel for kernel in found.kernels if classify_kernel(kernel) == THIN]
    assert all(16 in {side for shape in kernel.shapes for side in shape} for kernel in thin)
    assert "| attention | " in report(found, 2)


HEAD = {
    "device": "a card",
    "torch": "2.9",
    "date": "2026-01-01",
    "matmul": 8e14,
    "upload": 5e10,
    "copy": 4e12,
}
GIB = 1 << 30


def row(kind: str = TRAINING, **changes: Any) -> dict[str, Any]:
    """A row as the result file has it."""
    default = {
        **{"kind": kind, "model": "Wan", "size": "8x8", "about": "bf16", "options": [], "took": 90.0},
        **{"seconds": 10.0, "spread": 0.01, "calls": 3, "per": 1.0, "whole": 1.0, "warm_up": 60.0},
        **{"operations": 5e15, "model_operations": 4e15, "device": 50 * GIB, "planned": 51 * GIB},
        **{
            "host": GIB,
            "loading": 14.0,
            "loaded": 28e9,
            "losses": [2.0, 1.9],
            "norms": [1.0],
            "expected": 60.0,
        },
    }
    return {**default, **changes}


def verdicts(**rows: dict[str, Any]) -> list[str]:
    return [
        str(goal)
        for goal in goals_of(Results(HEAD, {name.replace("_", "-"): one for name, one in rows.items()}))
    ]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (10.0, ("missed: 65% of the bf16 peak in LoRA training of Wan 14B", "(wan14b-bf16 62.5%)")),
        (9.0, ("met: 65% of the bf16 peak in LoRA training of Wan 14B", "(wan14b-bf16 69.4%)")),
    ],
)
def test_the_share_of_the_peak_is_compared_with_its_goal(seconds: float, expected: tuple[str, str]) -> None:
    goal, (start, end) = verdicts(wan14b_bf16=row(seconds=seconds))[0], expected
    assert goal.startswith(start)
    assert goal.endswith(end)


@pytest.mark.parametrize(
    ("changes", "verdict", "found"),
    [
        ({"seconds": 8.0}, "met", "1.25 times, losses 0.00% apart, norms of gradients 10.00% apart"),
        ({"seconds": 8.5}, "missed", "1.18 times, losses 0.00% apart, norms of gradients 10.00% apart"),
        (
            {"seconds": 8.0, "losses": [2.0, 1.8]},
            "missed",
            "1.25 times, losses 5.26% apart, norms of gradients 10.00% apart",
        ),
        (
            {"seconds": 8.0, "losses": []},
            "missed",
            "1.25 times, losses unknown, norms of gradients 10.00% apart",
        ),
    ],
)
def test_fp8_must_be_faster_at_equal_loss(changes: dict[str, Any], verdict: str, found: str) -> None:
    goal = verdicts(wan14b_bf16=row(), wan14b_fp8_products=row(**{"norms": [1.1], **changes}))[1]
    assert goal.startswith(f"{verdict}: wan14b-fp8-products at least 1.2 times")
    assert goal.endswith(f"({found})")


# The tables


def test_tables_are_written_between_the_marks_of_the_documents_and_nowhere_else(tmp_path: Path) -> None:
    results = Results(HEAD, path=tmp_path / "gpu.json")
    results.note("wan14b-bf16", row())
    documents = [tmp_path / name for name in ("RESULTS.md", "copy.md")]
    for document in documents:
        shutil.copy(ROOT / "benchmarks" / "RESULTS.md", document)
    before = [path.read_text(encoding="utf-8") for path in documents]
    words = ["--tables", str(tmp_path / "gpu.json"), "--documents", *map(str, documents)]

    gpu.main(words)
    gpu.main(words)  # again: instead of what was there

    for path, old in zip(documents, before, strict=True):
        new = path.read_text(encoding="utf-8")
        assert new.count("2026-01-01, a card, torch 2.9") == 1
        assert "| Wan | 8x8 | bf16 | 10.00 |" in new
        assert new.partition(BEGIN)[0] == old.partition(BEGIN)[0]
        assert new.partition(END)[2] == old.partition(END)[2]
