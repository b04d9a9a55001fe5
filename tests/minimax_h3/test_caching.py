"""minimax_h3_cache_latents.py against diffusers, from files on disk."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.modular_pipelines.minimax_h3.encoders import encode_vae_condition
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from encoders.tiles import posterior_generator
from minimax_h3.released import AUDIO_MEAN, AUDIO_STD, LATENTS_MEAN, LATENTS_STD
from minimax_h3.video_vae import PIXEL_MEAN, PIXEL_STD
from modules.media.reading import read_image, video_frames
from modules.media.tracks import Track, write_wav
from modules.media.writing import write_video
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.minimax_h3.test_video_vae import normalised, their_vae
from tests.tiny.minimax_h3 import TinyH3, their_audio_vae, write_tiny_h3
from tests.tiny.project import moving_square, write_image

SCRIPT = "minimax_h3_cache_latents.py"
SIZE = 32  # pixels
FRAMES = 22
CLOSE = 2e-5  # float32: the same sums in another order
RATE = 32000


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyH3:
    return write_tiny_h3(tmp_path_factory.mktemp("h3") / "model ä")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A clip of 24 frames a second with a caption."""
    write_clip(tmp_path / "clips" / "a.mkv")
    write_config(tmp_path)
    return tmp_path


def write_clip(path: Path, frames: int = FRAMES + 2, fps: float = 24, track: Track | None = None) -> None:
    path.parent.mkdir(exist_ok=True)
    write_video(path, moving_square(frames, SIZE, SIZE, seed=3), fps, crf=1, preset="ultrafast", track=track)
    path.with_suffix(".txt").write_text("a square moves", encoding="utf-8")


def write_config(folder: Path, source: str = "video_directory = 'clips'", **keys: Any) -> None:
    shared = {"target_frames": [FRAMES]} if source.startswith("video") else {}
    lines = [f"{name} = {json.dumps(value)}" for name, value in {**shared, **keys}.items()]
    text = f"[[datasets]]\nresolution = [{SIZE}, {SIZE}]\ncaption_extension = '.txt'\n"
    text += f"{source}\ncache_directory = 'cache'\n"
    (folder / "dataset.toml").write_text(text + "\n".join(lines), encoding="utf-8")


def words_of(files: TinyH3) -> list[str]:
    vaes = ["--video_vae", str(files.video_vae), "--audio_vae", str(files.audio_vae)]
    return ["--dataset_config", "dataset.toml", *vaes, "--vae_dtype", "float32", "--device", "cpu"]


def run(folder: Path, files: TinyH3, *words: str) -> str:
    return succeed_here(SCRIPT, *words_of(files), "--allow_experimental_duration", *words, folder=folder)


def reject(folder: Path, files: TinyH3, *words: str) -> str:
    return assert_one_message(*run_here(SCRIPT, *words_of(files), *words, folder=folder))


def cached_file(folder: Path) -> Path:
    (path,) = (folder / "cache").glob("*_mmh3.safetensors")
    return path


def cached(folder: Path) -> dict[str, Tensor]:
    return load_file(cached_file(folder))


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def frames_of(path: Path, count: int = FRAMES) -> Tensor:
    """1 3 F H W uint8."""
    frames = torch.from_numpy(np.stack(list(video_frames(path))[:count]))
    return frames.permute(3, 0, 1, 2)[None]


@cache
def full_vae() -> Any:
    vae = their_vae()
    vae.use_tiling = False
    return vae


