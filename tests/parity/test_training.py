"""Steps of wan_train_network.py equal those computed with diffusers' transformer at the same noise and
timesteps.

The optimizer is plain gradient descent, so a step's change of the weights is the gradient itself, times the
rate. The caches are written here, by hand, in the known tuners' form and without our record.
"""

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import isfunction
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import WanLoraLoaderMixin
from safetensors import safe_open
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tests.parity.projects import ALPHA, RANK, SEED, WIDTH, WIDTH_5B, Project, train, write_project
from tests.parity.running import TOLERANCE, assert_equal
from tests.parity.theirs import load_dit
from tests.parity.training import (
    Drawn,
    Factors,
    Item,
    Teacher,
    assert_descent,
    linear_modules,
    loss_and_gradients,
    noise_of,
    read_factors,
    shuffled,
    stream,
    stream_seed,
    uniform_of,
)

RATE = 2.0
STRONG = ("--optimizer_type", "AdamW", "--learning_rate", 0.05)
DESCENT = ("--optimizer_type", "torch.optim.SGD", "--learning_rate", RATE, "--max_grad_norm", 0)


def by_shift(u: Tensor, flow_shift: float = 3.0) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(torch.special.ndtri(u))
    t = s * flow_shift / (1 + (flow_shift - 1) * s)
    return t, 1000 * t + 1


def by_sigma(u: Tensor) -> tuple[Tensor, Tensor]:
    timesteps = 1000 - (1000 * u).floor()
    return timesteps / 1000, timesteps


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
    sigmas, timesteps = sampler(uniform_of(batch, number))
    return Drawn(noise_of(batch, number), sigmas, timesteps, weights(timesteps))


# of one step
Batches = Sequence[tuple[list[Item], Drawn] | tuple[list[Item], Drawn, Teacher]]


def assert_steps(
    files: list[Path],
    project: Project,
    dit: Any,
    batches_of: Callable[[int], Batches],
    what: str,
    start: Factors | None = None,
) -> None:
    """Each file is the one before, less the rate times the gradient of its step."""
    modules = linear_modules(project.dit)

    def gradients_at(factors: Factors, step: int) -> Factors:
        return mean_gradients(dit, modules, factors, batches_of(step))

    assert_descent(files, modules, RATE, gradients_at, what, TOLERANCE, start)


def mean_gradients(dit: Any, modules: dict[str, str], factors: Factors, batches: Batches) -> Factors:
    """Of the micro-batches of a step. dit: the network, or a function from timesteps to it."""
    each = []
    for batch in batches:
        network = dit(batch[1].timesteps) if isfunction(dit) else dit
        each.append(loss_and_gradients(network, modules, factors, ALPHA / RANK, *batch)[1])
    return {
        name: (sum(one[name][0] for one in each) / len(each), sum(one[name][1] for one in each) / len(each))
        for name in factors
    }


def one_batch_an_epoch(
    project: Project, sampler: Sampler, weights: Weights = plain
) -> Callable[[int], Batches]:
    """Both items in one batch, whose order is that of the epoch."""

    def batches_of(step: int) -> Batches:
        batch = shuffled(project.items, epoch=step)
        return [(batch, draw(batch, step, sampler, weights))]

    return batches_of


CASES: dict[str, tuple[str, list[object], Sampler, Weights]] = {
    "shift": ("t2v", ["--timestep_sampling", "shift", "--discrete_flow_shift", 3], by_shift, plain),
    "sigma": ("t2v", [], by_sigma, plain),
    "sigma_sqrt": ("t2v", ["--weighting_scheme", "sigma_sqrt"], by_sigma, sigma_sqrt),
    "cosmap": ("t2v", ["--weighting_scheme", "cosmap"], by_sigma, cosmap),
    "i2v": ("i2v", ["--gradient_checkpointing"], by_sigma, plain),
    "flf2v": ("flf2v", [], by_sigma, plain),
    "t2v-FC": ("fun-control", [], by_sigma, plain),
    "i2v-FC": ("fun-control-v1.1", [], by_sigma, plain),
    "i2v-A14B": ("i2v-2.2", [], by_sigma, plain),
    "i2v-A14B-FC": ("fun-control-2.2", [], by_sigma, plain),
}


