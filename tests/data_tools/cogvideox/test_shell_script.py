"""prepare_dataset.sh types the command that its values describe."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.cogvideox.clips import PrepareOptions
from modules.script_options import parse_options
from tests.commands import ROOT

SCRIPT = ROOT / "prepare_dataset.sh"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a script of a Unix shell")


def typed(tmp_path: Path, *words: str, **values: str) -> subprocess.CompletedProcess[str]:
    """Run the script with stand-ins that print what they are called with."""
    for name in ("python", "accelerate"):
        program = tmp_path / name
        program.write_text(
            f'#!/bin/sh\necho {name}\nfor word in "$@"; do echo "$word"; done\n', encoding="utf-8"
        )
        program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    return subprocess.run(
        ["sh", str(SCRIPT), *words],
        env={"PATH": path, **values},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("cards", ["1", "4"])
def test_the_command_is_one_of_ours(tmp_path: Path, cards: str) -> None:
    done = typed(
        tmp_path,
        *("--random_flip", "0.5"),
        DATA_ROOT="a b ü",
        OUTPUT_DIR="out",
        MODEL_ID="models/wan",
        NUM_GPUS=cards,
        HEIGHT_BUCKETS="480 720",
    )
    words = done.stdout.splitlines()
    place = words.index(f"{ROOT}/tools/prepare_dataset.py")
    launcher = ["accelerate", "launch", "--quiet", "--num_processes", "4"]
    assert words[:place] == (launcher if cards == "4" else ["python"])
    options, *_ = parse_options("", words[place + 1 :], PrepareOptions)
    assert options.source.data_root == Path("a b ü")
    assert options.shape.height_buckets == (480, 720)
    assert options.encoding.save_latents_and_embeddings
    assert str(options.encoding.model_id) == "models/wan"


def test_without_a_model_nothing_is_encoded_and_a_missing_value_is_named(tmp_path: Path) -> None:
    done = typed(tmp_path, DATA_ROOT="d", OUTPUT_DIR="o")
    assert "--model_id" not in done.stdout
    assert "--save_latents_and_embeddings" not in done.stdout
    missing = typed(tmp_path, DATA_ROOT="d")
    assert missing.returncode != 0
    assert "OUTPUT_DIR: names a folder for the prepared data" in missing.stderr
    assert shlex.split(missing.stdout) == []
