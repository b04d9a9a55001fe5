"""State folders and optimizer states: written, found, checked, read to the bit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from modules.errors import CheckpointError, OptionError
from training.optimizers.state import encode_optimizer, restore_optimizer
from training.progress import Progress
from training.saving.states import (
    SavedState,
    check_identity,
    find_latest,
    load_module,
    read_state,
    write_state,
)


def state(step: int = 3) -> SavedState:
    progress = Progress(
        seed=5, session_id=1, started_at=0.125, step=step, epoch=1, position=2, losses=[0.1, 1 / 3]
    )
    parts = {"network": {"a": torch.arange(4.0), "b": torch.tensor(1, dtype=torch.int64)}, "optimizer": {}}
    return SavedState(Path(), progress, {"--seed": 5}, {"--x": "y"}, {"schedule": {"step": step}}, parts)


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    write_state(tmp_path / "x-state", state())

    read = read_state(tmp_path / "x-state")

    assert isinstance(read, SavedState)
    assert read.progress == state().progress
    assert (read.identity, read.habits, read.described) == (
        state().identity,
        state().habits,
        state().described,
    )
    assert torch.equal(read.parts["network"]["a"], torch.arange(4.0))
    assert read.parts["network"]["b"].item() == 1


def test_the_state_with_the_most_steps_is_the_latest(tmp_path: Path) -> None:
    for name, step in {
        "x-000001-state": 4,
        "x-step00000006-state": 6,
        "x-step00000005-state": 5,
        "y-state": 9,
        "x2-state": 9,
    }.items():
        write_state(tmp_path / name, state(step))
    (tmp_path / "x-000009-state").mkdir()  # without a record

    assert find_latest(tmp_path, "x") == tmp_path / "x-step00000006-state"
    assert find_latest(tmp_path, "z") is None
    assert find_latest(tmp_path / "nowhere", "x") is None


def test_a_state_moved_aside_by_a_killed_run_is_found_again(tmp_path: Path) -> None:
    write_state(tmp_path / "x-state", state())
    (tmp_path / "x-state").rename(tmp_path / ".x-state.old")

    assert find_latest(tmp_path, "x") == tmp_path / "x-state"


def test_a_damaged_state_is_passed_over_by_latest_and_refused_by_name(tmp_path: Path) -> None:
    write_state(tmp_path / "x-000001-state", state(1))
    write_state(tmp_path / "x-000002-state", state(2))
    path = tmp_path / "x-000002-state" / "network.safetensors"
    path.write_bytes(path.read_bytes()[:-3])

    assert find_latest(tmp_path, "x") == tmp_path / "x-000001-state"
    with pytest.raises(CheckpointError, match=r"network\.safetensors is damaged"):
        read_state(tmp_path / "x-000002-state")


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    write_state(tmp_path / "x-state", state())
    path = tmp_path / "x-state" / "network.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))

    with pytest.raises(CheckpointError, match="checksum"):
        read_state(tmp_path / "x-state")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": "other"}', '{"format": "reelsmith training state", "version": 99}']
)
def test_a_record_that_is_none_is_one_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content, encoding="utf-8")

    with pytest.raises(CheckpointError):
        read_state(tmp_path)


def test_a_folder_that_is_no_state_and_one_that_is_missing_say_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a state folder"):
        read_state(tmp_path)
    with pytest.raises(OptionError, match="no such folder"):
        read_state(tmp_path / "missing")


def test_differences_name_option_and_both_values() -> None:
    with pytest.raises(OptionError, match="--seed: 5 in the state, 6 now"):
        check_identity({"--seed": 5, "--x": 1}, {"--seed": 6, "--x": 1}, Path("here"))


def test_weights_of_another_network_are_refused() -> None:
    module = nn.Linear(2, 2)

    with pytest.raises(CheckpointError, match="1 of another shape"):
        load_module(module, {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)}, Path("here"))
    with pytest.raises(CheckpointError, match="1 tensors missing"):
        load_module(module, {"weight": torch.zeros(2, 2)}, Path("here"))


def test_numbers_that_json_rounds_elsewhere_come_back_exactly(tmp_path: Path) -> None:
    exact = replace(state().progress, losses=[0.1 + 0.2, 1e-300, 5e-324])

    write_state(tmp_path / "x", replace(state(), progress=exact))

    assert json.loads((tmp_path / "x" / "state.json").read_text())["progress"]["losses"][0] == 0.1 + 0.2
    read = read_state(tmp_path / "x")
    assert isinstance(read, SavedState)
    assert read.progress == exact


class Odd(torch.optim.Optimizer):
    """Keeps float32 and 8-bit tensors for bf16 parameters, shared tables, nested and plain values."""

    table = torch.linspace(0, 1, 256)

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(
            parameters, {"betas": (0.9, 0.95), "name": "odd", "k": 3, "scale": torch.tensor(0.1)}
        )

    def step(self) -> None:  # type: ignore[override]
        for index, parameter in enumerate(self.param_groups[0]["params"]):
            self.state[parameter] = {
                "step": torch.tensor(3.0),
                "moment": torch.rand_like(parameter, dtype=torch.float32),
                "bytes": torch.full_like(parameter, index, dtype=torch.uint8),
                "table": self.table,
                "nested": {"a": [1, (2.5, None)], 7: torch.ones(2, dtype=torch.float64)},
            }


def test_an_optimizer_state_keeps_every_bit_dtype_and_kind() -> None:
    def made() -> tuple[Odd, dict[torch.Tensor, str]]:
        parameters = [
            nn.Parameter(torch.zeros(3, 2, dtype=torch.bfloat16)),
            nn.Parameter(torch.zeros(4, dtype=torch.bfloat16)),
        ]
        return Odd(parameters), {parameter: f"p{index}" for index, parameter in enumerate(parameters)}

    saved, names = made()
    saved.step()
    saved.param_groups[0]["k"] = 4
    description, tensors = encode_optimizer(saved, names)
    fresh, fresh_names = made()

    restore_optimizer(fresh, fresh_names, json.loads(json.dumps(description)), tensors, torch.device("cpu"))

    assert fresh.param_groups[0]["k"] == 4
    assert fresh.param_groups[0]["betas"] == (0.9, 0.95)
    assert torch.equal(fresh.param_groups[0]["scale"], torch.tensor(0.1))
    for before, after in zip(names, fresh_names, strict=True):
        ours, theirs = saved.state[before], fresh.state[after]
        assert {
            key: (value.dtype, value.tolist())
            for key, value in ours.items()
            if isinstance(value, torch.Tensor)
        } == {
            key: (value.dtype, value.tolist())
            for key, value in theirs.items()
            if isinstance(value, torch.Tensor)
        }
        assert theirs["nested"]["a"] == [1, (2.5, None)]
        assert theirs["nested"][7].dtype == torch.float64


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
    description, tensors = encode_optimizer(saved, {parameter: "a"})

    restore_optimizer(fresh, {other: "a"}, description, tensors, torch.device("cpu"))

    state = fresh.state[other]
    assert [page.data_ptr() for page in fresh.pages] == [state["state1"].data_ptr()]
    assert (state["step"], state["state1"].dtype) == (3, torch.uint8)
    for name in ("state1", "absmax1"):
        assert torch.equal(state[name], saved.state[parameter][name])


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    description, tensors = encode_optimizer(torch.optim.SGD([parameter]), {parameter: "a"})

    with pytest.raises(CheckpointError, match="only in the state: a"):
        restore_optimizer(
            torch.optim.SGD([parameter]), {parameter: "b"}, description, tensors, torch.device("cpu")
        )


def test_what_cannot_be_saved_is_refused_by_name() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter])
    optimizer.state[parameter] = {"projector": object()}

    with pytest.raises(OptionError, match="a/projector"):
        encode_optimizer(optimizer, {parameter: "a"})
