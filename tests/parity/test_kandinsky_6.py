"""Clips of Kandinsky 6 with their sound equal those of diffusers' pipeline, with the maker's steps."""

import math
import wave as waves
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky6TI2VAPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer

from kandinsky.audio import load_audio_vae, load_vocoder
from tests.faults.messages import succeed_here
from tests.kandinsky.making_6 import in_diffusers
from tests.parity.hunyuan import load_clip, load_vae
from tests.parity.pipelines import quiet
from tests.parity.reference import relative_error
from tests.parity.running import assert_equal
from tests.parity.test_kandinsky import MakersGrid, Reader
from tests.tiny.kandinsky_6 import (
    SCALE,
    TinyKandinsky6,
    make_audio_vae,
    make_vocoder,
    write_tiny_kandinsky_6,
)
from tests.tiny.language_models import qwen25_vl
from tests.tiny.project import write_image

PROMPT, NEGATIVE, SEED, STEPS = "a small rabbit runs through the grass", "low quality, blurred", 20, 3
HEIGHT, WIDTH, FRAMES = 32, 48, 9
TOLERANCE = 1e-4
FAR = 1e-3  # ten times the tolerance: the least that a mistake of those below changes
CPU = torch.device("cpu")
Latents = tuple[Tensor, Tensor]  # C F h w of the clip, C L of its sound


def pipe_of(files: TinyKandinsky6, **settings: Any) -> Any:
    """diffusers' pipeline with the maker's steps. settings: of its transformer."""
    pipe = Kandinsky6TI2VAPipeline(
        transformer=in_diffusers(load_file(files.dit), **settings),
        vae=load_vae(files.vae),
        text_encoder=qwen25_vl(),
        tokenizer=PaddingReader(files.qwen),
        text_encoder_2=load_clip(files.clip),
        tokenizer_2=CLIPTokenizer.from_pretrained(files.clip),
        scheduler=MakersGrid(shift=5.0),
        audio_vae=make_audio_vae(),
        vocoder=make_vocoder(),
    )
    return quiet(pipe)


class PaddingReader(Reader):
    """Without padding to 1024 tokens, which a mask hides."""

    def __call__(self, text: list[str], images: None, videos: None, **more: Any) -> Any:
        return super().__call__(text, images, videos, **{**more, "padding": True})


@torch.no_grad()
def made_there(pipe: Any, **more: Any) -> Latents:
    """Latents of a request."""
    options = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": FRAMES,
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(SEED),
        "output_type": "latent",
        "return_dict": False,
        **more,
    }
    video, sound = pipe(**options)
    return video[0], sound if sound is None else sound[0]


