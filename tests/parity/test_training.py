"""Steps of wan_train_network.py equal those computed with diffusers' transformer at the same noise and timesteps.

The optimizer is plain gradient descent, so a step's change of the weights is the gradient itself, times the rate. The caches are
written here, by hand, in the known tuners' form and without our record.
"""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.parity.projects import ALPHA, FRAMES, HEIGHT, RANK, SEED, WIDTH, Project, train, write_project
from tests.parity.reference import relative_error
from tests.parity.running import TOLERANCE
from tests.parity.theirs import load_dit
from tests.parity.training import (
    Drawn,
    Factors,
    Item,
    linear_modules,
    loss_and_gradients,
    noise_of,
    read_factors,
    shuffled,
    stream_seed,
    uniform_of,
)

RATE = 2.0
DESCENT = ("--optimizer_type", "torch.optim.SGD", "--learning_rate", RATE, "--max_grad_norm", 0)


def by_shift(u: Tensor, flow_shift: float = 3.0) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(torch.special.ndtri(u))
    t = s * flow_shift / (1 + (flow_shift - 1) * s)
    return t, 1000 * t + 1


def by_sigma(u: Tensor) -> tuple[Tensor, Tensor]:
    timesteps = 1000 - (1000 * u).floor()
    return timesteps / 1000, timesteps


def by_uniform_in_range(u: Tensor) -> tuple[Tensor, Tensor]:
    t = u * 0.7 + 0.1
    return t, 1000 * t + 1


def plain(timesteps: Tensor) -> Tensor:
    return torch.ones_like(timesteps)


def cosmap(timesteps: Tensor) -> Tensor:
    sigmas = timesteps.round().clamp(1, 1000) / 1000
    return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))


def sigma_sqrt(timesteps: Tensor) -> Tensor:
    return (timesteps.round().clamp(1, 1000) / 1000) ** -2


Sampler = Callable[[Tensor], tuple[Tensor, Tensor]]  # uniform numbers -> sigmas and timesteps
Weights = Callable[[Tensor], Tensor]


def draw(batch: list[Item], number: int, sampler: Sampler, weights: Weights = plain) -> Drawn:
    sigmas, timesteps = sampler(uniform_of(batch, SEED, number))
    return Drawn(noise_of(batch, SEED, number), sigmas, timesteps, weights(timesteps))


def assert_steps(
    files: list[Path], project: Project, batches_of_step: Callable[[int], list[tuple[list[Item], Drawn]]], what: str
) -> None:
    """Each file is the one before, less the rate times the gradient of its step: of every module the change is compared.

    Before the first step up is zero, so down is what the first file holds (its gradient is zero).
    """
    dit, modules = load_dit(project.dit), linear_modules(project.dit)
    after, scale = read_factors(files[0])
    assert after.keys() == modules.keys()
    assert scale == ALPHA / RANK
    before: Factors = {name: (down, torch.zeros_like(up)) for name, (down, up) in after.items()}
    for step, path in enumerate(files):
        after, _ = read_factors(path)
        total: Factors = {name: (torch.zeros_like(down), torch.zeros_like(up)) for name, (down, up) in before.items()}
        batches = batches_of_step(step)
        for batch, drawn in batches:
            _, gradients = loss_and_gradients(dit, modules, before, scale, batch, drawn)
            total = {name: (pair[0] + gradients[name][0], pair[1] + gradients[name][1]) for name, pair in total.items()}
        worst = 0.0
        for name, gradient in total.items():
            for factor in (1,) if step == 0 else (0, 1):
                expected = before[name][factor] - RATE * gradient[factor] / len(batches)
                change = expected - before[name][factor]
                # keys of image tokens that are all alike (no image) cannot learn
                assert change.abs().max() > 1e-6 or name.endswith("_k_img"), f"{name} learns nothing, so nothing is compared"
                error = float((after[name][factor] - expected).abs().max() / max(expected.abs().max(), 1e-3))
                worst = max(worst, error)
        print(f"parity {what}, step {step + 1}: {worst:.2e}")  # noqa: T201
        assert worst <= TOLERANCE
        before = after


