"""Folders as `new` describes them, for tests: a few lines instead of a model and media."""

import json
from pathlib import Path
from typing import Any

from browser.jobs.background_jobs import BackgroundJobs
from browser.jobs.jobs import open_queue
from browser.runs.run_start import TrackedRun, TrackedRuns
from browser.runs.runs import Runs
from project.known_folders import remember_folder
from project.tracing import RunTrace

DATASET = '[[datasets]]\nimage_directory = "."\ncache_directory = "cache"\n'


def describe(
    folder: Path, name: str = "own", steps: int = 10, is_trusted: bool = True, **changed: Any
) -> Path:
    """Describe a folder with one picture; the file of its model is empty.

    is_trusted: as if `new` had done it on this machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cache").mkdir(exist_ok=True)
    (folder / "cache" / "dit.safetensors").touch()
    (folder / "cat.png").write_bytes(b"\x89PNG not really")
    (folder / "cat.txt").write_text("a cat\n", encoding="utf-8")
    (folder / "dataset.toml").write_text(DATASET, encoding="utf-8")
    (folder / "prompts.txt").write_text("a cat --s 2\n", encoding="utf-8")
    values = {
        "dataset_config": "dataset.toml",
        "network_module": "networks.lora_wan",
        "max_train_steps": steps,
        "sample_prompts": "prompts.txt",
        "output_dir": "output",
        "output_name": name,
        **changed,
    }
    download = ["python", "tools/download.py", "--family", "wan", "--task", "t2v-1.3B"]
    commands = [
        [*download, "--to", str(folder.parent / "models")],
        ["python", "wan_cache_latents.py", "--dataset_config", "dataset.toml", "--check"],
        ["python", "wan_train_network.py", "--config_file", "run.toml"],
    ]
    lines = ["# mine", "[training]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    lines += [
        "",
        "[reelsmith]",
        'files = ["cache/dit.safetensors"]',
        f"commands = {json.dumps(commands)}",
        "",
    ]
    (folder / "run.toml").write_text("\n".join(lines), encoding="utf-8")
    if is_trusted:
        remember_folder(folder, folder.parent / "models")
    return folder


def look(*roots: Path) -> TrackedRuns:
    runs = Runs(roots)
    queue = open_queue(runs, read_only=False)
    return TrackedRuns(runs, queue, BackgroundJobs(queue))


def find(tracked_runs: TrackedRuns, name: str = "own") -> TrackedRun:
    """Return the only run of this name."""
    (shown,) = [shown for shown in tracked_runs.list_all() if shown.summary.name == name]
    return shown


def state(tracked_runs: TrackedRuns, name: str = "own") -> str:
    return find(tracked_runs, name).state.text


def trace(folder: Path, name: str = "own", steps: int = 10) -> RunTrace:
    """Begin what `run` writes before its training; this process counts as the run."""
    begun = RunTrace()
    begun.begin(["run", str(folder)], output=folder / "output", name=name, steps=steps)
    return begun
