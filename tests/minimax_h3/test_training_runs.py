"""Runs of minimax_h3_train_network.py: what is refused, samples, resuming, memory."""

from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.faults.messages import succeed_here
from tests.minimax_h3.caches import random_clip, write_empty_text
from tests.minimax_h3.test_training import (
    CLIPS,
    FRAMES_AT,
    Noised,
    Project,
    plainly,
    with_frames,
)
from tests.minimax_h3.test_training import project as project
from tests.parity.training import Factors
from tests.tiny.minimax_h3 import TinyH3, write_tiny_h3

RUN = ["--output_dir", "out", "--learning_rate", 1e-2, "--seed", 5, "--max_data_loader_n_workers", 0]


def run(name: str, steps: int) -> list[object]:
    return [*RUN, "--output_name", name, "--max_train_steps", steps]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--timestep_sampling", "shift"], ["one even base time", "--timestep_focus"]),
        (["--weighting_scheme", "logit_normal"], ["one even base time"]),
        (["--discrete_flow_shift", 5], ["--h3_shift_video"]),
        (["--max_timestep", 1.5], ["from 0 to 1"]),
        (["--min_timestep", 0.1234], ["three decimals"]),
        (["--h3_guidance_loss_scale", 3, "--h3_teacher_matching"], ["--h3_guidance_loss_scale 3"]),
        (["--h3_guidance_loss_scale", 3, "--guided_target", 4], ["mean the same", "pass one"]),
        (["--h3_guidance_loss_scale_audio", 3], ["--h3_guidance_loss_scale"]),
        (["--h3_guidance_loss_uncond_cache", "dit.safetensors"], ["--h3_guidance_loss_scale"]),
        (["--h3_teacher_loss_dc_weight", 0.3], ["--h3_teacher_matching"]),
        (["--h3_teacher_matching", "--teacher_weight", 0.5], ["mean the same", "pass one"]),
        (["--h3_teacher_matching", "--h3_training_mode", "ref2va"], ["--task ref2va", "--task t2va"]),
        (["--h3_teacher_matching", "--task", "fl2va"], ["--task fl2va", "--task t2va"]),
        (["--h3_teacher_matching", "--h3_teacher_conditions", "all"], ["--h3_teacher_conditions"]),
        (["--h3_timestep_focus_min", 0.1], ["--h3_timestep_focus_prob"]),
        (["--h3_timestep_focus_prob", 0.5, "--max_timestep", 0.9], ["--h3_timestep_focus_prob"]),
        (["--h3_training_mode", "ref2va", "--task", "t2va"], ["--task alone"]),
        (["--video_only", "--h3_video_loss_weight", 0], ["nothing would be learned"]),
        (["--h3_mask_mode", "box"], ["--task"]),
        (["--one_frame"], ["a clip of 7 latent frames", "images"]),
        (["--tread", 0.5], ["a second stream, for audio"]),
        (["--blocks_to_swap", 2], ["has 3 blocks, at most 1 can be swapped. Use 1 or less"]),
    ],
)
def test_what_cannot_be_is_refused(project: Project, words: list[object], parts: list[str]) -> None:
    project.cache(CLIPS)
    project.reject(*words, names=parts)


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        ("first,last", ["mmh3_teacher_hidden_states", "--teacher_conditions first,last"]),
        ("ref", ["mmh3_teacher_ref_hidden_states", "--teacher_conditions ref"]),
        ("subject_ref", ["mmh3_teacher_subject_ref_hidden_states", "--teacher_conditions subject_ref"]),
    ],
)
def test_missing_rows_of_a_teacher_are_said_in_one_line(
    project: Project, conditions: str, words: list[str]
) -> None:
    project.cache(CLIPS)
    message = project.reject(
        "--h3_teacher_matching", "--h3_teacher_conditions", conditions, names=["no teacher rows", *words]
    )
    assert message.count("\n") == 0


@pytest.mark.parametrize(
    ("words", "task", "conditions"),
    [
        (["--h3_teacher_matching"], "--task fl2va", "--teacher_conditions first,last"),
        (["--h3_teacher_matching", "--task", "t2va"], "--task fl2va", "--teacher_conditions first,last"),
        (["--h3_teacher_matching", "--h3_teacher_conditions", "ref"], "", "--teacher_conditions ref"),
        (["--teacher", "base", "--teacher_sees", "clip"], "", "--teacher_conditions ref"),
        (
            ["--h3_teacher_matching", "--h3_teacher_conditions", "subject_ref"],
            "--task ref2va",
            "--teacher_conditions subject_ref",
        ),
        ([], "", ""),
    ],
)
def test_without_caches_the_caching_commands_have_the_options_of_the_teacher(
    project: Project, words: list[object], task: str, conditions: str
) -> None:
    project.cache([])

    message = project.reject(*words, names=["minimax_h3_cache_latents.py", "minimax_h3_cache_text"])

    (latents,) = [line for line in message.splitlines() if "cache_latents.py" in line]
    (texts,) = [line for line in message.splitlines() if "cache_text_encoder_outputs.py" in line]
    assert ("--task" in latents) == bool(task)
    assert task in latents
    assert ("--teacher_conditions" in texts) == bool(conditions)
    assert conditions in texts
    assert "2va" not in texts or "--task t2va" in texts


