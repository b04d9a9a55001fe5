"""The nodes for ComfyUI, called as ComfyUI calls them, without it."""

import importlib.util
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from modules.media.writing import write_png, write_video
from tests.commands import QUIET, ROOT, run_script
from tests.project.test_run import MODEL, shorten_samples
from tests.tiny.project import write_clips
from tests.waiting import wait_for

FOLDER = ROOT / "extras" / "comfyui_reelsmith"
# stands for the command: it notes its folder, and waits for a file that lets it end
FAKE = """
import pathlib, sys, time
kind, folder = sys.argv[1], pathlib.Path(sys.argv[2])
assert kind == "run"
with (folder.parent / "order.txt").open("a") as file:
    file.write(folder.name + "\\n")
print("step 3 of 9", flush=True)
while not (folder / "end").exists():
    time.sleep(0.02)
sys.exit(int((folder / "end").read_text()))
"""


@pytest.fixture
def nodes() -> Any:
    """The node package, imported as ComfyUI imports what lies in `custom_nodes`."""
    spec = importlib.util.spec_from_file_location(
        "custom_nodes_reelsmith", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.modules["custom_nodes_reelsmith.nodes"].QUEUE.end()
    for name in ("custom_nodes_reelsmith", "custom_nodes_reelsmith.nodes"):
        del sys.modules[name]


def call(nodes: ModuleType, name: str, **inputs: object) -> tuple[Any, ...]:
    """Run a node; inputs that are not given have their defaults."""
    node = nodes.NODE_CLASS_MAPPINGS[name]
    known = node.INPUT_TYPES()["required"]
    assert inputs.keys() <= known.keys()
    defaults = {key: kind[1]["default"] for key, kind in known.items() if len(kind) > 1}
    results = getattr(node(), node.FUNCTION)(**{**defaults, **inputs})
    assert len(results) == len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
    return results  # type: ignore[no-any-return]


def described(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.toml").write_text('[training]\noutput_dir = "made"\n', encoding="utf-8")
    return folder


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = tmp_path / "a checkout"
    checkout.mkdir()
    (checkout / "reelsmith.py").write_text(FAKE, encoding="utf-8")
    monkeypatch.setenv("REELSMITH", str(checkout))


def test_each_node_says_what_comfyui_asks_for(nodes: ModuleType) -> None:
    assert nodes.NODE_CLASS_MAPPINGS.keys() == nodes.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()["required"]
        assert [*inspect.signature(getattr(node, node.FUNCTION)).parameters][1:] == [*inputs]
        assert {kind[0] for kind in inputs.values() if isinstance(kind[0], str)} <= {"STRING", "INT"}
        assert node.CATEGORY == "Reelsmith"
        value = node.IS_CHANGED(**dict.fromkeys(inputs))
        assert value != value  # ComfyUI runs a node again if this differs from the last time


def test_trainings_run_one_after_the_other_and_each_once(
    nodes: ModuleType, fake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed = []
    comfy = SimpleNamespace(unload_all_models=lambda: freed.append("models"), soft_empty_cache=lambda: None)
    monkeypatch.setitem(sys.modules, "comfy.model_management", comfy)  # type: ignore[arg-type]
    first, second = described(tmp_path / "ä 1"), described(tmp_path / "2")

    def state(folder: Path, action: str = "start") -> str:
        found, said = call(nodes, "ReelsmithRun", folder=f'"{folder}"', action=action)
        assert found == str(folder)
        return str(said)

    assert state(first, "stop") == "not queued"
    state(first)
    assert state(second) == "waiting"
    wait_for(lambda: state(first) == "running: step 3 of 9")
    assert state(second) == "waiting"
    (first / "end").write_text("0")
    order = tmp_path / "order.txt"
    wait_for(lambda: order.read_text(encoding="utf-8").split("\n")[:2] == ["ä 1", "2"])
    # one that has ended is started again
    wait_for(lambda: state(second) == "running: step 3 of 9")
    (second / "end").write_text("1")
    samples = described(tmp_path / "none")
    with pytest.raises(RuntimeError, match=r"none has no samples yet. Its training: not queued"):
        call(nodes, "ReelsmithSamples", folder=str(samples))
    failed = r"has no samples yet. Its training: failed:\nstep 3 of 9"
    wait_for(lambda: "failed" in sys.modules["custom_nodes_reelsmith.nodes"].QUEUE.find(second).describe())
    with pytest.raises(RuntimeError, match=failed):
        call(nodes, "ReelsmithSamples", folder=str(second))
    assert len(freed) >= 2


@pytest.mark.skipif(os.name == "nt", reason="sends a signal of POSIX")
def test_a_training_is_stopped_and_one_that_waits_does_not_begin(
    nodes: ModuleType, fake: None, tmp_path: Path
) -> None:
    first, second = described(tmp_path / "1"), described(tmp_path / "2")
    for folder in (first, second):
        call(nodes, "ReelsmithRun", folder=str(folder), action="start")
    queue = sys.modules["custom_nodes_reelsmith.nodes"].QUEUE
    wait_for(lambda: queue.find(first).describe() == "running: step 3 of 9")

    for folder in (second, first):
        call(nodes, "ReelsmithRun", folder=str(folder), action="stop")

    wait_for(lambda: queue.find(second).ended.is_set())
    assert [queue.find(folder).describe() for folder in (first, second)] == ["stopped", "stopped"]
    assert (tmp_path / "order.txt").read_text() == "1\n"


def test_the_newest_samples_are_a_batch_of_one_size(nodes: ModuleType, tmp_path: Path) -> None:
    folder = described(tmp_path / "set")
    samples = folder / "made" / "sample"
    samples.mkdir(parents=True)
    for index, (height, level) in enumerate(((32, 51), (16, 0), (32, 102), (32, 255))):
        path = samples / f"{index}.png"
        write_png(path, np.full((height, 48, 3), level, np.uint8))
        os.utime(path, (index, index))
    (samples / "notes.txt").touch()

    images, state = call(nodes, "ReelsmithSamples", folder=str(folder), count=9)

    assert state == "not queued"
    assert images.dtype == torch.float32
    assert images.shape == (3, 32, 48, 3)
    assert images[:, 0, 0, 0].tolist() == pytest.approx([1.0, 0.4, 0.2])
    assert len(call(nodes, "ReelsmithSamples", folder=str(folder), count=1)[0]) == 1
    write_video(samples / "clip.mp4", iter([np.full((32, 32, 3), level, np.uint8) for level in (20, 220)]), 8)
    frames, _ = call(nodes, "ReelsmithSamples", folder=str(folder), count=1)
    assert frames.shape == (2, 32, 32, 3)
    assert frames.mean(dim=(1, 2, 3)).tolist() == pytest.approx([20 / 255, 220 / 255], abs=0.03)


def test_mistakes_say_what_to_do(nodes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ReelsmithRun", "ReelsmithSamples"):
        inputs = {"action": "start"} if name == "ReelsmithRun" else {}
        for wrong in ("", "clips", str(tmp_path)):
            with pytest.raises(ValueError, match="which `reelsmith new FOLDER` writes"):
                call(nodes, name, folder=wrong, **inputs)
    folder = str(described(tmp_path / "set"))
    monkeypatch.setenv("REELSMITH", str(tmp_path / "gone"))
    with pytest.raises(RuntimeError, match="neither a command nor the folder of a checkout"):
        call(nodes, "ReelsmithRun", folder=folder, action="start")
    monkeypatch.delenv("REELSMITH")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="Install Reelsmith, or set REELSMITH"):
        call(nodes, "ReelsmithRun", folder=folder, action="start")


@pytest.mark.slow
def test_a_folder_is_trained_with_the_pocket_model_and_its_samples_are_loaded(
    nodes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my clips"
    write_clips(folder, count=2)
    run_script("reelsmith.py", "new", folder, *MODEL, "--max_train_steps", 2)
    shorten_samples(folder)
    for name, value in {**QUIET, "REELSMITH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)

    call(nodes, "ReelsmithRun", folder=str(folder), action="start")

    queue = sys.modules["custom_nodes_reelsmith.nodes"].QUEUE
    wait_for(queue.find(folder).ended.is_set)
    frames, state = call(nodes, "ReelsmithSamples", folder=str(folder))
    assert state.startswith("finished"), state
    assert frames.ndim == 4
    assert 0 < float(frames.mean()) < 1
    assert len([*(folder / "output" / "sample").glob("*.mp4")]) > 0
