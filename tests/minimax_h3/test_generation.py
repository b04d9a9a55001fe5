"""minimax_h3_generate_video.py against diffusers' modular pipeline, from files on disk."""

import wave
from pathlib import Path

import av
import numpy
import pytest
import torch
from diffusers.modular_pipelines.minimax_h3.modular_pipeline import resolve_canvas_size
from safetensors.torch import load_file
from torch import Tensor

from minimax_h3.options import canvas, resolve_length
from modules.media.reading import read_image
from protocols.data import AUDIO_LATENTS
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.minimax_h3 import test_video_vae
from tests.parity.running import assert_equal
from tests.tiny.language_models import write_model, write_qwen_tokenizer
from tests.tiny.minimax_h3 import (
    TinyH3,
    text_encoder,
    their_audio_vae,
    their_h3_dit,
    their_pipeline,
    write_tiny_h3,
    write_tokenizer,
)

SCRIPT = "minimax_h3_generate_video.py"
PROMPT = r"a cat purrs.\nThen <d>[English] hello</d>"
STEPS = 3


def latents_in(folder: Path) -> dict[str, Tensor]:
    (path,) = folder.glob("*_latent.safetensors")
    return load_file(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyH3:
    return write_tiny_h3(tmp_path_factory.mktemp("h3") / "model ä")


def generate(folder: Path, files: TinyH3, *words: str) -> str:
    fixed = ["--prompt", PROMPT, "--seed", "7", "--infer_steps", str(STEPS), "--device", "cpu"]
    size = [] if "--video_size" in words else ["--video_size", "32", "64"]
    return succeed_here(SCRIPT, *files.words, *fixed, *size, "--save_path", "made", *words, folder=folder)


def reject(folder: Path, files: TinyH3, *words: str, remedy: bool = True) -> str:
    fixed = ["--prompt", "a cat", "--video_size", "32", "64", "--save_path", "made"]
    code, said = run_here(SCRIPT, *files.words, *fixed, *words, folder=folder)
    return assert_one_message(code, said, remedy=remedy)


def test_video_and_sound_are_those_of_diffusers(tmp_path: Path, files: TinyH3) -> None:
    """Of a line break that is typed as two characters, too. The files are in float32."""
    state = their_pipeline(files)(
        prompt=PROMPT.replace("\\n", "\n"),
        height=32,
        width=64,
        num_frames=124,
        num_inference_steps=STEPS + 1,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    ).values

    said = generate(tmp_path, files, "--output_type", "both", "--save_audio", "wav", "--keep_pngs")

    made = latents_in(tmp_path / "made")
    assert made["latent"].shape == (24, 37, 4, 8)
    assert_equal(made["latent"], state["latents"][0], "pictures")
    assert_equal(made[AUDIO_LATENTS], state["audio_latents"].transpose(0, 1), "sound")
    (video,) = (tmp_path / "made").glob("*.mp4")
    with av.open(str(video)) as opened:
        (stream,) = opened.streams.audio
        assert (stream.rate, stream.channels) == (32000, 2)
        assert opened.streams.video[0].frames == 124
    images = sorted((tmp_path / "made" / "frames").glob("*.png"))
    shown = numpy.stack([read_image(path) for path in images])
    expected = state["videos"][0].permute(0, 2, 3, 1) * 255
    assert (torch.from_numpy(shown) - expected).abs().max() < 1  # rounded
    (track,) = (tmp_path / "made").glob("*.wav")
    heard = read_wav(track)
    assert heard.shape == (2, 207 * 800)
    step = 2 / 2**16  # of 16 bits
    torch.testing.assert_close(heard, state["audio"][0].clamp(-1, 1 - step), atol=step, rtol=0)
    assert said.index("no rights in the USA") < said.index("Loading")


def read_wav(path: Path) -> Tensor:
    """The samples, channels x samples in -1..1."""
    with wave.open(str(path)) as opened:
        frames = numpy.frombuffer(opened.readframes(opened.getnframes()), "<i2")
        return torch.from_numpy(frames.reshape(-1, opened.getnchannels()).T / 2**15).float()


def test_one_frame_is_a_picture(tmp_path: Path, files: TinyH3) -> None:
    generate(tmp_path, files, "--video_length", "1", "--output_type", "both")

    made = latents_in(tmp_path / "made")
    assert made["latent"].shape == (24, 1, 4, 8)
    assert made[AUDIO_LATENTS].shape == (32, 2, 2)
    (image,) = (tmp_path / "made").glob("*.png")
    assert read_image(image).shape == (32, 64, 3)
    assert not [*(tmp_path / "made").glob("*.mp4")]


def test_saved_latents_are_decoded_with_their_sound(tmp_path: Path, files: TinyH3) -> None:
    generate(
        tmp_path, files, "--video_length", "22", "--allow_experimental_duration", "--output_type", "latent"
    )
    (saved,) = (tmp_path / "made").glob("*_latent.safetensors")

    generate(tmp_path, files, "--latent_path", str(saved))

    (video,) = (tmp_path / "made").glob("*.mp4")
    with av.open(str(video)) as opened:
        assert len([*opened.decode(video=0)]) == 22
        assert opened.streams.audio[0].rate == 32000


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--video_length", "120"], ["17n + 5", "Pass 124"]),
        (["--video_length", "130"], ["Pass 124 or 141"]),
        (["--video_length", "120", "--allow_experimental_duration"], ["Pass 107 or 124"]),
        (["--blocks_to_swap", "2"], ["at most 1 can be swapped. Use 1 or less"]),
        (["--video_length", "22"], ["--allow_experimental_duration"]),
        (["--guidance_scale", "5"], ["built in"]),
        (["--nag_scale", "5"], ["--nag_scale"]),
        (["--sample_solver", "unipc"], ["separate schedules"]),
        (["--task", "ref2va"], ["its name says that it is the transformer of fl2va"]),
        (["--task", "fl2va"], ["--first_frame"]),
        (["--first_frame", "none.png"], ["none.png"]),
        (["--ref", "a.png;kind=image"], ["kind=image"]),
        (["--condition_image", "a.png"], ["--one_frame_inference"]),
        (["--text_cache", "a.safetensors"], ["--text_encoder"]),
        (["--height", "64"], ["--width"]),
        (["--height", "64", "--width", "64"], ["--video_size 32 64 differ"]),
        (["--ratio", "1:1"], ["--video_size 32 64 differ"]),
        (["--duration", "5", "--video_length", "124"], ["pass one of them"]),
        (["--dtype", "float32", "--dit_dtype", "bfloat16"], ["mean the same"]),
        (["--h3_shift_audio", "0"], ["--h3_shift_audio"]),
    ],
)
def test_what_cannot_be_made_is_refused(
    tmp_path: Path, files: TinyH3, words: list[str], parts: list[str]
) -> None:
    message = reject(tmp_path, files, *words)
    assert all(part in message for part in parts), message
    assert not (tmp_path / "made").exists()


