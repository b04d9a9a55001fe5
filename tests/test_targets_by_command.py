"""Targets through the commands that users type, on tiny models of video and picture families."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands import run_script
from tests.faults.messages import assert_one_message, run_here
from tests.tiny.families import family_called
from tests.tiny.runs import RUN, TinyProject, make_project
from tests.training.toy import metadata_of, same

KINDS = [
    "wan t2v-1.3B",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("flux", "z_image", "krea2", "qwen_image", "anima")
    ),
]
EXACT = ("--learning_rate", "1e-2")
SMALL = ("--gradient_checkpointing", "--blocks_to_swap", "1")
TARGETS = (
    *("--guided_target", "3", "--guided_target_min_timestep", "100"),
    *("--blank_prior_weight", "0.5"),
)


@pytest.fixture(scope="module", params=KINDS)
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    """With a LoRA `base/x.safetensors`; the empty prompt is not cached."""
    made = make_project(family_called(request.param), tmp_path_factory.mktemp("a project"))
    made.train("base", *EXACT)
    return made


def words_of(command: str) -> Sequence[str]:
    """Return the words of a printed command after `python`."""
    return command.split()[1:]


def test_the_missing_empty_prompt_is_cached_by_the_printed_command(project: TinyProject) -> None:
    said = run_here(*project.family.train, *RUN, "--output_dir", "x", *TARGETS, folder=project.folder)

    message = assert_one_message(*said, "the cache of the empty prompt is missing")
    command = next(line for line in message.splitlines() if "--empty_prompt" in line)
    assert "_cache_text_encoder_outputs.py" in command
    # the files that encode are known from caching; what is printed runs as it is
    project.run(*project.family.cache_texts, "--empty_prompt")
    assert list(project.folder.rglob("*_te.empty.safetensors"))


def test_targets_change_the_lora_and_a_resumed_run_ends_with_equal_bytes(project: TinyProject) -> None:
    project.run(*project.family.cache_texts, "--empty_prompt")
    plain = project.train("plain", *EXACT)
    full = project.train("whole", *EXACT, *TARGETS, "--save_state", "--save_every_n_steps", "2")

    assert not same(full, plain)
    resume = ("--resume", "whole/x-step00000002-state")
    assert same(project.train("resumed", *EXACT, *TARGETS, *resume), full)
    small = project.train("small", *EXACT, *TARGETS, *SMALL)
    for name, tensor in full.items():
        torch.testing.assert_close(small[name], tensor, rtol=1e-3, atol=1e-5)
    assert metadata_of(project.folder / "whole" / "x.safetensors")["ss_guided_target"] == "3.0"


def write_teacher(project: TinyProject) -> Path:
    """Write the transformer with other weights, as a model that it was distilled from."""
    path = next((project.folder / "model").glob("dit*.safetensors"))
    generator = torch.Generator().manual_seed(11)
    tensors = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        for name, tensor in load_file(path).items()
    }
    teacher = project.folder / "teacher.safetensors"
    save_file(tensors, teacher, metadata_of(path) or None)
    return teacher


def test_what_a_lora_of_another_model_knows_is_taught(project: TinyProject) -> None:
    """With equal weights of teacher and network there is nothing left to learn; with a LoRA there is."""
    teacher = write_teacher(project)
    words = ("--teacher", "dit", "--teacher_dit", teacher.name, "--teacher_weight", "1")
    lora = ("--teacher_lora", "base/x.safetensors")

    matched = project.train("matched", *EXACT, *words, *lora)
    taught = project.train("taught", *EXACT, *words, *lora, "--teacher_delta")
    small = project.train("small taught", *EXACT, *words, *lora, "--teacher_delta", *SMALL)

    assert not same(matched, taught)
    for name, tensor in taught.items():
        torch.testing.assert_close(small[name], tensor, rtol=1e-3, atol=1e-5)
    alone = project.train("alone", *EXACT, "--teacher", "dit", "--teacher_weight", "1", *lora)
    assert not same(alone, taught)
    metadata = metadata_of(project.folder / "taught" / "x.safetensors")
    assert metadata["ss_teacher_dit"] == "teacher.safetensors"
    assert metadata["ss_teacher_lora"] == "x.safetensors"


def test_a_plan_counts_passes_and_the_second_model(project: TinyProject) -> None:
    teacher = write_teacher(project)
    words = ("--teacher", "dit", "--teacher_dit", teacher.name, "--teacher_lora", "base/x.safetensors")
    planned = (*RUN, "--output_dir", "planned", "--plan", "24")

    done = run_script(*project.family.train, *planned, *words, "--teacher_delta", folder=project.folder)
    assert "the teacher's transformer" in done.stdout
    project.run(*project.family.cache_texts, "--empty_prompt")
    project.run(*project.family.train, *planned, *TARGETS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--teacher", "dit", "--teacher_dit", "base/x.safetensors"), "base/x.safetensors"),
        (("--teacher", "dit", "--teacher_dit", "prompts.txt"), "prompts.txt"),
        (("--teacher", "dit", "--teacher_dit", "none.safetensors"), "none.safetensors"),
        (("--teacher", "dit", "--teacher_lora", "prompts.txt"), "prompts.txt"),
    ],
)
def test_a_wrong_file_is_told_in_one_message(
    project: TinyProject, words: Sequence[str], message: str
) -> None:
    command = (*project.family.train, *RUN, "--output_dir", "wrong", *words)

    assert_one_message(*run_here(*command, folder=project.folder), message)


SLIDER = """guidance = 2.0

[[sliders]]
positive = "a red cat"
negative = "a blue cat"
neutral = "a cat"
anchor = "a dog"

[[sliders]]
positive = "a large cat"
negative = "a small cat"
neutral = "a cat"
weight = 0.5
"""


def test_a_slider_learns_from_its_captions(project: TinyProject) -> None:
    """Its captions are encoded once, at the start; blocks may be swapped and computed again."""
    (project.folder / "slider.toml").write_text(SLIDER, encoding="utf-8")
    encoders = project.family.cache_texts[1:]
    words = ("--slider", "slider.toml", *_text_options(project, encoders))
    full = project.train("slider", *EXACT, *words)
    small = project.train("small slider", *EXACT, *words, *SMALL)

    for name, tensor in full.items():
        torch.testing.assert_close(small[name], tensor, rtol=1e-3, atol=1e-5)
    metadata = metadata_of(project.folder / "slider" / "x.safetensors")
    assert metadata["ss_slider"] == "slider.toml"


def _text_options(project: TinyProject, words: Sequence[str]) -> Sequence[str]:
    """Return the options of the caching command that name text encoders and that the training lacks."""
    given: list[str] = []
    for flag, value in zip(words, words[1:], strict=False):
        is_encoder = flag.startswith(("--t5", "--text_encoder", "--clip_l"))
        if is_encoder and flag not in project.family.train:
            given += [flag, value]
    return given
