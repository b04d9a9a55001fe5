"""prepare_dataset.py in several processes, and killed at any moment."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import ROOT, run_script
from tests.data_tools.cogvideox.making import write_data, write_wan_pipeline

SETTINGS = [
    *("--height_buckets", "64", "--width_buckets", "64", "--frame_buckets", "13", "--device", "cpu"),
    *("--random_flip", "0.5", "--video_reshape_mode", "random"),
]


def words(folder: Path, output: str) -> list[str]:
    given = ["--data_root", str(folder / "data"), "--output_dir", str(folder / output)]
    model = ["--model_id", str(folder / "wan"), "--save_latents_and_embeddings", "--save_image_latents"]
    return [*given, *model, *SETTINGS]


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    write_data(folder / "data", frames=14, size=48)
    write_wan_pipeline(folder / "wan")
    run_script("prepare_dataset.py", *words(folder, "whole"))
    return folder


@pytest.mark.slow
def test_runs_that_are_killed_lose_nothing_and_end_as_an_undisturbed_one(project: Path) -> None:
    command = [sys.executable, str(ROOT / "prepare_dataset.py"), *words(project, "killed")]
    chance = random.Random(1)
    for _ in range(6):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            began = time.monotonic()
            while process.poll() is None and not (project / "killed" / "prompts").is_dir():
                assert time.monotonic() - began < 120
                time.sleep(0.01)
            time.sleep(chance.random())
            process.send_signal(signal.SIGKILL)
    run_script("prepare_dataset.py", *words(project, "killed"))
    assert contents(project / "killed") == contents(project / "whole")
