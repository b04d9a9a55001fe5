"""A training adapter and a teacher through the commands that users type, on tiny models of video and picture
families.
"""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.faults.messages import assert_one_message, run_here
from tests.test_families import shown
from tests.tiny.families import family_called
from tests.tiny.runs import RUN, TinyProject, make_project
from tests.training.toy import same

KINDS = ["wan t2v-1.3B", pytest.param("flux", marks=pytest.mark.slow)]
EXACT = ("--learning_rate", "1e-2")
SAMPLES = ("--sample_prompts", "prompts.txt", "--sample_at_first")
SMALL = ("--fp8_base", "--fp8_scaled", "--gradient_checkpointing", "--blocks_to_swap", "1")


@pytest.fixture(scope="module", params=KINDS)
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    """With a trained LoRA `adapter/x.safetensors`."""
    made = make_project(family_called(request.param), tmp_path_factory.mktemp("a project"))
    made.train("adapter")
    return made


def train(project: TinyProject, name: str, *words: str) -> list[float]:
    """Train into a folder of this name; return the losses of the steps."""
    project.train(name, *EXACT, "--logging_dir", f"{name}/logs", *words)
    (log,) = (project.folder / name / "logs").rglob("*tfevents*")
    events = EventAccumulator(str(log.parent)).Reload().Scalars("loss/current")
    return [event.value for event in events]


ADAPTER = ("--training_adapter", "adapter/x.safetensors")


def test_losses_are_those_of_the_merged_model_and_samples_those_of_the_plain_one(
    project: TinyProject,
) -> None:
    merged = train(project, "merged", "--base_weights", ADAPTER[1])
    plain = train(project, "plain", *SAMPLES)

    adapted = train(project, "adapted", *ADAPTER, *SAMPLES)

    # float32 rounds once where a file is merged, and in each product where it is added
    assert adapted == pytest.approx(merged, rel=1e-6)
    assert adapted != pytest.approx(plain, rel=1e-3)
    ours, base = (shown(project.folder / name / "sample") for name in ("adapted", "plain"))
    assert torch.equal(ours, base)


def test_in_8_bits_with_swapped_blocks_samples_are_those_of_the_plain_model_too(project: TinyProject) -> None:
    plain = train(project, "small plain", *SMALL, *SAMPLES)

    adapted = train(project, "small adapted", *SMALL, *ADAPTER, *SAMPLES)

    assert adapted != pytest.approx(plain, rel=1e-3)
    ours, base = (shown(project.folder / name / "sample") for name in ("small adapted", "small plain"))
    assert torch.equal(ours, base)


def test_a_resumed_run_ends_with_equal_bytes(project: TinyProject) -> None:
    words = (*EXACT, *ADAPTER, "--teacher", "base")
    resume = ("--resume", "whole/x-step00000002-state")
    full = project.train("whole", *words, "--save_state", "--save_every_n_steps", "2")

    assert same(project.train("resumed", *words, *resume), full)

    twice = (*RUN, *words, *resume, "--output_dir", "twice", "--training_adapter_multiplier", "2")
    said = run_here(*project.family.train, *twice, folder=project.folder)
    assert ":2, " in assert_one_message(*said, "--training_adapter: x.safetensors:1")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("model/dit.safetensors", "is not a LoRA for a video or image model"),
        ("prompts.txt", "prompts.txt"),
        ("none.safetensors", "no such file"),
    ],
)
def test_a_wrong_file_is_told_in_one_message(project: TinyProject, file: str, words: str) -> None:
    command = (*project.family.train, *RUN, "--output_dir", "wrong", "--training_adapter", file)

    assert_one_message(*run_here(*command, folder=project.folder), words)


def test_a_plan_is_made_with_both(project: TinyProject) -> None:
    planned = (*RUN, "--output_dir", "planned", "--plan", "24", *ADAPTER, "--teacher", "base")

    project.run(*project.family.train, *planned)

    assert not (project.folder / "planned").exists()