def their_condition(pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return encode_vae_condition(full_vae(), pixels, PIXEL_MEAN, PIXEL_STD)[0]


def their_target(pixels: Tensor, key: str, seed: int = 42) -> Tensor:
    with torch.no_grad():
        posterior = full_vae().encode(normalised(pixels / 127.5 - 1)).latent_dist
    noise = torch.randn(posterior.mean.shape[1:], generator=posterior_generator(f"{seed} {key}"))
    mean, std = (torch.tensor(numbers).view(-1, 1, 1, 1) for numbers in (LATENTS_MEAN, LATENTS_STD))
    return (posterior.mean[0] + posterior.std[0] * noise - mean) / std


def their_audio(samples: Tensor) -> Tensor:
    """Of 2 S, filled up with silence: 32 2 A."""
    missing = -samples.shape[1] % 800
    waveform = torch.nn.functional.pad(samples, (0, missing))
    with torch.no_grad():
        means = their_audio_vae().encode(waveform.unsqueeze(1)).latent_dist.mode()
    mean, std = (torch.tensor(numbers).view(1, -1, 1) for numbers in (AUDIO_MEAN, AUDIO_STD))
    return ((means - mean) / std).transpose(0, 1)


def tone(seconds: float = 1.0, rate: int = RATE) -> Track:
    times = np.arange(round(seconds * rate)) / rate
    sides = [0.5 * np.sin(2 * np.pi * 300 * times), 0.3 * np.sin(2 * np.pi * 700 * times)]
    return np.stack(sides).astype(np.float32), rate


def heard(count: int = round(FRAMES / 24 * RATE)) -> Tensor:
    """The tone as a WAV of 16 bits has it."""
    samples = torch.from_numpy(tone()[0])[:, :count]
    return (samples * 32767).round() / 32768


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=CLOSE, rtol=CLOSE)


def test_clips_are_cached_with_silence_and_keyframes_equal_to_diffusers(project: Path, files: TinyH3) -> None:
    output = run(project, files, "--task", "fl2va")

    tensors = cached(project)
    assert set(tensors) == {
        "latents_7x4x4_float32",
        "latents_audio_32x2x37_float32",
        "audio_present_float32",
        "latents_first_1x4x4_float32",
        "latents_last_1x4x4_float32",
    }
    pixels = frames_of(project / "clips" / "a.mkv")
    key = cached_file(project).stem
    close(tensors["latents_7x4x4_float32"], their_target(pixels, key))
    close(tensors["latents_first_1x4x4_float32"], their_condition(pixels[:, :, :1]))
    close(tensors["latents_last_1x4x4_float32"], their_condition(pixels[:, :, -1:]))
    close(tensors["latents_audio_32x2x37_float32"], their_audio(torch.zeros(2, 37 * 800)))
    assert tensors["audio_present_float32"] == 0
    assert "MiniMax H3 Community License" in output
    assert "1 clip has no sound: only" in output
    metadata = metadata_of(cached_file(project))
    info = ("architecture", "task", "cache_seed", "crop_start_frame", "frame_count", "cache_format")
    expected = ["minimax_h3", "fl2va", "42", "0", "22", "minimax-h3-latent-v2"]
    assert [metadata[fact] for fact in info] == expected
    assert metadata["video_vae_fingerprint"] != metadata["audio_vae_fingerprint"]
    assert list(json.loads(metadata["media_fingerprints"])) == [str(project / "clips" / "a.mkv")]


def test_a_condition_without_float16_would_differ(project: Path, files: TinyH3) -> None:
    """Rounding moves them by more than the tolerance of the other tests."""
    run(project, files, "--task", "fl2va")
    pixels = frames_of(project / "clips" / "a.mkv")[:, :, :1]
    with torch.no_grad():
        posterior = full_vae().encode(normalised(pixels / 127.5 - 1)).latent_dist
    sample = posterior.sample(generator=torch.Generator().manual_seed(42))[0]
    mean, std = (torch.tensor(numbers).view(-1, 1, 1, 1) for numbers in (LATENTS_MEAN, LATENTS_STD))
    difference = cached(project)["latents_first_1x4x4_float32"] - (sample - mean) / std
    assert difference.abs().max() > 2 * CLOSE


