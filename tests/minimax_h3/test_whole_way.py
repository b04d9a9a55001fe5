"""MiniMax-H3 from clips to clips: what each caching script wrote is learned, and generation uses the LoRA."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dataset.listing import companions_now
from modules.media.tracks import write_wav
from modules.media.writing import write_video
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.minimax_h3.test_caching import tone
from tests.minimax_h3.test_reference_generation import for_references
from tests.tiny.minimax_h3 import TinyH3, write_tiny_h3
from tests.tiny.project import moving_square, write_image

FRAMES = 22
EDGES = ("--reference_image_short_edge", "32", "--reference_video_short_edge", "32")


@dataclass(frozen=True)
class Way:
    """Options of the four scripts, besides those of every way."""

    latents: Sequence[str] = ()
    texts: Sequence[str] = ()
    training: Sequence[str] = ()
    generation: Sequence[str] = ()
    has_references: bool = False
    has_images: bool = False  # instead of clips, with control pictures


REFERENCES = ("--task", "ref2va", *EDGES)
KEYFRAMES = ("--task", "fl2va")
ONE_FRAME = (*KEYFRAMES, "--one_frame")
# at all base times: both steps would be near its end, where the LoRA learns to change nothing
MATCHING = ("--h3_teacher_matching", "--h3_teacher_condition_sigma_max", "1")
WAYS = {
    "texts": Way(),
    "guided target": Way(texts=["--empty_prompt"], training=["--h3_guidance_loss_scale", "3"]),
    "teacher with both frames": Way(
        latents=KEYFRAMES,
        texts=["--teacher_conditions", "first,last"],
        training=[*MATCHING, "--h3_teacher_conditions", "first,last"],
    ),
    "teacher with the clip": Way(
        texts=["--teacher_conditions", "ref"],
        training=[*MATCHING, "--h3_teacher_conditions", "ref"],
    ),
    "keyframes": Way(KEYFRAMES, KEYFRAMES, training=KEYFRAMES, generation=["--first_frame", "style.png"]),
    "references": Way(
        REFERENCES,
        REFERENCES,
        training=["--task", "ref2va"],
        generation=["--ref", "style.png", "--ref", "motion.mkv", *EDGES],
        has_references=True,
    ),
    "control images": Way(
        ONE_FRAME,
        KEYFRAMES,
        training=ONE_FRAME,
        generation=[
            *("--one_frame_inference", "target_index=1,control_index=0"),
            *("--condition_image", "style.png", "--video_length", "1"),
        ],
        has_images=True,
    ),
}
DAILY = "keyframes"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyH3:
    return write_tiny_h3(tmp_path_factory.mktemp("h3") / "model ä")


def write_clip(path: Path, seed: int) -> None:
    path.parent.mkdir(exist_ok=True)
    frames = moving_square(FRAMES + 2, 64, 64, seed=seed)
    write_video(path, frames, 24, crf=1, preset="ultrafast")
    path.with_suffix(".txt").write_text(f"square {seed} moves", encoding="utf-8")


def write_project(folder: Path, way: Way) -> None:
    """Two clips, one of them with sound; with references in a list: a picture and a clip.

    Control pictures have the names of the pictures that are made from them.
    """
    for number in range(2):
        write_clip(folder / "clips" / f"{number}.mkv", number)
    write_wav(folder / "clips" / "0.wav", tone())
    write_image(folder / "style.png", 64, 64)
    write_clip(folder / "motion.mkv", 3)
    source = 'video_directory = "clips"'
    if way.has_references:
        shown = [{"type": "image", "path": "style.png"}, {"type": "video", "path": "motion.mkv"}]
        write_rows(folder, shown)
        source = 'video_jsonl_file = "rows.jsonl"'
    if way.has_images:
        for name in ("pictures", "controls"):
            (folder / name).mkdir()
            write_image(folder / name / "a.png", 64 if name == "pictures" else 96, 64)
        (folder / "pictures" / "a.txt").write_text("an image", encoding="utf-8")
        source = 'image_directory = "pictures"\ncontrol_directory = "controls"'
    lines = ["[[datasets]]", source, 'cache_directory = "cache"', 'caption_extension = ".txt"']
    lines += ["resolution = [64, 64]", *(["target_frames = [24]"] if not way.has_images else [])]
    (folder / "dataset.toml").write_text("\n".join(lines), encoding="utf-8")


def write_rows(folder: Path, shown: list[dict[str, object]]) -> None:
    rows = [
        {"video_path": f"clips/{number}.mkv", "caption": f"square {number} moves", "references": shown}
        for number in range(2)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def cache(folder: Path, files: TinyH3, way: Way) -> None:
    config = ["--dataset_config", "dataset.toml", "--device", "cpu"]
    vaes = ["--video_vae", str(files.video_vae), "--audio_vae", str(files.audio_vae)]
    words = [*vaes, "--vae_dtype", "float32", *way.latents]
    if not way.has_images:
        words.append("--allow_experimental_duration")
    succeed_here("minimax_h3_cache_latents.py", *config, *words, folder=folder)
    text = ["--text_encoder", str(files.text_encoder), "--tokenizer", str(files.tokenizer)]
    words = [*text, "--text_encoder_dtype", "float32", *way.texts]
    succeed_here("minimax_h3_cache_text_encoder_outputs.py", *config, *words, folder=folder)


def train(folder: Path, files: TinyH3, way: Way) -> tuple[int, str]:
    # whose VAE says how many pixels a latent has: 8 here, 16 in the release
    words = [*files.words, "--dataset_config", "dataset.toml", "--mixed_precision", "no"]
    words += ["--network_dim", "4", "--output_dir", "out", "--output_name", "lora", "--seed", "5"]
    words += ["--learning_rate", "1e-2", "--max_train_steps", "2"]
    words += ["--max_data_loader_n_workers", "0"]
    companions_now.cache_clear()  # another process
    return run_here("minimax_h3_train_network.py", *words, *way.training, folder=folder)


def generate(folder: Path, files: TinyH3, way: Way, *words: str) -> Tensor:
    """What is made, pictures and sound joined."""
    fixed = ["--prompt", "a square", "--seed", "7", "--infer_steps", "2", "--device", "cpu"]
    fixed += ["--video_size", "32", "64"]
    if not way.has_images:
        fixed += ["--video_length", str(FRAMES), "--allow_experimental_duration"]
    fixed += ["--save_path", "made", "--output_type", "latent"]
    succeed_here("minimax_h3_generate_video.py", *files.words, *fixed, *way.generation, *words, folder=folder)
    (path,) = (folder / "made").glob("*_latent.safetensors")
    made = load_file(path)
    path.unlink()
    return torch.cat([made[name].flatten() for name in sorted(made)])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != DAILY)) for name in WAYS]
)
def test_a_lora_of_cached_clips_changes_what_is_made(tmp_path: Path, files: TinyH3, name: str) -> None:
    way = WAYS[name]
    write_project(tmp_path, way)
    if way.has_references:
        files = for_references(files, tmp_path)

    cache(tmp_path, files, way)
    code, said = train(tmp_path, files, way)

    assert code == 0, said[-4000:]
    assert all(
        tensor.isfinite().all() for tensor in load_file(tmp_path / "out" / "lora.safetensors").values()
    )
    plain = generate(tmp_path, files, way)
    changed = generate(tmp_path, files, way, "--lora_weight", "out/lora.safetensors")
    assert plain.isfinite().all()
    assert changed.isfinite().all()
    assert (changed - plain).abs().max() > 1e-4


@pytest.mark.slow
def test_references_that_changed_since_are_said(tmp_path: Path, files: TinyH3) -> None:
    way = WAYS["references"]
    write_project(tmp_path, way)
    files = for_references(files, tmp_path)
    cache(tmp_path, files, way)
    clip = {"type": "video", "path": "motion.mkv", "audio_path": None}
    write_rows(tmp_path, [{"type": "image", "path": "style.png"}, clip])

    message = assert_one_message(*train(tmp_path, files, way))

    assert (
        "media was [['image', False], ['video', False]], is now [['image', False], ['video', True]]"
        in message
    )


@pytest.mark.slow
def test_other_frames_than_the_text_encoder_saw_are_said(tmp_path: Path, files: TinyH3) -> None:
    way = WAYS["keyframes"]
    write_project(tmp_path, way)
    cache(tmp_path, files, way)
    with (tmp_path / "dataset.toml").open("a", encoding="utf-8") as file:
        file.write("\nmax_frames = 90\n")

    message = assert_one_message(*train(tmp_path, files, way))

    assert "clip was" in message
    assert "'max_frames': 90" in message