CASES: dict[str, tuple[str, list[object], Sampler, Weights]] = {
    "shift": ("t2v", ["--timestep_sampling", "shift", "--discrete_flow_shift", 3], by_shift, plain),
    "sigma": ("t2v", [], by_sigma, plain),
    "cosmap": ("t2v", ["--weighting_scheme", "cosmap"], by_sigma, cosmap),
    "range, sigma_sqrt": (
        "t2v",
        ["--timestep_sampling", "uniform", "--min_timestep", 100, "--max_timestep", 800, "--weighting_scheme", "sigma_sqrt"],
        by_uniform_in_range,
        sigma_sqrt,
    ),
    "checkpointing": ("t2v", ["--gradient_checkpointing"], by_sigma, plain),
    "i2v": ("i2v", ["--timestep_sampling", "shift", "--discrete_flow_shift", 3], by_shift, plain),
    "flf2v": ("flf2v", [], by_sigma, plain),
    "t2v-FC": ("fun-control", [], by_sigma, plain),
    "i2v-FC": ("fun-control-v1.1", [], by_sigma, plain),
}
AS_PROGRAMS = {"shift", "i2v"}


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.mark.parametrize("name", CASES)
def test_two_steps_equal_gradient_descent_with_diffusers(tmp_path: Path, name: str) -> None:
    kind, arguments, sampler, weights = CASES[name]
    project = write_project(tmp_path / "a project", kind)

    files = train(project, *DESCENT, *arguments, in_process=name not in AS_PROGRAMS)

    def batches(step: int) -> list[tuple[list[Item], Drawn]]:
        batch = shuffled(project.items, SEED, epoch=step)  # one batch an epoch
        return [(batch, draw(batch, step, sampler, weights))]

    assert_steps(files, project, batches, name)


def test_accumulated_batches_count_alike_also_where_the_last_step_of_an_epoch_has_fewer(tmp_path: Path) -> None:
    """Three batches of one item, two to a step: the epoch's second step has one."""
    project = write_project(tmp_path / "a project", "t2v", count=3, batch_size=1)

    files = train(project, *DESCENT, "--gradient_accumulation_steps", 2, steps=3, in_process=True)

    def batches(step: int) -> list[tuple[list[Item], Drawn]]:
        numbers = [[0, 1], [2], [3, 4]][step]
        orders = epochs_of_single_items(project, files)
        return [([orders[number]], draw([orders[number]], number, by_sigma)) for number in numbers]

    assert_steps(files, project, batches, "accumulation")


def epochs_of_single_items(project: Project, files: list[Path]) -> list[Item]:
    """The items of two epochs where every batch has one: shuffled within the bucket, then the batches by the same shuffler."""
    found: list[Item] = []
    for epoch in (0, 1):
        shuffle = random.Random(stream_seed(SEED, "items", epoch)).shuffle
        order = list(project.items)
        shuffle(order)
        shuffle(order)
        found += order
    return found


def test_the_losses_in_the_log_are_those_of_diffusers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    project = write_project(tmp_path / "a project", "t2v")
    files = train(project, *DESCENT, "--logging_dir", tmp_path / "logs", "--log_with", "tensorboard", in_process=True)

    (folder,) = {path.parent for path in (tmp_path / "logs").rglob("*tfevents*")}
    events = EventAccumulator(str(folder)).Reload()
    logged = [event.value for event in events.Scalars("loss/current")]
    dit, modules = load_dit(project.dit), linear_modules(project.dit)
    first, scale = read_factors(files[0])
    untrained = {name: (down, torch.zeros_like(up)) for name, (down, up) in first.items()}
    for step, factors in enumerate((untrained, first)):
        batch = shuffled(project.items, SEED, epoch=step)
        loss, _ = loss_and_gradients(dit, modules, factors, scale, batch, draw(batch, step, by_sigma))
        assert relative_error(torch.tensor([logged[step]]), torch.tensor([loss])) <= TOLERANCE


def test_the_metadata_of_the_file_say_how_it_was_made(tmp_path: Path) -> None:
    project = write_project(tmp_path / "a project", "t2v")
    path = train(project, *DESCENT, steps=1, in_process=True)[-1]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "wan"
    assert metadata["ss_network_module"] == "networks.lora_wan"
    assert (metadata["ss_network_dim"], float(metadata["ss_network_alpha"])) == (str(RANK), ALPHA)
    assert metadata["modelspec.architecture"] == "wan2.1/lora"
    assert metadata["ss_optimizer"].startswith("torch.optim.sgd.SGD")
    (table,) = json.loads(metadata["ss_datasets"])
    assert (table["resolution"], table["target_frames"]) == ([WIDTH, HEIGHT], [FRAMES])
