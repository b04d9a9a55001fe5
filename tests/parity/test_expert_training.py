"""Steps of wan_train_network.py in two transformers equal those computed with diffusers' at the same noise
and timesteps, each micro-batch in the transformer that its timestep belongs to.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.parity.projects import ALPHA, RANK, Project, train, write_project
from tests.parity.running import TOLERANCE
from tests.parity.test_training import (
    DESCENT,
    PLAIN,
    Batches,
    assert_steps,
    by_sigma,
    draw,
    mean_gradients,
    single_items,
)
from tests.parity.theirs import load_dit
from tests.parity.training import linear_modules, read_factors
from tests.tiny.wan_dit import tiny_state, write_dit

BOUNDARY = 600
BOTH = ("--task", "t2v-A14B", "--timestep_boundary", BOUNDARY / 1000)
STEPS = 3


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = write_project(tmp_path / "a project", "t2v", count=4, batch_size=1)
    write_dit(made.models, tiny_state("t2v", seed=9), name="dit_high")
    return made


def batches_by_step(project: Project) -> list[Batches]:
    """Two micro-batches of one item to a step."""
    order = [item for epoch in (0, 1) for item in single_items(project, epoch)]
    pairs = [[2 * step, 2 * step + 1] for step in range(STEPS)]
    return [[([order[number]], draw([order[number]], number, by_sigma)) for number in pair] for pair in pairs]


def is_high(timesteps: Tensor) -> bool:
    return bool(timesteps[0] >= BOUNDARY)


def expert_options(project: Project) -> list[object]:
    high = project.models / "dit_high.safetensors"
    return [*BOTH, "--dit_high_noise", high, "--gradient_accumulation_steps", 2]


def network_at(project: Project) -> Callable[[Tensor], Any]:
    low, high = load_dit(project.dit), load_dit(project.models / "dit_high.safetensors")
    return lambda timesteps: high if is_high(timesteps) else low


def test_steps_in_two_transformers_equal_gradient_descent_with_diffusers(project: Project) -> None:
    steps = batches_by_step(project)
    sides = [[is_high(drawn.timesteps) for _, drawn in step] for step in steps]
    assert [True, False] in [sorted(pair, reverse=True) for pair in sides]  # both work in one step

    files = train(project, *DESCENT, *expert_options(project), steps=STEPS, in_process=True)

    assert_steps(files, project, network_at(project), lambda step: steps[step], "two experts")
    with safe_open(files[-1], "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_wan_expert"] == "both"
    assert metadata["ss_sd_model_name"] == "dit.safetensors"
    assert metadata["ss_sd_model_name_high_noise"] == "dit_high.safetensors"


def test_a_network_for_each_transformer_learns_from_its_micro_batches_alone(project: Project) -> None:
    """Each file is compared with descent on the gradients of its side, divided by both micro-batches."""
    steps, network = batches_by_step(project), network_at(project)
    files = train(
        project, *DESCENT, *expert_options(project), "--lora_per_expert", steps=STEPS, in_process=True
    )

    for part, side in (("low_noise", False), ("high_noise", True)):
        own = [path.with_name(f"{path.stem}_{part}.safetensors") for path in files]
        first, scale = read_factors(own[0])
        modules = linear_modules(project.dit)
        assert first.keys() == modules.keys()
        assert scale == ALPHA / RANK
        before = {name: (down, torch.zeros_like(up)) for name, (down, up) in first.items()}
        for step, path in enumerate(own):
            after, _ = read_factors(path)
            batches = [batch for batch in steps[step] if is_high(batch[1].timesteps) == side]
            share = len(batches) / len(steps[step])
            if not batches:
                assert all(
                    torch.equal(after[name][part], before[name][part]) for name in after for part in (0, 1)
                )
                continue
            gradients = mean_gradients(network, modules, before, scale, batches)
            taken = PLAIN.steps_of(
                {name: (share * down, share * up) for name, (down, up) in gradients.items()}
            )
            for name in taken:
                for factor in (0, 1):
                    expected = before[name][factor] - taken[name][factor]
                    error = (after[name][factor] - expected).abs().max() / max(expected.abs().max(), 1e-3)
                    assert error <= TOLERANCE, (part, step, name)
            before = after
        with safe_open(own[-1], "pt") as file:
            metadata = file.metadata()
        assert metadata["ss_wan_expert"] == part.removesuffix("_noise")
        assert metadata["ss_sd_model_name"] == f"dit{'_high' * side}.safetensors"


def test_the_high_noise_transformer_alone_is_trained_on_its_timesteps(project: Project) -> None:
    """It equals training the same file as --dit with a window."""
    high = project.models / "dit_high.safetensors"
    shared = [*DESCENT, *BOTH, "--timestep_sampling", "uniform"]
    window = ["--min_timestep", BOUNDARY, "--preserve_distribution_shape"]
    alone = train(project, *shared, name="a", in_process=True, dits=["--dit_high_noise", high])
    as_only = train(project, *shared, *window, name="b", in_process=True, dits=["--dit", high])
    first, second = (read_factors(files[-1])[0] for files in (alone, as_only))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name][part], second[name][part]) for name in first for part in (0, 1))
    for files in (alone, as_only):
        with safe_open(files[-1], "pt") as file:
            assert file.metadata()["ss_wan_expert"] == "high"