def test_sides_are_whole_tokens(tmp_path: Path, files: TinyH3) -> None:
    """Of two latent pixels, which this VAE makes of eight pixels each."""
    message = reject(tmp_path, files, "--video_size", "40", "64", remedy=False)
    assert "multiples of 16. Nearest: 32 64" in message


def test_a_transformer_of_another_task_is_refused_by_its_name(tmp_path: Path, files: TinyH3) -> None:
    other = tmp_path / "minimax_h3_ref2va_bf16.safetensors"
    other.symlink_to(files.dit)
    assert "ref2va" in reject(tmp_path, files, "--dit", str(other))


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path, files: TinyH3) -> None:
    folder = write_qwen_tokenizer(tmp_path / "qwen")
    assert "<|lyrics_start|>" in reject(tmp_path, files, "--tokenizer", str(folder))


@pytest.mark.parametrize("ratio", [16 / 9, 9 / 16, 1, 21 / 9, 4 / 3, 4])
def test_sizes_of_a_ratio_are_those_of_diffusers(ratio: float) -> None:
    assert canvas(ratio) == resolve_canvas_size(ratio, 1, 32, 768, 768 * 1344)


@pytest.mark.parametrize(("seconds", "frames"), [(5, 124), (5.5, 141), (0.1, 5)])
def test_a_duration_gives_the_next_length(seconds: float, frames: int) -> None:
    assert resolve_length(None, seconds) == frames


def test_folders_of_diffusers_make_the_same(tmp_path: Path, files: TinyH3) -> None:
    """All parts as folders, the tokenizer inside that of the text encoder."""
    release = tmp_path / "MiniMax-H3"
    their_h3_dit().save_pretrained(release / "transformer")
    test_video_vae.their_vae().save_pretrained(release / "vae")
    their_audio_vae().save_pretrained(release / "audio_vae")
    texts = write_tokenizer(release / "text_encoder")
    write_model(texts / "model.safetensors", text_encoder(), "transformers 5")
    words = ["--video_length", "1", "--output_type", "latent"]
    generate(tmp_path, files, *words)
    expected = latents_in(tmp_path / "made")

    names = {"--dit": "", "--video_vae": "vae", "--audio_vae": "", "--text_encoder": "text_encoder"}
    folders = [word for flag, name in names.items() for word in (flag, str(release / name))]
    fixed = ["--prompt", PROMPT, "--seed", "7", "--infer_steps", str(STEPS), "--video_size", "32", "64"]
    succeed_here(SCRIPT, *folders, *fixed, *words, "--save_path", "again", folder=tmp_path)

    for name, latents in latents_in(tmp_path / "again").items():
        torch.testing.assert_close(latents, expected[name], atol=1e-5, rtol=1e-5, msg=name)


def test_pictures_and_sound_may_have_one_schedule(tmp_path: Path, files: TinyH3) -> None:
    generate(tmp_path, files, "--video_length", "1", "--output_type", "latent", "--h3_shift_audio", "12")
    assert latents_in(tmp_path / "made")[AUDIO_LATENTS].isfinite().all()
