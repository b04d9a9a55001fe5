"""State folders and optimizer states: written, found, checked, read to the bit."""

import errno
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from modules.errors import CheckpointError, OptionError, OutputError
from tests.faults.damage import flip_bit
from tests.training.toy import train_toy, write_caches
from training.optimizers.optimizer import optimizer_state, restore_optimizer
from training.saving.states import (
    CHECKSUM,
    FILE,
    SavedState,
    find_latest,
    load_module,
    read_state,
    write_state,
)
from training.steps import Progress

STATES = Path(__file__).parents[2] / "data" / "states"  # written by version 1


def state(step: int = 3) -> SavedState:
    losses = [0.1, 1 / 3]
    progress = Progress(5, session_id=1, started_at=0.125, step=step, epoch=1, position=2, losses=losses)
    slab = torch.zeros(32, dtype=torch.uint8)  # as swapped weights lie
    slab[:8].view(torch.float32)[:] = torch.tensor([1.0, 2.0])
    network = {
        "a": slab[:8].view(torch.float32),
        "b": torch.tensor(1, dtype=torch.int64),
        "c": slab[16:24].view(torch.bfloat16),
        "d": torch.arange(6.0).view(2, 3).T,
    }
    parts, told = {"network": network}, ({"--seed": 5}, {"--x": "y"})
    return SavedState(Path(), progress, *told, parts, {"groups": []}, {"step": step}, average={"steps": 2})


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    write_state(tmp_path / "x-state", state())

    read = read_state(tmp_path / "x-state")

    assert isinstance(read, SavedState)
    for name, value in vars(state()).items():
        assert name in {"folder", "parts"} or getattr(read, name) == value
    for name, tensor in state().parts["network"].items():
        assert read.parts["network"][name].dtype == tensor.dtype
        assert torch.equal(read.parts["network"][name], tensor)


@pytest.mark.parametrize(
    "name", ["identity", "habits", "optimizer", "schedule", "settings", "scaler", "average"]
)
@pytest.mark.parametrize("value", ["a text", 3, ["a", "list"], 1.5])
def test_a_part_of_another_kind_is_damage(tmp_path: Path, name: str, value: object) -> None:
    write_state(tmp_path / "x-state", replace(state(), **{name: value}))

    with pytest.raises(CheckpointError, match=f"x-state is damaged: {name} is of the type"):
        read_state(tmp_path / "x-state")


@pytest.mark.parametrize(
    "change", [{"plan_epoch": 10**18}, {"plan_step": 5, "step": 4}, {"epoch": 10**18}, {"plan_epoch": -1}]
)
def test_counts_that_no_run_has_are_damage(tmp_path: Path, change: dict[str, int]) -> None:
    full = state()
    write_state(tmp_path / "x-state", replace(full, progress=replace(full.progress, **change)))

    with pytest.raises(CheckpointError, match="its counts of steps and epochs are inconsistent"):
        read_state(tmp_path / "x-state")


@pytest.mark.parametrize("checksum", ["z", "9" * 5000])
def test_a_checksum_that_is_none_is_damage(tmp_path: Path, checksum: str) -> None:
    write_state(tmp_path / "x-state", state())
    (tmp_path / "x-state" / CHECKSUM).write_text(checksum, encoding="utf-8")

    with pytest.raises(CheckpointError, match="x-state is damaged: (invalid|.*larger than 100 bytes)"):
        read_state(tmp_path / "x-state")


BF16 = "--full_bf16 --mixed_precision bf16 --max_grad_norm 0"
LORA = "--network_dim 2 --network_args exclude_patterns=['.*(1|down).*']"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lora", f"--lr_scheduler_type CosineAnnealingLR --lr_scheduler_args T_max=8 --ema_decay 0.9 {LORA}"),
        ("prodigy", f"--optimizer_type Prodigy --learning_rate 1 {LORA}"),
        ("whole", f"--optimizer_type Adafactor --optimizer_args relative_step=False {BF16}"),
    ],
)
def test_a_state_of_version_1_goes_on(tmp_path: Path, name: str, words: str) -> None:
    if name == "prodigy":
        pytest.importorskip("prodigyopt")
    write_caches(tmp_path, count=3)
    straight, resumed = (
        train_toy(tmp_path, *words.split(), "--max_train_steps", 4, *more, full_dit=name == "whole")
        for more in ([], ["--resume", STATES / name])
    )

    for key, tensor in straight.items():  # the state may be from a processor that rounds otherwise
        torch.testing.assert_close(resumed[key], tensor, rtol=1e-3, atol=1e-5)