def given_in(number: int, probability: float) -> int:
    """Whether the first latent frame of micro-batch `number` stays clean."""
    return int(torch.rand((), generator=stream(SEED, "given frames", number)).item() < probability)


@pytest.mark.slow_cases("None")
@pytest.mark.parametrize("probability", [None, 0.3, pytest.param(0, marks=pytest.mark.slow)])
def test_the_first_frame_of_ti2v_is_given_and_not_learned(tmp_path: Path, probability: float | None) -> None:
    """By default in half of the batches."""
    project = write_project(tmp_path / "a project", "ti2v")
    option = () if probability is None else ("--first_frame_probability", probability)

    files = train(project, *DESCENT, *option)

    share = 0.5 if probability is None else probability
    given = [given_in(number, share) for number in (0, 1)]
    assert given == {0.5: [1, 1], 0.3: [1, 0], 0: [0, 0]}[share]

    def batches_of(step: int) -> Batches:
        ((batch, drawn),) = one_batch_an_epoch(project, by_sigma)(step)
        return [(batch, replace(drawn, given=given[step]))]

    assert_steps(files, project, load_dit(project.dit), batches_of, f"first frame {probability}")
    with safe_open(files[-1], "pt") as file:
        assert float(file.metadata()["ss_first_frame_probability"]) == share


@pytest.mark.slow_cases("cosmap", "i2v-A14B-FC", "i2v-FC", "sigma_sqrt")
@pytest.mark.parametrize("name", CASES)
def test_two_steps_equal_gradient_descent_with_diffusers(tmp_path: Path, name: str) -> None:
    kind, arguments, sampler, weights = CASES[name]
    project = write_project(tmp_path / "a project", kind)

    files = train(project, *DESCENT, *arguments)

    assert_steps(files, project, load_dit(project.dit), one_batch_an_epoch(project, sampler, weights), name)


def test_accumulated_batches_count_alike_also_where_the_last_step_of_an_epoch_has_fewer(
    tmp_path: Path,
) -> None:
    """Three batches of one item, two to a step: the epoch's second step has one."""
    project = write_project(tmp_path / "a project", "t2v", count=3, batch_size=1)

    files = train(project, *DESCENT, "--gradient_accumulation_steps", 2, steps=3)

    order = [item for epoch in (0, 1) for item in single_items(project, epoch)]

    def batches_of(step: int) -> Batches:
        numbers = [[0, 1], [2], [3, 4]][step]
        return [([order[number]], draw([order[number]], number, by_sigma)) for number in numbers]

    assert_steps(files, project, load_dit(project.dit), batches_of, "accumulation")


def single_items(project: Project, epoch: int) -> list[Item]:
    """The items of an epoch where every batch has one: shuffled within the bucket, then as batches by the
    same shuffler.
    """
    shuffle = random.Random(stream_seed(SEED, "items", epoch)).shuffle
    order = list(project.items)
    shuffle(order)
    shuffle(order)
    return order


def test_training_goes_on_from_a_file_and_on_top_of_another(tmp_path: Path) -> None:
    """--network_weights and --base_weights, the latter merged by diffusers here."""
    project = write_project(tmp_path / "a project", "t2v")
    (base, start) = (
        train(project, *STRONG, "--seed", seed, steps=1, name=f"of {seed}")[0] for seed in (1, 2)
    )
    more = ("--network_weights", start, "--base_weights", base, "--base_weights_multiplier", 0.5)

    files = train(project, *DESCENT, *more)

    dit = load_dit(project.dit)
    dit.load_lora_adapter(WanLoraLoaderMixin.lora_state_dict(str(base)), prefix="transformer")
    dit.fuse_lora(lora_scale=0.5)
    batches_of = one_batch_an_epoch(project, by_sigma)
    assert_steps(files, project, dit, batches_of, "continued on a base", read_factors(start)[0])


