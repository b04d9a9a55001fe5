"""Keys of prompt lines for MiniMax-H3, of a file, of the console and of samples of a training.

Each makes what the same options on the command line make.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from generation.sample_lines import parse_sample_line
from minimax_h3.family import MiniMaxH3
from minimax_h3.files import H3Files
from minimax_h3.options import H3TrainingOptions, caching_options, generation_options
from minimax_h3.reference_options import REFERENCE_MEDIA_KEYS
from modules.option_values import Placeholder, Repeated
from tests.faults.messages import succeed_here
from tests.generation.test_run import Typing
from tests.minimax_h3.caches import random_clip
from tests.minimax_h3.test_generation import SCRIPT
from tests.minimax_h3.test_reference_generation import files as files
from tests.minimax_h3.test_reference_generation import folder as folder
from tests.minimax_h3.test_reference_generation import for_references
from tests.minimax_h3.test_training import Project
from tests.minimax_h3.test_training import project as project
from tests.minimax_h3.test_training_runs import run
from tests.tiny.minimax_h3 import TinyH3
from training.samples import sample_request

FIXED = ["--video_size", "32", "64", "--infer_steps", "2", "--device", "cpu", "--output_type", "latent"]
FIXED += ["--video_length", "22", "--allow_experimental_duration"]
FIXED += ["--reference_image_short_edge", "32", "--reference_video_short_edge", "32"]
# a line, and the options that mean the same
FRAMES: Sequence[tuple[str, str]] = (
    ("--task t2va", "--task t2va"),
    ("--keyframe first.png --keyframe last.png", "--first_frame first.png --last_frame last.png"),
    ("--task fl2va --first_frame first.png", "--image_path first.png"),
    ("--fsa 5 --fs 6", "--h3_shift_audio 5 --flow_shift 6"),
    (
        "--of target_index=5,control_index=0;10 --condition_image first.png --condition_image last.png --f 1",
        "--one_frame_inference target_index=5,control_index=0;10 --condition_image first.png "
        "--condition_image last.png --video_length 1",
    ),
)
REFERENCES: Sequence[tuple[str, str]] = (
    ("--ri subject.png --ri first.png", "--reference_image subject.png --reference_image first.png"),
    ("--rv clip.mkv --ra voice.wav", "--reference_video clip.mkv --reference_audio voice.wav"),
    (
        "--task ref2va --ref voice.wav --ref clip.mkv;audio=long.wav",
        "--task ref2va --ref voice.wav --ref clip.mkv;audio=long.wav",
    ),
    (
        "--reference_jsonl list.jsonl --reference_index 1",
        "--reference_jsonl list.jsonl --reference_index 1",
    ),
)
LISTED = '{"caption": "a"}\n{"references": [{"type": "image", "path": "subject.png"}]}\n'


def latents_by_seed(folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    return {int(path.stem.split("_")[-2]): load_file(path) for path in folder.glob("*_latent.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("rows", [FRAMES, REFERENCES], ids=["keyframes", "references"])
def test_keys_of_lines_are_options(
    tmp_path: Path,
    files: TinyH3,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: Sequence[tuple[str, str]],
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "list.jsonl").write_text(LISTED, encoding="utf-8")
    model = files if rows is FRAMES else for_references(files, tmp_path)
    words = [*model.words, *FIXED]
    lines = [f"a cat {line} --d {seed}" for seed, (line, _) in enumerate(rows, 1)]
    (tmp_path / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr("builtins.input", Typing(*lines))

    succeed_here(SCRIPT, *words, "--from_file", "lines.txt", "--save_path", "file", folder=tmp_path)
    succeed_here(SCRIPT, *words, "--interactive", "--save_path", "console", folder=tmp_path)

    by_file, by_console = (latents_by_seed(tmp_path / name) for name in ("file", "console"))
    assert by_file.keys() == by_console.keys() == {*range(1, len(rows) + 1)}
    for seed, (_, options) in enumerate(rows, 1):
        prompt = ["--prompt", "a cat", "--seed", str(seed), "--save_path", f"alone {seed}"]
        succeed_here(SCRIPT, *words, *prompt, *options.split(), folder=tmp_path)
        alone = latents_by_seed(tmp_path / f"alone {seed}")[seed]
        for made in (by_file[seed], by_console[seed]):
            assert all(torch.equal(made[name], latents) for name, latents in alone.items()), options


@pytest.mark.slow
def test_samples_of_a_training_have_the_same_keys(project: Project, files: TinyH3, folder: Path) -> None:
    """What is drawn before the first step is the picture that a generation makes of one frame."""
    for path in folder.iterdir():
        (project.folder / path.name).symlink_to(path)
    project.cache([random_clip(1, sides=(4, 8))])
    model = replace(files, dit=project.folder / "dit.safetensors")
    rows = FRAMES[2:]
    size = "--w 64 --h 32 --s 2 --f 1"
    lines = [f"a cat {line} {size} --d {seed}" for seed, (line, _) in enumerate(rows, 1)]
    (project.folder / "prompts.txt").write_text("\n".join(lines), encoding="utf-8")
    words = ["--sample_prompts", "prompts.txt", "--sample_at_first", "--sample_every_n_steps", 9]

    said = project.train(*model.words, *run("lora", 1), *words)

    assert "ignored" not in said
    images = (project.folder / "out" / "sample").glob("lora_*.png")
    sampled = sorted(path for path in images if not path.stem.endswith("_sheet"))
    assert len(sampled) == len(rows)
    for seed, (image, (_, options)) in enumerate(zip(sampled, rows, strict=True), 1):
        fixed = ["--video_size", "32", "64", "--infer_steps", "2", "--device", "cpu", "--seed", str(seed)]
        output = ["--prompt", "a cat", "--video_length", "1", "--save_path", f"alone {seed}"]
        more = options.removesuffix(" --video_length 1").split()
        succeed_here(SCRIPT, *model.words, *fixed, *output, *more, folder=project.folder)
        (alone,) = (project.folder / f"alone {seed}").glob("*.png")
        with Image.open(image) as made, Image.open(alone) as expected:
            assert made.tobytes() == expected.tobytes(), options


def test_a_sample_has_the_references_of_a_line_of_a_generation() -> None:
    line = "a cat --task ref2va --ri a.png --ri b.png --rv c.mp4 --ra d.wav --fsa 5"

    request = sample_request(parse_sample_line(line), MiniMaxH3(H3Files()))

    assert request.extra == {
        "task": "ref2va",
        "reference_image": "a.png\nb.png",
        "reference_video": "c.mp4",
        "reference_audio": "d.wav",
        "h3_shift_audio": "5.0",
    }
    assert request.extra.keys() <= {*MiniMaxH3(H3Files()).defaults.extras}


def test_all_settings_of_media_are_of_samples(project: Project, files: TinyH3) -> None:
    """A line that names what is not there is refused before anything is loaded."""
    project.cache([random_clip(1, sides=(4, 8))])
    prompts = project.folder / "prompts.txt"
    words = [*files.words, "--sample_prompts", "prompts.txt", "--sample_every_n_steps", 1]
    names = {"one_frame": "of", "ref": "ref", "reference_image": "ri", "reference_audio": "ra"}
    for key, characters in names.items():
        assert key in REFERENCE_MEDIA_KEYS
        prompts.write_text(f"a cat --{characters} none.png --w 64 --h 32 --f 1\n", encoding="utf-8")
        project.reject(*words, names=["none.png"])


MEDIA = {"--first_frame", "--last_frame"} | {
    f"--{name}" for name in REFERENCE_MEDIA_KEYS if name not in ("task", "one_frame", "reference_index")
}


@pytest.mark.parametrize(
    ("task", "sample", "expected"),
    [
        ("fl2va", {"image_path": "a.png"}, {"--first_frame": "a.png"}),
        (
            "fl2va",
            {"image_path": "a.png", "end_image_path": "b.png"},
            {"--first_frame": "a.png", "--last_frame": "b.png"},
        ),
        ("fl2va", {"end_image_path": "b.png"}, {"--last_frame": "b.png"}),
        ("fl2va", {}, {"--first_frame": Placeholder("IMAGE_FILE")}),
        ("fl2va", {"extra": {"keyframe": "a.png\nb.png"}}, {"--keyframe": Repeated(("a.png", "b.png"))}),
        (
            "fl2va",
            {"extra": {"condition_image": "a.png", "one_frame": "control_index=0"}},
            {"--condition_image": Repeated(("a.png",)), "--one_frame_inference": "control_index=0"},
        ),
        (
            "ref2va",
            {"extra": {"ref": "a.png;type=image\nb.mp4"}},
            {"--ref": Repeated(("a.png;type=image", "b.mp4"))},
        ),
        (
            "ref2va",
            {"extra": {"reference_image": "a.png\nb.png", "reference_audio": "c.wav"}},
            {"--reference_image": Repeated(("a.png", "b.png")), "--reference_audio": Repeated(("c.wav",))},
        ),
        (
            "ref2va",
            {"extra": {"reference_jsonl": "a.jsonl", "reference_index": "3"}},
            {"--reference_jsonl": "a.jsonl", "--reference_index": "3"},
        ),
        ("ref2va", {}, {"--reference_jsonl": Placeholder("REFERENCES_JSONL")}),
        ("t2va", {"image_path": "a.png", "extra": {"task": "fl2va"}}, {"--first_frame": "a.png"}),
        ("t2va", {"extra": {"one_frame": "target_index=5"}}, {"--one_frame_inference": "target_index=5"}),
        ("t2va", {"extra": {"h3_shift_audio": "5.0"}}, {"--h3_shift_audio": "5.0"}),
        ("t2va", {}, {}),
    ],
)
def test_the_printed_command_names_the_media_that_its_task_needs(
    task: str, sample: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Or a word in their place: without them the script refuses the task."""
    words = generation_options(H3TrainingOptions.from_defaults(task=task), sample)

    of_media = {*MEDIA, "--reference_index", "--one_frame_inference", "--h3_shift_audio"}
    named = {name: value for name, value in words.items() if name in of_media and value is not None}
    assert named == expected
    has_media = any(not isinstance(value, Placeholder) for name, value in named.items() if name in MEDIA)
    assert words["--task"] == (sample.get("extra", {}).get("task") if has_media else task)
    assert {name: type(value) for name, value in named.items()} == {
        name: type(value) for name, value in expected.items()
    }


def test_the_printed_command_takes_the_lengths_of_samples() -> None:
    options = [
        H3TrainingOptions.from_defaults(h3_allow_experimental_sample_duration=on) for on in (True, False)
    ]

    words = [generation_options(one, {"frames": 22}) for one in options]

    assert [one["--allow_experimental_duration"] for one in words] == [True, False]


@pytest.mark.parametrize("given", [{"task": "ref2va"}, {"h3_training_mode": "ref2va"}])
def test_the_printed_commands_cache_for_the_task_of_the_training(given: dict[str, str]) -> None:
    """Without --task, the scripts would cache texts without references, which the training rejects again."""
    commands = caching_options(H3TrainingOptions.from_defaults(**given))

    assert [command["--task"] for command in commands] == ["ref2va", "ref2va"]
