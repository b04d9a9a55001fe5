"""Generation against latents that the pocket model made when it was finished: a changed shift, sigma grid or
solver shows here.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modules.flow.schedule import Schedule, flow_schedule, make_schedule
from tests.pocket.regression import CASES, FILE, latents, write_float32_dit


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_float32_dit(tmp_path_factory.mktemp("dit") / "dit.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_latents_are_what_they_were(dit: Path, tmp_path: Path, case: str) -> None:
    assert torch.allclose(latents(dit, tmp_path, case), load_file(FILE)[case], atol=2e-3)


@pytest.mark.parametrize(
    "mistake",
    ["flow shift 3.1 instead of 3", "the grid of another solver", "a grid that begins one step late"],
)
def test_a_wrong_schedule_would_be_seen(
    dit: Path, tmp_path: Path, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(solver: str, steps: int, flow_shift: float, table: Sequence[float]) -> Schedule:
        match mistake:
            case "flow shift 3.1 instead of 3":
                return make_schedule(solver, steps, 3.1)
            case "the grid of another solver":
                return make_schedule("dpm++" if solver == "unipc" else "unipc", steps, flow_shift)
        late = make_schedule(solver, steps + 1, flow_shift)
        return flow_schedule(late.sigmas[1:], late.timesteps[1:])

    monkeypatch.setattr("modules.flow.solvers.make_schedule", wrong)
    for case in ("vanilla_shift_3", "unipc_shift_3"):
        assert not torch.allclose(latents(dit, tmp_path / case, case), load_file(FILE)[case], atol=2e-3), case
