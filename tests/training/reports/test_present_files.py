"""Commands of a run name files that were not removed since."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from training.reports.history import RunHistory
from training.reports.present_files import current_commands


@pytest.mark.parametrize(
    ("there", "lost", "expected"),
    [
        (("x-step00000004", "x-step00000008"), "x", "x-step00000008"),
        (("x-step00000004", "x-step00000004-ema"), "x-step00000008-ema", "x-step00000004-ema"),
        (("x-step00000004",), "x-step00000008-ema", None),
        (("x", "x-step00000004"), "x", "x"),
        ((), "x", None),
    ],
    ids=["the newest", "an average", "no average is left", "it is there", "nothing is left"],
)
@pytest.mark.parametrize("is_absolute", [True, False])
def test_a_command_names_a_file_that_was_not_removed_since(
    there: tuple[str, ...], lost: str, expected: str | None, is_absolute: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "my output"
    folder.mkdir()
    names = {
        "x-step00000004": 4,
        "x-step00000004-ema": 4,
        "x-step00000008": 8,
        "x-step00000008-ema": 8,
        "x": 9,
    }
    file = folder / f"{lost}.safetensors" if is_absolute else Path("my output", f"{lost}.safetensors")
    line = shlex.join(
        ["python", "wan_generate_video.py", "--lora_weight", str(file), "--prompt", "x.safetensors"]
    )
    rows: list[dict[str, Any]] = [
        {"step": step, "saved": f"{name}.safetensors"} for name, step in names.items()
    ]
    start = {"model": "wan", "total_steps": 9, "changed": [], "unchanged": [], "listens": True, "process": {}}
    rows.append({"step": 0, "started": {**start, "working_folder": str(tmp_path)}})
    rows.append({"step": 9, "commands": [["Generate with it", line, line, "A note.", ""]]})
    for name in there:
        (folder / f"{name}.safetensors").touch()

    (command,) = current_commands(RunHistory.of(rows), folder)

    if expected in (None, lost):
        assert (command.bash, command.note) == (line, "A note.")
    else:
        present = file.with_name(f"{expected}.safetensors")
        assert shlex.split(command.bash)[3:] == [str(present), "--prompt", "x.safetensors"]
        assert f"{present.name} takes its place. A note." in command.note


def test_each_transformer_keeps_a_file_of_its_own(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"step": step, "saved": f"x{mark}_{part}_noise.safetensors"}
        for mark, step in (("-step00000004", 4), ("", 9))
        for part in ("low", "high")
    ]
    files = [str(tmp_path / f"x_{part}_noise.safetensors") for part in ("low", "high")]
    line = shlex.join(["python", "a.py", "--lora_weight", files[0], "--lora_weight_high_noise", files[1]])
    rows.append({"step": 9, "commands": [["Generate with it", line, line, "", ""]]})
    for part in ("low", "high"):
        (tmp_path / f"x-step00000004_{part}_noise.safetensors").touch()
    (command,) = current_commands(RunHistory.of(rows), tmp_path)
    assert command.bash == line.replace("/x_", "/x-step00000004_")