def test_a_state_of_version_1_is_read_to_the_bit() -> None:
    read = read_state(STATES / "lora")

    assert isinstance(read, SavedState)
    assert {name: set(part) for name, part in read.parts.items()} == {
        part: set(load_file(STATES / "lora" / f"{part}.safetensors")) for part in ("network", "ema")
    }
    tensors = load_file(STATES / "lora" / "optimizer.safetensors")
    assert tensors
    for place, tensor in tensors.items():
        name, _, key = place.rpartition("/")
        assert torch.equal(read.optimizer["states"][name][key], tensor)
    on_host = ["exp_avg", "exp_avg_sq", "step"]
    found = (read.average, read.progress.step, read.optimizer["on_host"])
    assert found == ({"steps": 2}, 2, on_host)


@pytest.mark.parametrize("file", ["state.json", "network.safetensors", "optimizer.safetensors"])
def test_damage_of_a_state_of_version_1_is_noticed(tmp_path: Path, file: str) -> None:
    folder = shutil.copytree(STATES / "lora", tmp_path / "lora-state")
    flip_bit(folder / file, 8 * (folder / file).stat().st_size - 100)
    with pytest.raises(CheckpointError, match=re.escape(str(folder))):
        read_state(folder)


def test_the_state_with_the_most_steps_is_the_latest(tmp_path: Path) -> None:
    steps = {"x-000001": 4, "x-step00000006": 6, "x-step00000005": 5, "y": 9, "x2": 9}
    for name, step in steps.items():
        write_state(tmp_path / f"{name}-state", state(step))
    (tmp_path / "x-000009-state").mkdir()  # without a record

    assert find_latest(tmp_path, "x") == tmp_path / "x-step00000006-state"
    assert find_latest(tmp_path, "z") is None
    assert find_latest(tmp_path / "nowhere", "x") is None


def test_a_state_moved_aside_by_a_killed_run_is_found_again(tmp_path: Path) -> None:
    write_state(tmp_path / "x-state", state())
    (tmp_path / "x-state").rename(tmp_path / ".x-state.old")

    assert find_latest(tmp_path, "x") == tmp_path / "x-state"


def test_numbers_of_numpy_do_not_make_a_state_unreadable(tmp_path: Path) -> None:
    write_state(tmp_path / "x-state", replace(state(), habits={"--rate": np.float64(0.5)}))

    read = read_state(tmp_path / "x-state")

    assert isinstance(read, SavedState)
    assert read.habits == {"--rate": 0.5}


def test_a_full_disk_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("enforce fail at inline_container.cc") from None

    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(OutputError, match="disk is full"):
        write_state(tmp_path / "x-state", state())
    assert not (tmp_path / "x-state").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", [FILE, "state.json"])
def test_a_state_that_is_a_pipe_is_refused_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="not a regular file|is damaged"):
        read_state(tmp_path)


def test_a_folder_that_is_no_state_and_one_that_is_missing_say_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a state folder"):
        read_state(tmp_path)
    with pytest.raises(OptionError, match="no such folder"):
        read_state(tmp_path / "missing")


def test_weights_of_another_network_are_refused() -> None:
    module = nn.Linear(2, 2)

    with pytest.raises(CheckpointError, match="1 of another shape"):
        load_module(module, {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="1 tensors missing"):
        load_module(module, {"weight": torch.zeros(2, 2)})


class Paged(torch.optim.Optimizer):
    """Keeps what is as large as a parameter in buffers of its own, as bitsandbytes' paged optimizers do."""

    is_paged = True

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})
        self.pages: list[torch.Tensor] = []

    def get_state_buffer(self, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        self.pages.append(torch.zeros_like(p, dtype=dtype))
        return self.pages[-1]


def test_a_paged_state_is_paged_again_after_a_resume() -> None:
    """Else it would lie on the device as a whole, and what fitted before the resume would not fit."""
    parameter, other = (nn.Parameter(torch.zeros(3, 2, dtype=torch.bfloat16)) for _ in range(2))
    saved, fresh = Paged([parameter]), Paged([other])
    saved.state[parameter] = {"step": 3, "state1": torch.randint(256, (3, 2), dtype=torch.uint8)}
    saved.state[parameter]["absmax1"] = torch.rand(1)

    restore_optimizer(fresh, {other: "a"}, optimizer_state(saved, {parameter: "a"}), torch.device("cpu"))

    state = fresh.state[other]
    assert [page.data_ptr() for page in fresh.pages] == [state["state1"].data_ptr()]
    assert (state["step"], state["state1"].dtype) == (3, torch.uint8)
    for name in ("state1", "absmax1"):
        assert torch.equal(state[name], saved.state[parameter][name])


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    saved = optimizer_state(torch.optim.SGD([parameter]), {parameter: "a"})

    with pytest.raises(CheckpointError, match="only in the state: a"):
        restore_optimizer(torch.optim.SGD([parameter]), {parameter: "b"}, saved, torch.device("cpu"))


def test_what_cannot_be_saved_is_refused_by_name() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter])
    optimizer.state[parameter] = {"projector": object()}

    with pytest.raises(OptionError, match="a/projector"):
        optimizer_state(optimizer, {parameter: "a"})
