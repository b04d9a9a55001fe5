"""A training adapter and a teacher through the commands that users type, on tiny models of video and picture
families.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.test_families import shown
from tests.tiny.families import FAMILIES, RATE, TinyFamily
from tests.training.toy import same

KINDS = [family for family in FAMILIES if family.name in {"wan t2v-1.3B", "flux"}]
RUN = ("--max_train_steps", "3", "--seed", "1", "--max_data_loader_n_workers", "0")
EXACT = ("--learning_rate", "1e-2", *RUN)
SAMPLES = ("--sample_prompts", "prompts.txt", "--sample_at_first")
SMALL = ("--fp8_base", "--fp8_scaled", "--gradient_checkpointing", "--blocks_to_swap", "1")


@pytest.fixture(scope="module", params=KINDS, ids=lambda family: family.name)
def project(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TinyFamily, Path]:
    """A folder with caches, and a trained LoRA `adapter/lora.safetensors`."""
    family, folder = request.param, tmp_path_factory.mktemp("a project")
    family.prepare(folder)
    (folder / "prompts.txt").write_text(f"{family.sample_line}\n", encoding="utf-8")
    succeed_here(*family.cache_latents, folder=folder)
    succeed_here(*family.cache_texts, folder=folder)
    run = ("--output_dir", "adapter", "--output_name", "lora", "--learning_rate", RATE, *RUN)
    succeed_here(*family.train, *run, folder=folder)
    return family, folder


def train(family: TinyFamily, folder: Path, name: str, words: Sequence[str]) -> list[float]:
    """Train into a folder of this name; return the losses of the steps."""
    place = ("--output_dir", name, "--output_name", "lora", "--logging_dir", f"{name}/logs")
    succeed_here(*family.train, *EXACT, *place, *words, folder=folder)
    (log,) = (folder / name / "logs").rglob("*tfevents*")
    events = EventAccumulator(str(log.parent)).Reload().Scalars("loss/current")
    return [event.value for event in events]


ADAPTER = ("--training_adapter", "adapter/lora.safetensors")


def test_losses_are_those_of_the_merged_model_and_samples_those_of_the_plain_one(
    project: tuple[TinyFamily, Path],
) -> None:
    family, folder = project
    merged = train(family, folder, "merged", ("--base_weights", ADAPTER[1]))
    plain = train(family, folder, "plain", SAMPLES)

    adapted = train(family, folder, "adapted", (*ADAPTER, *SAMPLES))

    # float32 rounds once where a file is merged, and in each product where it is added
    assert adapted == pytest.approx(merged, rel=1e-6)
    assert adapted != pytest.approx(plain, rel=1e-3)
    ours, base = (shown(folder / name / "sample") for name in ("adapted", "plain"))
    assert torch.equal(ours, base)


def test_in_8_bits_with_swapped_blocks_samples_are_those_of_the_plain_model_too(
    project: tuple[TinyFamily, Path],
) -> None:
    family, folder = project
    plain = train(family, folder, "small plain", (*SMALL, *SAMPLES))

    adapted = train(family, folder, "small adapted", (*SMALL, *ADAPTER, *SAMPLES))

    assert adapted != pytest.approx(plain, rel=1e-3)
    ours, base = (shown(folder / name / "sample") for name in ("small adapted", "small plain"))
    assert torch.equal(ours, base)


def test_a_resumed_run_ends_with_equal_bytes(project: tuple[TinyFamily, Path]) -> None:
    family, folder = project
    words = (*ADAPTER, "--teacher", "base", "--save_state", "--no_metadata")
    run = [*family.train, *EXACT, *words, "--output_name", "lora", "--output_dir"]
    succeed_here(*run, "whole", folder=folder)
    succeed_here(*run, "parts", "--save_every_n_steps", "2", folder=folder)
    (folder / "parts" / "lora.safetensors").unlink()
    shutil.rmtree(folder / "parts" / "lora-state")

    succeed_here(*run, "parts", "--resume", "parts/lora-step00000002-state", folder=folder)

    one, other = (load_file(folder / name / "lora.safetensors") for name in ("whole", "parts"))
    assert same(one, other)
    said = assert_one_message(
        *run_here(*run, "parts", "--resume", "parts/lora-step00000002-state", *ADAPTER_TWICE, folder=folder),
        "--training_adapter: lora.safetensors:1",
    )
    assert ":2, " in said


ADAPTER_TWICE = ("--training_adapter_multiplier", "2")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("model/dit.safetensors", "is no LoRA for a video or image model"),
        ("prompts.txt", "prompts.txt"),
        ("none.safetensors", "no such file"),
    ],
)
def test_a_wrong_file_is_told_in_one_message(project: tuple[TinyFamily, Path], file: str, words: str) -> None:
    family, folder = project
    run = [*family.train, *EXACT, "--output_dir", "wrong", "--output_name", "lora"]

    assert_one_message(*run_here(*run, "--training_adapter", file, folder=folder), words)


def test_a_plan_is_made_with_both(project: tuple[TinyFamily, Path]) -> None:
    family, folder = project
    run = [*family.train, *EXACT, "--output_dir", "planned", "--output_name", "lora", "--plan", "24"]

    succeed_here(*run, *ADAPTER, "--teacher", "base", folder=folder)

    assert not (folder / "planned").exists()
