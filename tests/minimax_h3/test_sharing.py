"""What saves time in a generation of MiniMax-H3: processes that share the work, steps that are skipped."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.commands import run_in_processes
from tests.minimax_h3.caches import random_clip, write_empty_text
from tests.minimax_h3.test_generation import SCRIPT, generate, latents_in, reject
from tests.minimax_h3.test_training import CLIPS, FRAMES_AT, Project, teacher_text, with_frames
from tests.minimax_h3.test_training import SCRIPT as TRAINING
from tests.minimax_h3.test_training import project as project
from tests.tiny.minimax_h3 import TinyH3, write_tiny_h3

SHORT = ("--video_length", "22", "--allow_experimental_duration", "--output_type", "latent")
EIGHT = ("--infer_steps", "8")
RATIOS = ("--magcache_mag_ratios", "1", *["0.99"] * 7)
CACHES = {
    "MagCache": (*RATIOS, "--magcache_threshold", "100", "--magcache_k", "3"),
    "TeaCache": ("--teacache_threshold", "100", "--teacache_coefficients", "1", "0"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyH3:
    return write_tiny_h3(tmp_path_factory.mktemp("h3 shared") / "model")


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """As a share of the largest number."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - one).abs().max() / one.abs().max()) for name, one in expected.items())


@pytest.mark.skipif(sys.platform != "linux", reason="processes are copies of one with libraries")
@pytest.mark.slow
@pytest.mark.parametrize("by", [("--shard_base",), ("--context_parallel", "2")], ids=["blocks", "tokens"])
def test_processes_share_the_work(tmp_path: Path, files: TinyH3, by: tuple[str, ...]) -> None:
    """Tokens of two processes are summed in another order, in float32."""
    words = ("--prompt", "a cat", "--seed", "7", "--infer_steps", "3", "--video_size", "32", "64", *SHORT)

    run_in_processes(2, SCRIPT, *files.words, *words, *by, "--save_path", "shared", folder=tmp_path)

    generate(tmp_path, files, *words)
    assert largest_error(latents_in(tmp_path / "shared"), latents_in(tmp_path / "made")) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", CACHES)
def test_step_caches_skip_passes(tmp_path: Path, files: TinyH3, name: str) -> None:
    """What calibration prints belongs to the clip that is made without one."""
    generate(tmp_path, files, *SHORT, *EIGHT, "--save_path", "plain")
    said = generate(tmp_path, files, *SHORT, *EIGHT, *CACHES[name], "--save_path", "skips")
    option = f"--{name.lower()}_calibration"
    measured = generate(tmp_path, files, *SHORT, *EIGHT, option, "--save_path", "measured")

    plain, skips, same = (latents_in(tmp_path / each) for each in ("plain", "skips", "measured"))
    assert f"{name} skipped" in said
    assert largest_error(skips, plain) > 0
    assert all(torch.equal(same[part], latents) for part, latents in plain.items())
    words = {"MagCache": "--magcache_mag_ratios 1.00000", "TeaCache": "--teacache_coefficients"}
    assert words[name] in measured


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--cfg_parallel"], "one pass for each step"),
        (["--preview_latent_every", "1"], "no map from this model's latents to colors"),
        (["--context_parallel", "2"], "accelerate launch"),
    ],
)
def test_what_the_model_has_not_is_refused(
    tmp_path: Path, files: TinyH3, words: list[str], part: str
) -> None:
    assert part in reject(tmp_path, files, *words, remedy=False)


RUN: list[object] = ["--output_dir", "out", "--seed", 5, "--max_data_loader_n_workers", 0]
RUN += ["--optimizer_type", "SGD", "--learning_rate", 1, "--max_train_steps", 2, "--max_grad_norm", 0]
MATCHING = ("--h3_teacher_matching", "--h3_teacher_conditions")
TRAININGS: Mapping[str, Sequence[object]] = {
    "texts": (),
    "guided": ("--h3_guidance_loss_scale", 3),
    "both frames": ("--task", "fl2va"),
    "references": ("--task", "ref2va"),
    "teacher of frames": (*MATCHING, "first,last"),
    "teacher of the clip": (*MATCHING, "ref"),
}


def cache_for(project: Project, name: str) -> None:
    """Write caches of two clips for a training; the second one is silent where its task lets it be."""
    clips = list(CLIPS)
    if name == "both frames":
        pictured = [random_clip(seed, has_images=True) for seed in (1, 2)]
        clips = [replace(clip, rows={}) for clip in with_frames(pictured)[0]]
    elif name == "references":
        clips = []
        for seed in (1, 2):
            clip = random_clip(seed, has_images=True)
            media = {"latents_ref_000_video": clip.latents + 1, "latents_ref_000_audio": clip.audio - 1}
            clips.append(replace(clip, media=media))
    elif name == "teacher of frames":
        clips, _, _ = with_frames(CLIPS)
        assert clips[0].media.keys() == {*FRAMES_AT}
    elif name == "teacher of the clip":
        rows, _, _ = teacher_text("mmh3_teacher_ref")
        clips = [replace(clip, rows=rows) for clip in CLIPS]
    project.cache(clips)
    write_empty_text(project.folder)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are copies of one with libraries")
@pytest.mark.slow
@pytest.mark.parametrize("name", TRAININGS)
def test_processes_learn_what_one_does(project: Project, name: str) -> None:
    """Two processes with a clip each, then with parts of the blocks, and with parts of a clip's tokens."""
    cache_for(project, name)
    words = [*project.words, *RUN, *TRAININGS[name]]
    project.train(*RUN, *TRAININGS[name], "--output_name", "alone")
    both = ("--gradient_accumulation_steps", 2)
    project.train(*RUN, *TRAININGS[name], *both, "--output_name", "accumulated")

    ways = {"each": (), "blocks": ("--shard_base",), "tokens": ("--context_parallel", 2)}
    for way, by in ways.items():
        run_in_processes(2, TRAINING, *words, *by, "--output_name", way, folder=project.folder)

    each = project.saved("each")
    assert all(torch.equal(tensor, each[key]) for key, tensor in project.saved("blocks").items())
    # sums of another order, in float32
    assert error_of(each, project.saved("accumulated")) < 1e-5
    assert error_of(project.saved("tokens"), project.saved("alone")) < 1e-5


def error_of(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference as a share of the largest number that was 0 untrained."""
    assert found.keys() == expected.keys()
    learned = max(float(tensor.abs().max()) for name, tensor in expected.items() if "lora_up" in name)
    assert learned > 0
    return max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items()) / learned
