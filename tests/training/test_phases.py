"""What features put before, around and after phases of a run, which know nothing of them."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modules.installation import EXTENSIONS
from tests.commands import ROOT
from tests.package.test_extensions import install
from tests.training.toy import (
    ToyFamily,
    metadata_of,
    same,
    toy_options,
    train_toy,
    write_caches,
    write_prompts,
)
from training.features import phases
from training.features.hooks import RunFeatures
from training.features.phases import RunPhase
from training.loop import make_phases, train
from training.options import TrainingOptions
from training.reports.history import RunHistory, history_path, read_history, read_session
from training.run import prepare_run
from training.training_run import GradientStep, TrainingRun

pytestmark = pytest.mark.usefixtures("nothing_compiled")
ADD: RunPhase[list[str], [int], int] = RunPhase("add")


def train_with(options: TrainingOptions, join: Callable[[RunFeatures], None]) -> TrainingRun:
    """Train with a feature that joins when everything is loaded."""
    with prepare_run(ToyFamily(), options) as run:
        join(run.features)
        run = replace(run, phases=make_phases(run.features))
        train(run)
    return run


def train_packages(folder: Path, *words: object) -> None:
    """Train the toy in a process of its own, with the two packages installed and named."""
    target = folder / "site"
    if not target.exists():
        install(target, "gradient_noise", "rise")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(target), str(ROOT)]),
        EXTENSIONS: "gradient_noise,rise",
        "TOY_PAGE": "1",
    }
    command = [sys.executable, ROOT / "tests" / "training" / "train_toy.py", folder, *words]
    subprocess.run([*map(str, command)], env=environment, check=True, cwd=ROOT)


def read_toy_history(folder: Path, name: str) -> RunHistory:
    path = history_path(folder / "output", name)
    session = read_session(path)
    assert session is not None
    return read_history(path, session)


def test_a_phase_without_features_is_the_function_itself(tmp_path: Path) -> None:
    write_caches(tmp_path)
    features = toy_options(tmp_path).features
    assert features.wrap(ADD, add_two) is add_two
    assert not features.added


def add_two(said: list[str], number: int) -> int:
    said.append(f"add {number}")
    return number + 2


def test_functions_stand_before_around_and_after_a_phase_in_their_order(tmp_path: Path) -> None:
    write_caches(tmp_path)
    features = toy_options(tmp_path).features
    features.after(ADD, lambda said, result: said.append(f"after {result}"))
    features.around(ADD, lambda add, said, number: 10 * add(said, number))
    features.around(ADD, lambda add, said, number: add(said, number + 1) + 5)
    features.before(ADD, lambda said, number: said.append(f"before {number}"))
    said: list[str] = []

    result = features.wrap(ADD, add_two)(said, 1)

    assert said == ["before 2", "add 2", "after 4"]
    assert result == 45


def test_a_phase_that_is_not_called_has_nothing_before_and_after_it(tmp_path: Path) -> None:
    write_caches(tmp_path)
    features = toy_options(tmp_path).features
    features.before(ADD, lambda said, number: said.append("before"))
    features.around(ADD, lambda add, said, number: 0)
    said: list[str] = []

    assert features.wrap(ADD, add_two)(said, 1) == 0
    assert said == []


def test_gradients_can_be_changed_before_they_are_clipped(tmp_path: Path) -> None:
    """The norm is that of the changed gradients, and the step is that of the clipped ones."""
    write_caches(tmp_path)
    norms: list[float] = []

    def scale(run: TrainingRun, step: GradientStep) -> None:
        for parameter in step.parameters:
            assert parameter.grad is not None
            parameter.grad *= 1000

    def join(features: RunFeatures) -> None:
        features.after(phases.GRADIENTS, scale)
        features.before(phases.STEP, lambda run, step: norms.append(float(step.norm)))

    words = ("--max_train_steps", 1, "--max_grad_norm", 0.01, "--optimizer_type", "SGD")
    run = train_with(toy_options(tmp_path, *words), join)

    plain = train_toy(tmp_path, *words, "--output_name", "plain")
    scaled = run.model.trainable.modules["network"].state_dict()
    assert norms[0] > 1
    for name, tensor in plain.items():  # clipped to the same norm
        if name in scaled:
            torch.testing.assert_close(scaled[name], tensor, rtol=1e-5, atol=1e-7)


def test_a_feature_ends_a_run_as_if_its_last_step_was_taken(tmp_path: Path) -> None:
    write_caches(tmp_path)
    options = toy_options(tmp_path, "--save_state")

    def end(run: TrainingRun, step: GradientStep) -> None:
        if run.progress.step == 2:
            run.request(phases.END, "this is enough")

    run = train_with(options, lambda features: features.after(phases.STEP, end))

    assert run.progress.step == 4  # asked for within step 3; its gradients were complete by then
    assert run.reporter.is_finished
    assert metadata_of(tmp_path / "output" / "x.safetensors")["ss_steps"] == "4"
    assert (tmp_path / "output" / "x-state").is_dir()


def test_a_feature_asks_for_a_save_and_for_samples_without_prompts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_caches(tmp_path)

    def ask(run: TrainingRun, step: GradientStep) -> None:
        if run.progress.step == 2:
            run.request(phases.SAVE, "it is good")
            run.request(phases.SAMPLE, "it is good")

    train_with(toy_options(tmp_path), lambda features: features.after(phases.STEP, ask))

    assert [path.name for path in (tmp_path / "output").glob("x-step*")] == ["x-step00000004.safetensors"]
    assert "nothing to sample without --sample_prompts" in caplog.text


@pytest.mark.slow
def test_two_packages_of_one_file_act_where_no_feature_of_ours_does(tmp_path: Path) -> None:
    write_caches(tmp_path)
    write_prompts(tmp_path)
    samples = ("--sample_prompts", tmp_path / "prompts.txt")
    # the loss of the toy goes up and down with the items of its steps
    train_packages(
        tmp_path, "--gradient_noise", 0.5, "--sample_rise", 0.01, *samples, "--output_name", "noisy"
    )
    train_packages(tmp_path, "--gradient_noise", 0, "--output_name", "silent")
    plain = train_toy(tmp_path, "--output_name", "plain")

    output = tmp_path / "output"
    noisy, silent = (load_file(output / f"{name}.safetensors") for name in ("noisy", "silent"))
    assert same(silent, plain)
    assert not same(noisy, plain)
    history = read_toy_history(tmp_path, "noisy")
    rises = [step for step in range(2, 9) if history.loss[step] > history.loss[step - 1] + 0.01]
    assert [step for step, text in history.notes if text.startswith("the loss rose by")] == rises != []
    assert len(history.samples) == len(list((output / "sample").glob("noisy_0*_00_*.png"))) >= 1
    page = (output / "noisy.html").read_text(encoding="utf-8")
    assert "the loss rose by" in page