def test_a_teacher_is_told_dropped_captions_and_a_first_frame_that_the_network_is_not(
    tmp_path: Path,
) -> None:
    project, rate, weight = write_project(tmp_path / "a project", "ti2v"), 0.5, 0.4
    with (project.folder / "dataset.toml").open("a", encoding="utf-8") as file:
        file.write(f"caption_dropout_rate = {rate}\n")
    empty = 3 * torch.randn(12, project.items[0].text.shape[1], generator=stream("empty")).bfloat16()
    save_file({"varlen_t5_bfloat16": empty}, project.folder / "cache" / "wan_te.empty.safetensors")

    files = train(project, *DESCENT, "--teacher", "base", "--teacher_weight", weight)

    told: list[bool] = []

    def batches_of(step: int) -> Batches:
        full = shuffled(project.items, step)
        draws = [random.Random(stream_seed(SEED, "caption", step, place)).random() for place in (0, 1)]
        dropped = [number < rate for number in draws]
        batch = [
            replace(item, text=empty) if is_dropped else item
            for item, is_dropped in zip(full, dropped, strict=True)
        ]
        drawn = replace(draw(batch, step, by_sigma), given=given_in(step, 0.5))
        told.extend([not drawn.given, *dropped])
        teacher = Teacher(full, replace(drawn, given=1), weight)
        return [(batch, drawn, teacher)]

    assert_steps(files, project, load_dit(project.dit), batches_of, "with a teacher")
    assert True in told
    assert False in told


def logged_in(folder: Path) -> EventAccumulator:
    """The TensorBoard file below a folder."""
    (place,) = {path.parent for path in folder.rglob("*tfevents*")}
    return EventAccumulator(str(place)).Reload()


def test_the_losses_in_the_log_are_those_of_diffusers(tmp_path: Path) -> None:
    project = write_project(tmp_path / "a project", "t2v")
    files = train(project, *DESCENT, "--logging_dir", tmp_path / "logs", "--log_with", "tensorboard")

    logged = [event.value for event in logged_in(tmp_path / "logs").Scalars("loss/current")]

    dit, modules = load_dit(project.dit), linear_modules(project.dit)
    first, scale = read_factors(files[0])
    untrained = {name: (down, torch.zeros_like(up)) for name, (down, up) in first.items()}
    batches_of = one_batch_an_epoch(project, by_sigma)
    losses = [
        loss_and_gradients(dit, modules, factors, scale, *batches_of(step)[0])[0]
        for step, factors in enumerate((untrained, first))
    ]
    assert_equal(torch.tensor(logged), torch.tensor(losses), "losses")


@pytest.mark.parametrize("kind", ["t2v", pytest.param("ti2v", marks=pytest.mark.slow)])
def test_the_validation_loss_is_that_of_diffusers(tmp_path: Path, kind: str) -> None:
    """Two of four clips are held back; five bands of timesteps, whose noise belongs to the item.

    With --first_frame_probability the item says too whether its first frame is given.
    """
    project = write_project(tmp_path / "a project", kind, count=4)
    log = ("--logging_dir", tmp_path / "logs", "--log_with", "tensorboard")

    files = train(project, *DESCENT, *log, "--validation_split", 0.5, steps=1)

    logged = [event.value for event in logged_in(tmp_path / "logs").Scalars("validation/loss")]
    dit, modules = load_dit(project.dit), linear_modules(project.dit)
    after, scale = read_factors(files[0])
    before = {name: (down, torch.zeros_like(up)) for name, (down, up) in after.items()}
    are_given: set[bool] = set()
    by_hash = sorted(range(4), key=lambda index: hashlib.sha256(f"clip {index}".encode()).digest())
    expected = []
    for factors in (before, after):
        losses = []
        for index in by_hash[:2]:
            for band, sigma in enumerate((0.1, 0.3, 0.5, 0.7, 0.9)):
                key = f"clip {index}_00000-005_{WIDTH_5B if kind == 'ti2v' else WIDTH:04d}x0032_wan"
                noise = torch.randn(
                    1, *project.items[index].latents.shape, generator=stream("validation", key, band)
                )
                drawn = Drawn(noise, torch.tensor([sigma]), torch.tensor([1000 * sigma]), torch.ones(1))
                if kind == "ti2v":
                    given = torch.rand((), generator=stream("validation", key, "given frames")).item() < 0.5
                    drawn = replace(drawn, given=int(given))
                    are_given.add(given)
                losses.append(
                    loss_and_gradients(dit, modules, factors, scale, [project.items[index]], drawn)[0]
                )
        expected.append(sum(losses) / len(losses))
    assert_equal(torch.tensor(logged), torch.tensor(expected), "validation losses")
    assert kind == "t2v" or are_given == {False, True}