def made_here(folder: Path, files: TinyKandinsky6, *more: object) -> dict[str, Tensor]:
    """The tensors of the file of latents."""
    options = ["--task", "k6-lite-5s", *files.models, "--vae_dtype", "float32"]
    options += ["--text_encoder_dtype", "float32", "--prompt", PROMPT, "--negative_prompt", NEGATIVE]
    options += ["--video_size", HEIGHT, WIDTH, "--video_length", FRAMES, "--seed", SEED]
    options += ["--infer_steps", STEPS, "--device", "cpu", "--save_path", "made", "--output_type", "latent"]
    succeed_here("kandinsky_generate_video.py", *options, *more, folder=folder)
    (path,) = (folder / "made").glob("*_latent.safetensors")
    return load_file(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyKandinsky6:
    return write_tiny_kandinsky_6(tmp_path_factory.mktemp("kandinsky"))


@pytest.fixture(scope="module")
def expected(files: TinyKandinsky6) -> Latents:
    """What the pipeline makes from text."""
    return made_there(pipe_of(files))


def test_a_clip_with_sound_equals_the_pipelines(
    tmp_path: Path, files: TinyKandinsky6, expected: Latents
) -> None:
    made = made_here(tmp_path, files, *files.sound)

    assert_equal(made["latent"], expected[0], "video", TOLERANCE)
    assert_equal(made["audio_latents"].squeeze(2), expected[1], "sound", TOLERANCE)


def test_a_silent_clip_equals_the_pipelines(tmp_path: Path, files: TinyKandinsky6) -> None:
    """Without networks of sound, and without guidance: the video runs alone."""
    made = made_here(tmp_path, files, "--guidance_scale", 1)

    video, sound = made_there(pipe_of(files), sample_audio=False, guidance_scale=1.0)
    assert sound is None
    assert made.keys() == {"latent"}
    assert_equal(made["latent"], video, "silent", TOLERANCE)


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline draws from the posterior of an image; here its mean is taken."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)


@pytest.fixture
def start(tmp_path: Path) -> Path:
    path = tmp_path / "start.png"
    write_image(path, WIDTH, HEIGHT)
    return path


@pytest.mark.usefixtures("modes")
def test_a_clip_from_an_image_equals_the_pipelines(
    tmp_path: Path, files: TinyKandinsky6, start: Path
) -> None:
    made = made_here(tmp_path, files, *files.sound, "--image_path", start)

    video, sound = made_there(pipe_of(files), image=Image.open(start))
    assert_equal(made["latent"], video, "image", TOLERANCE)
    assert_equal(made["audio_latents"].squeeze(2), sound, "its sound", TOLERANCE)


def channels_first(pipe: Any) -> None:
    shape = (1, 16, (FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(shape, generator=generator).permute(0, 2, 3, 4, 1)
    pipe.prepare_latents = lambda *inputs: noise


def another_seed_for_sound(pipe: Any) -> None:
    prepare = pipe.prepare_audio_latents

    def draw(batch: int, channels: int, length: int, dtype: Any, device: Any, *_: Any) -> Tensor:
        generator = torch.Generator().manual_seed(SEED + 1)
        latents: Tensor = prepare(batch, channels, length, dtype, device, generator, None)
        return latents

    pipe.prepare_audio_latents = draw


def own_grid(pipe: Any) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)


def shift_10(pipe: Any) -> None:
    pipe.scheduler = MakersGrid(shift=10.0)


MISTAKES: dict[str, Callable[[Any], None]] = {
    "noise with channels first": channels_first,
    "another seed for the sound": another_seed_for_sound,
    "diffusers' grid": own_grid,
    "a shift of 10": shift_10,
}
# settings of diffusers' transformer that no release has
SETTINGS = {
    "sound's positions not slowed": {"audio_freqs_scaling": 1.0},
    "no positions between streams": {"ca_rope": False},
    "a factor of 1": {"scale_factor": (1.0, 1.0, 1.0)},
}


@pytest.mark.parametrize("name", [*MISTAKES, *SETTINGS])
def test_a_mistake_shows(files: TinyKandinsky6, expected: Latents, name: str) -> None:
    pipe = pipe_of(files, **SETTINGS.get(name, {}))
    if name in MISTAKES:
        MISTAKES[name](pipe)

    made = made_there(pipe)

    assert max(relative_error(*pair) for pair in zip(made, expected, strict=True)) > FAR, name


def test_a_video_without_its_sound_is_another(files: TinyKandinsky6, expected: Latents) -> None:
    video, _ = made_there(pipe_of(files), sample_audio=False)

    assert relative_error(video, expected[0]) > FAR


def test_sound_is_encoded_and_decoded_as_diffusers_does(files: TinyKandinsky6) -> None:
    """The networks themselves are diffusers': this compares reading, scale, length and the track."""
    frames, fps = 25, 24.0
    sound = 0.3 * torch.randn(1, 1, 50_000, generator=torch.Generator().manual_seed(1))
    theirs, vocoder = make_audio_vae(), make_vocoder()
    length = math.ceil(frames / fps * 44100 / 1024)  # as the pipeline has it
    samples = torch.nn.functional.pad(sound[:, 0], (0, length * 1024 - sound.shape[2]))
    with torch.no_grad():
        latents = SCALE * theirs.encode(samples).latent_dist.mode()
        waveform = vocoder(theirs.decode(latents / SCALE).sample).sample[0]

    vae = load_audio_vae(files.audio_vae, CPU)
    ours = vae.encode_clip(sound, frames, fps)
    track = load_vocoder(files.vocoder, CPU, 44100).decode(vae.decode(ours))

    assert ours.shape == (1, 40, length, 1)
    assert_equal(ours.squeeze(3), latents, "encoded", TOLERANCE)
    assert_equal(track.samples, waveform, "decoded", TOLERANCE)
    assert track.samples.shape == (1, 1024 * length)


def test_a_clip_is_written_with_its_sound(tmp_path: Path, files: TinyKandinsky6) -> None:
    made = made_here(tmp_path, files, *files.sound, "--output_type", "both", "--save_audio", "wav")

    (path,) = (tmp_path / "made").glob("*.mp4")
    (wave,) = (tmp_path / "made").glob("*.wav")
    with av.open(str(path)) as clip:
        assert [stream.type for stream in clip.streams] == ["video", "audio"]
        assert clip.streams.audio[0].rate == 44100
    vae = load_audio_vae(files.audio_vae, CPU)
    track = load_vocoder(files.vocoder, CPU, 44100).decode(vae.decode(made["audio_latents"].unsqueeze(0)))
    with waves.open(str(wave)) as file:
        assert (file.getframerate(), file.getnchannels()) == (44100, 1)
        samples = torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16) / 32768
    assert_equal(samples[: track.samples.shape[1]], track.samples[0], "track", 1e-3)  # 16 bits