@pytest.mark.parametrize("source", ["list", "beside", "track"])
def test_sound_comes_from_a_list_then_from_a_file_of_the_same_name_then_from_the_clip(
    project: Path, files: TinyH3, source: str
) -> None:
    clip = project / "clips" / "a.mkv"
    if source == "track":
        write_clip(clip, track=tone())
    elif source == "beside":
        write_wav(clip.with_suffix(".wav"), tone())
    else:
        write_wav(project / "other.wav", tone())
        noise = np.random.default_rng(1).uniform(-1, 1, (2, RATE)).astype(np.float32)
        write_wav(clip.with_suffix(".wav"), (noise, RATE))
        row = {"video_path": "clips/a.mkv", "audio_path": "other.wav", "caption": "a square"}
        (project / "list.jsonl").write_text(json.dumps(row), encoding="utf-8")
        write_config(project, "video_jsonl_file = 'list.jsonl'")
    run(project, files)

    tensors = cached(project)
    audio = tensors["latents_audio_32x2x37_float32"]
    assert tensors["audio_present_float32"] == 1
    silence = their_audio(torch.zeros(2, 37 * 800))
    if source == "track":  # AAC, which is not exact
        assert (audio - silence).abs().max() > 0.01
    else:
        close(audio, their_audio(heard()))


def test_a_changed_sound_or_task_or_seed_makes_caches_again(project: Path, files: TinyH3) -> None:
    clip = project / "clips" / "a.mkv"
    run(project, files)
    first = cached(project)["latents_7x4x4_float32"]
    assert "0 of them to encode" in run(project, files)

    write_wav(clip.with_suffix(".wav"), tone())
    run(project, files)
    assert cached(project)["audio_present_float32"] == 1
    assert torch.equal(cached(project)["latents_7x4x4_float32"], first)

    assert "task was t2va, is now fl2va" in run(project, files, "--task", "fl2va")
    assert "cache_seed was 42, is now 7" in run(project, files, "--task", "fl2va", "--cache_seed", "7")
    pixels = frames_of(clip)
    close(cached(project)["latents_7x4x4_float32"], their_target(pixels, cached_file(project).stem, seed=7))
    assert not torch.allclose(cached(project)["latents_7x4x4_float32"], first, atol=0.01)


def test_caches_of_the_known_tuner_are_kept_unless_they_are_of_another_task(
    project: Path, files: TinyH3
) -> None:
    (project / "cache").mkdir()
    path = project / "cache" / f"a_00000-0{FRAMES}_0032x0032_mmh3.safetensors"
    tensors = {
        "latents_7x4x4_bfloat16": torch.zeros(24, 7, 4, 4, dtype=torch.bfloat16),
        "latents_audio_32x2x37_float32": torch.zeros(32, 2, 37),
        "audio_present_float32": torch.tensor(1.0),
    }
    metadata = {"architecture": "minimax_h3", "task": "t2va", "cache_seed": "42"}
    save_file(tensors, path, metadata)

    run(project, files, "--skip_existing")
    assert cached(project).keys() == tensors.keys()

    said = run(project, files, "--skip_existing", "--task", "fl2va")
    assert "made for task t2va, but this run has fl2va" in said
    assert "latents_first_1x4x4_float32" in cached(project)

    del tensors["audio_present_float32"]
    save_file(tensors, path, metadata)
    assert "has no audio_present" in run(project, files, "--skip_existing")


def test_clips_are_read_at_24_frames_a_second_by_their_times(project: Path, files: TinyH3) -> None:
    """Of 48 frames a second, every second one."""
    write_clip(project / "clips" / "a.mkv", frames=2 * FRAMES, fps=48)
    run(project, files)

    pixels = frames_of(project / "clips" / "a.mkv", 2 * FRAMES)
    found = cached(project)["latents_7x4x4_float32"]
    expected = [their_target(pixels[:, :, first::2], cached_file(project).stem) for first in (0, 1)]
    assert any(torch.allclose(found, one, atol=CLOSE) for one in expected)


