"""Optimizers on a device: their steps are the CPU's, and their states go on."""

from collections.abc import Callable

import pytest
import torch

from tests.gpu.measuring import equal_bits
from tests.gpu.runs.project import CPU, ON_GPU, Project

pytestmark = ON_GPU

ADAFACTOR = ("--optimizer_args", "relative_step=False", "scale_parameter=False")
# the package, the name, further options
PLAIN = (
    ("torch", "AdamW", ()),
    ("torch", "SGD", ("--optimizer_args", "momentum=0.9")),
    ("torch", "torch.optim.Adamax", ()),
    ("transformers", "Adafactor", ADAFACTOR),
    ("lion_pytorch", "Lion", ()),
    ("prodigyopt", "Prodigy", ("--learning_rate", "1")),
    ("schedulefree", "AdamWScheduleFree", ()),
    ("schedulefree", "RAdamScheduleFree", ()),
)
EIGHT_BITS = tuple(("bitsandbytes", name, ()) for name in ("AdamW8bit", "PagedAdamW8bit", "Lion8bit"))
IDS = [name for _, name, _ in (*PLAIN, *EIGHT_BITS)]


@pytest.fixture
def project(project_of: Callable[[str], Project]) -> Project:
    return project_of("wan t2v-1.3B")


@pytest.mark.parametrize(("package", "name", "more"), PLAIN, ids=IDS[: len(PLAIN)])
def test_losses_are_those_of_the_cpu(
    project: Project, device: torch.device, package: str, name: str, more: tuple[str, ...]
) -> None:
    pytest.importorskip(package)
    chosen = ("--optimizer_type", name, *more)
    ours, theirs = (project.train(where, f"{name} {where.type}", *chosen, steps=5) for where in (device, CPU))
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-3)
    assert all(tensor.isfinite().all() for tensor in ours.tensors.values())


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize(("package", "name", "more"), [*PLAIN, *EIGHT_BITS], ids=IDS)
def test_a_state_goes_on_to_the_same_bits(
    project: Project, device: torch.device, package: str, name: str, more: tuple[str, ...]
) -> None:
    pytest.importorskip(package)
    if (package, device.type) == ("bitsandbytes", "cpu") and "Paged" in name:
        pytest.skip("paged memory is CUDA's")
    chosen = ("--optimizer_type", name, *more)
    whole = project.train(device, "whole", *chosen, steps=4)
    project.train(device, "half", *chosen, "--save_state", steps=2)
    resumed = project.train(device, "resumed", *chosen, "--resume", "output/half-state", steps=4)
    assert resumed.losses == whole.losses[2:]
    assert all(equal_bits(resumed.tensors[key], tensor) for key, tensor in whole.tensors.items())