def test_missing_keyframes_of_a_teacher_are_said(project: Project) -> None:
    clips, _, _ = with_frames(CLIPS)
    project.cache([replace(clip, media={FRAMES_AT[0]: clip.media[FRAMES_AT[0]]}) for clip in clips])
    project.reject("--h3_teacher_matching", names=["no latents_last", "--task fl2va"])


@pytest.mark.parametrize(("task", "name"), [("fl2va", "latents_first"), ("ref2va", "latents_ref_000")])
def test_caches_without_conditions_are_refused(project: Project, task: str, name: str) -> None:
    project.cache([random_clip(1, has_images=True)])
    project.reject("--task", task, names=[name, f"--task {task}", "Cache again"])


def test_a_batch_has_one_clip(project: Project) -> None:
    project.cache(CLIPS, batch_size=2)
    project.reject(names=["batch_size 2", "--gradient_accumulation_steps 2"])


def test_caches_without_sound_are_refused(project: Project) -> None:
    project.cache(CLIPS)
    (path,) = (project.folder / "cache").glob("a_*_mmh3.safetensors")
    save_file({key: tensor for key, tensor in load_file(path).items() if "present" not in key}, path)
    project.reject(names=["no audio_present", "Cache again"])


def test_a_missing_empty_prompt_is_said(project: Project) -> None:
    project.cache(CLIPS)
    project.reject("--h3_guidance_loss_scale", 3, names=["mmh3_te.empty", "--empty_prompt"])


def test_a_single_frame_has_two_latents_of_sound(project: Project) -> None:
    project.cache([random_clip(seed, is_heard=False, frames=1) for seed in (1, 2)], frames=1)
    project.compare(plainly, "--one_frame", label="H3, one frame")


def test_pictures_alone_are_learned_if_asked(project: Project) -> None:
    project.cache(CLIPS)

    def silently(factors: Factors, clip: object, sample: Noised, number: int) -> torch.Tensor:
        return plainly(factors, replace(clip, is_heard=False), sample, number)  # type: ignore[type-var]

    project.compare(silently, "--video_only", label="H3, video only")


def test_a_run_that_continues_ends_with_equal_bytes(project: Project) -> None:
    """With keyframes, whose noise is new in each step, and a guided target."""
    clips, _, _ = with_frames([random_clip(1, has_images=True), random_clip(2, has_images=True)])
    project.cache([replace(clip, rows={}) for clip in clips])
    write_empty_text(project.folder)
    words = ["--task", "fl2va", "--h3_guidance_loss_scale", 3, "--save_every_n_steps", 2, "--save_state"]
    project.train(*run("whole", 4), *words)

    state = "out/whole-step00000002-state"
    project.train(*run("again", 4), *words, "--resume", state)

    full, again = project.saved("whole"), project.saved("again")
    assert all(torch.equal(full[name], again[name]) for name in full)
    with safe_open(project.folder / "out" / "whole.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_guided_target"] == "3.0"
    assert "minimax" in metadata["modelspec.architecture"].lower()


@pytest.mark.parametrize(
    "words", [["--blocks_to_swap", 1, "--gradient_checkpointing"], ["--gradient_checkpointing_cpu_offload"]]
)
def test_less_memory_learns_the_same(project: Project, words: list[object]) -> None:
    project.cache(CLIPS)
    project.train(*run("whole", 2))
    if "--gradient_checkpointing" not in words:
        words = [*words, "--gradient_checkpointing"]

    project.train(*run("other", 2), *words)

    full, other = project.saved("whole"), project.saved("other")
    assert all(torch.equal(full[name], other[name]) for name in full)


@pytest.mark.parametrize("form", [["--fp8_base", "--fp8_scaled"], ["--h3_convrot_int8"], ["--nf4_base"]])
def test_weights_of_few_bits_are_trained_around(project: Project, form: list[object]) -> None:
    project.cache(CLIPS)
    said = project.train(*run("narrow", 1), *form)
    assert "narrow is trained" in said


def test_a_lora_has_rank_and_alpha_16_if_nothing_is_said(project: Project) -> None:
    project.cache(CLIPS)
    words = [word for word in project.words if word not in ("--network_dim", "4")]
    succeed_here("minimax_h3_train_network.py", *words, *run("usual", 1), folder=project.folder)

    saved = project.saved("usual")
    name = "lora_unet_blocks_0_mlp_fc1"
    assert saved[f"{name}.lora_down.weight"].shape[0] == saved[f"{name}.alpha"] == 16


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyH3:
    return write_tiny_h3(tmp_path_factory.mktemp("h3") / "model ä")


def test_samples_have_sound(project: Project, files: TinyH3) -> None:
    """The tiny VAE makes a latent of 8 pixels."""
    project.cache([random_clip(1, sides=(4, 8))])
    line = "a cat purrs --w 64 --h 32 --f 22 --s 2 --d 3\n"
    (project.folder / "prompts.txt").write_text(line, encoding="utf-8")
    words = ["--sample_prompts", "prompts.txt", "--sample_every_n_steps", 1]

    project.reject(*files.words, *words, names=["22"])
    project.train(*files.words, *run("lora", 1), *words, "--h3_allow_experimental_sample_duration")

    (path,) = Path(project.folder / "out" / "sample").glob("lora*.mp4")
    with av.open(str(path)) as opened:
        assert len([*opened.decode(video=0)]) == 22
        (stream,) = opened.streams.audio
        assert (stream.rate, stream.channels) == (32000, 2)