def test_pictures_have_silence_and_a_place(tmp_path: Path, files: TinyH3) -> None:
    (tmp_path / "pictures").mkdir()
    write_image(tmp_path / "pictures" / "a.png", SIZE, SIZE)
    (tmp_path / "pictures" / "a.txt").write_text("an image", encoding="utf-8")
    write_config(tmp_path, "image_directory = 'pictures'", fp_1f_target_index=7)

    run(tmp_path, files, "--one_frame")

    tensors = cached(tmp_path)
    assert set(tensors) == {
        "latents_1x4x4_float32",
        "latents_audio_32x2x2_float32",
        "audio_present_float32",
        "one_frame_target_index_int64",
    }
    assert tensors["one_frame_target_index_int64"] == 7
    assert tensors["audio_present_float32"] == 0
    close(tensors["latents_audio_32x2x2_float32"], their_audio(torch.zeros(2, 1600)))
    assert "fp_1f_target_index: ignored" in run(tmp_path, files)
    assert cached(tmp_path)["one_frame_target_index_int64"] == 0


def test_pictures_with_control_images_at_places_of_theirs(tmp_path: Path, files: TinyH3) -> None:
    for folder, names in (("pictures", ("a",)), ("controls", ("a_0", "a_1"))):
        (tmp_path / folder).mkdir()
        for name in names:
            write_image(tmp_path / folder / f"{name}.png", SIZE, SIZE)
    (tmp_path / "pictures" / "a.txt").write_text("an image", encoding="utf-8")
    keys = {"control_directory": "controls", "fp_1f_clean_indices": [0, 24], "fp_1f_target_index": 12}
    write_config(tmp_path, "image_directory = 'pictures'", **keys)

    run(tmp_path, files, "--task", "fl2va", "--one_frame")

    tensors = cached(tmp_path)
    assert tensors["one_frame_control_indices_int64"].tolist() == [0, 24]
    assert tensors["one_frame_target_index_int64"] == 12
    controls = [name for name in tensors if name.startswith("latents_control_")]
    assert controls == ["latents_control_000_1x4x4_float32", "latents_control_001_1x4x4_float32"]
    assert "--one_frame" in reject(tmp_path, files, "--task", "fl2va")
    assert "generated from control images" in reject(tmp_path, files, "--task", "t2va", "--one_frame")


@pytest.mark.parametrize(
    ("keys", "words", "reason"),
    [
        ({}, (), "trained with 124 to 345 frames"),
        ({"frame_extraction": "full", "max_frames": 400}, (), "clips of 400 frames"),
        ({}, ("--task", "ref2va", "--allow_experimental_duration"), "generates clips from references"),
        ({"control_directory": "clips"}, ("--allow_experimental_duration",), "Omit control media"),
    ],
)
def test_what_the_model_does_not_take_is_refused(
    project: Path, files: TinyH3, keys: dict[str, Any], words: tuple[str, ...], reason: str
) -> None:
    write_config(project, **keys)
    assert reason in reject(project, files, *words)


def test_a_check_finds_clips_and_their_caches(project: Path, files: TinyH3) -> None:
    run(project, files)
    words = [*words_of(files), "--allow_experimental_duration", "--check"]
    assert run_here(SCRIPT, *words, folder=project)[0] == 0

    write_wav(project / "clips" / "a.wav", tone())
    code, said = run_here(SCRIPT, *words, folder=project)
    assert code in {0, 1}, said


def test_two_sounds_of_one_clip_are_refused(project: Path, files: TinyH3) -> None:
    for suffix in (".wav", ".flac"):
        (project / "clips" / "a").with_suffix(suffix).write_bytes(b"x")
    assert "several files contain its audio: a.flac and a.wav" in reject(project, files)


def test_lengths_are_rounded_to_17n_plus_5(project: Path, files: TinyH3) -> None:
    write_config(project, target_frames=[24])
    assert "become [22], because clips of this model have 17n + 5 frames" in run(project, files)
    assert "latents_7x4x4_float32" in cached(project)


def write_references(folder: Path, *references: dict[str, Any]) -> None:
    """A list with one clip and its references."""
    row = {"video_path": "clips/a.mkv", "caption": "a square", "references": list(references)}
    (folder / "list.jsonl").write_text(json.dumps(row), encoding="utf-8")
    write_config(folder, "video_jsonl_file = 'list.jsonl'")


def test_references_are_those_of_diffusers(project: Path, files: TinyH3) -> None:
    """Of the clip's size, so that none is resized, and sound at the rate of the VAE."""
    write_image(project / "style.png", SIZE, SIZE)
    write_clip(project / "motion.mkv", frames=30)
    write_wav(project / "motion.wav", tone())
    write_wav(project / "voice.wav", tone(0.5))
    write_references(
        project,
        {"type": "image", "path": "style.png"},
        {"type": "video", "path": "motion.mkv", "audio_path": "motion.wav"},
        {"type": "video", "path": "motion.mkv", "audio_path": None},
        {"type": "audio", "path": "voice.wav"},
    )
    edges = ["--reference_image_short_edge", str(SIZE), "--reference_video_short_edge", str(SIZE)]
    run(project, files, "--task", "ref2va", *edges)

    tensors = cached(project)
    references = {name for name in tensors if name.startswith("latents_ref_")}
    assert references == {
        "latents_ref_000_image_1x4x4_float32",
        "latents_ref_001_video_7x4x4_float32",
        "latents_ref_001_audio_32x2x37_float32",
        "latents_ref_002_video_7x4x4_float32",
        "latents_ref_003_audio_32x2x20_float32",
    }
    image = torch.from_numpy(read_image(project / "style.png")).permute(2, 0, 1)[None, :, None]
    close(tensors["latents_ref_000_image_1x4x4_float32"], their_condition(image))
    motion = their_condition(frames_of(project / "motion.mkv"))
    close(tensors["latents_ref_001_video_7x4x4_float32"], motion)
    close(tensors["latents_ref_001_audio_32x2x37_float32"], their_audio(heard(int(FRAMES / 24 * RATE))))
    close(tensors["latents_ref_003_audio_32x2x20_float32"], their_audio(heard(RATE // 2)))
    metadata = metadata_of(cached_file(project))
    assert len(json.loads(metadata["media_fingerprints"])) == 5

    assert "0 of them to encode" in run(project, files, "--task", "ref2va", *edges)
    write_wav(project / "voice.wav", tone(0.7))
    run(project, files, "--task", "ref2va", *edges)
    assert "latents_ref_003_audio_32x2x28_float32" in cached(project)


@pytest.mark.parametrize(
    ("references", "reason"),
    [
        ([{"type": "image", "path": "a.png"}] * 10, "at most 9"),
        ([{"type": "audio", "path": "a.wav"}], "references are audio"),
        ([{"type": "image", "path": "none.png"}], "no such file"),
        ([{"type": "image", "path": "a.png", "audio_path": "a.wav"}], "of type video"),
        ([{"type": "picture", "path": "a.png"}], "use one of image, video, audio"),
        ([], "has no references"),
    ],
)
def test_references_that_the_model_does_not_take_are_refused(
    project: Path, files: TinyH3, references: list[dict[str, Any]], reason: str
) -> None:
    write_image(project / "a.png", SIZE, SIZE)
    write_wav(project / "a.wav", tone(0.1))
    write_references(project, *references)
    if not references:
        other = {
            "video_path": "clips/a.mkv",
            "caption": "b",
            "references": [{"type": "image", "path": "a.png"}],
        }
        with (project / "list.jsonl").open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(other))
    assert reason in reject(project, files, "--task", "ref2va", "--allow_experimental_duration")


def test_clips_with_references_are_not_cached_for_another_task(project: Path, files: TinyH3) -> None:
    write_image(project / "a.png", SIZE, SIZE)
    write_references(project, {"type": "image", "path": "a.png"})
    assert "Use --task ref2va" in reject(project, files, "--allow_experimental_duration")
