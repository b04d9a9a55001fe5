"""Clips with sound from a generation script: files with a track, latents of both, and what is refused."""

import math
import re
import sys
import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import wan_generate_video
from blissful_tuner.guidance import make_guidance
from blissful_tuner.options import PLAIN_GUIDANCE
from generation.comparing import compare
from generation.denoise import denoise
from generation.grid_options import CompareOptions
from generation.outputs import save_latents, save_pixels
from modules.errors import CheckpointError, OptionError
from modules.flow.solvers import solver_for
from modules.media.reading import read_tags, video_frames, video_info
from protocols.data import AUDIO_LATENTS, AudioVideoShapes
from protocols.requests import Request
from protocols.steps import CompletedStep, Overrides, Section
from tests.commands import run_in_processes, run_script
from tests.generation.test_outputs import output_options
from tests.generation.test_post import chunks, post_of
from tests.postprocessing.stages_here import Larger, Smoother
from tests.preparing import prepare
from tests.sound_family import RATE, STREAMS, audio_shape, generate_with_audio, main, tone, with_audio
from tests.tiny.project import write_lora
from tests.tiny.wan import write_tiny_wan

FRAMES, FPS = 9, 16
SHAPE = audio_shape(FRAMES, FPS)
SAY = ("--prompt", "a cat", "--negative_prompt", "dull", "--seed", 1, "--guidance_scale", 3)
SIZE = ("--video_size", 32, 32, "--infer_steps", 3, "--video_length", FRAMES, "--fps", FPS, "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("modèle å")
    return [*write_tiny_wan(folder).models, "--task", "t2v-1.3B"]


def make(model: list[str], folder: Path, *words: object, **changes: Any) -> list[str]:
    """Run the script; return the names of its files with their times cut off."""
    generate_with_audio([*model, "--save_path", folder, *SIZE, *SAY, *words], **changes)
    return sorted(re.sub(r"^[\d-]+_", "", path.name) for path in folder.iterdir())


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def saved(folder: Path) -> dict[str, Tensor]:
    """The latents of the only clip: of its picture, and of its sound."""
    return load_file(only(folder, "*_latent.safetensors"))


def same(one: Path, other: Path) -> bool:
    """Whether both folders have the latents of the same clip."""
    ours, theirs = saved(one), saved(other)
    return all(torch.equal(ours[name], theirs[name]) for name in ("latent", AUDIO_LATENTS))


def streams(path: Path) -> list[str]:
    with av.open(str(path)) as container:
        return [one.type for one in container.streams]


def heard(path: Path) -> tuple[np.ndarray[Any, Any], int]:
    """Return the samples C S of a file and their rate."""
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
        assert [frame.pts for frame in frames] == sorted(frame.pts for frame in frames)
        assert frames[0].pts == 0
    return np.concatenate([frame.to_ndarray() for frame in frames], axis=1), frames[0].sample_rate


def assert_like(samples: np.ndarray[Any, Any], latents: Tensor) -> None:
    """The samples of a video are those of the latents, but for what AAC takes."""
    wanted = latents.flatten(1).clamp(-1, 1).numpy()
    count = round(FRAMES / FPS * RATE)
    for ours, theirs in zip(samples[:, :count], wanted[:, :count], strict=True):
        assert np.corrcoef(ours, theirs)[0, 1] > 0.99


@pytest.mark.slow_cases("mp4")
@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_a_video_has_the_track_of_its_latents(model: list[str], tmp_path: Path, container: str) -> None:
    names = make(model, tmp_path, "--output_type", "both", "--save_audio", "wav", "--container", container)

    assert names == sorted(["1.wav", f"1.{container}", "1_latent.safetensors"])
    latents = saved(tmp_path)[AUDIO_LATENTS]
    assert tuple(latents.shape) == SHAPE
    video = only(tmp_path, f"*.{container}")
    samples, rate = heard(video)
    assert (rate, len(samples)) == (RATE, 2)
    assert sum(1 for _ in video_frames(video)) == FRAMES
    # a packet of AAC holds 1024 samples, and MP4 alone says where in the last one the sound ends
    assert 0 <= samples.shape[1] / RATE - FRAMES / FPS < 1024 / RATE
    assert_like(samples, latents)
    with wave.open(str(only(tmp_path, "*.wav")), "rb") as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 2, 2)
        pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, 2).T / 32767
    np.testing.assert_allclose(pcm, latents.flatten(1).clamp(-1, 1), atol=0.5001 / 32767)


def test_latents_hold_both_and_are_decoded_later(model: list[str], tmp_path: Path) -> None:
    first, second = tmp_path / "at once", tmp_path / "later"
    make(model, first, "--output_type", "both")
    latents = only(first, "*_latent.safetensors")

    generate_with_audio([*model, "--save_path", second, "--latent_path", latents, "--device", "cpu"])

    ours, theirs = only(first, "*.mp4"), only(second, "*.mp4")
    assert np.array_equal(heard(ours)[0], heard(theirs)[0])
    assert read_tags(theirs)["bt_prompt"] == "a cat"
    assert sorted(path.name for path in second.iterdir()) == [theirs.name]


@pytest.mark.slow
def test_networks_of_sound_are_gone_before_the_vae_comes(model: list[str], tmp_path: Path) -> None:
    diary: list[str] = []
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n", encoding="utf-8")
    generate_with_audio(
        [*model, "--save_path", tmp_path / "made", *SIZE, "--from_file", tmp_path / "prompts.txt"],
        diary=diary,
    )

    assert diary == ["load sound", "decode sound", "decode sound", "load vae"]


def test_png_files_have_no_sound_and_one_note_says_so(
    model: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    diary: list[str] = []
    caplog.set_level("INFO")
    make(model, tmp_path, "--output_type", "images", diary=diary)

    assert [one.getMessage() for one in caplog.records if one.getMessage().startswith("The sound")] == [
        "The sound is left out because PNG files have none: --save_audio wav writes it"
    ]
    assert diary == ["load vae"]
    assert make(model, tmp_path / "with", "--output_type", "images", "--save_audio", "wav") == ["1", "1.wav"]


def test_a_file_of_sound_without_sound_is_told(
    model: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["--save_audio", "wav", "--output_type", "images", "--video_length", "1"]

    assert make(model, tmp_path, *words) == ["1"]

    told = "--save_audio wav is ignored because no result has sound"
    assert [message for message in caplog.messages if "--save_audio" in message] == [told]


def test_a_tool_on_frames_keeps_the_track(tmp_path: Path) -> None:
    post, _ = post_of(Larger(), Smoother())
    track = tone((2, 8, 320)).flatten(1).numpy(), RATE

    path = save_pixels(output_options(tmp_path), "a", chunks(), 16.0, None, post, track)

    info = video_info(path)
    assert (info.width, info.fps, info.frames) == (64, 32.0, 9)
    assert abs(heard(path)[0].shape[1] / RATE - 9 / 32) < 1024 / RATE


def test_previews_show_the_picture_alone(model: list[str], tmp_path: Path) -> None:
    make(model, tmp_path, "--output_type", "latent", "--preview_latent_every", 1)

    assert streams(tmp_path / "latent_preview.mp4") == ["video"]
    assert sum(1 for _ in video_frames(tmp_path / "latent_preview.mp4")) == (FRAMES - 1) // 4 + 1


@pytest.mark.slow
def test_a_picture_and_a_run_without_sound_have_none(model: list[str], tmp_path: Path) -> None:
    assert make(model, tmp_path / "a", "--output_type", "both", "--video_length", 1) == [
        "1.png",
        "1_latent.safetensors",
    ]
    make(model, tmp_path / "b", "--output_type", "both", audio=None)
    plain = [*model, "--save_path", tmp_path / "c", *SIZE, *SAY, "--output_type", "both"]
    wan_generate_video.main([str(word) for word in plain])

    ours, theirs = saved(tmp_path / "b"), saved(tmp_path / "c")
    assert set(ours) == set(theirs) == {"latent"}
    assert torch.equal(ours["latent"], theirs["latent"])
    assert streams(only(tmp_path / "b", "*.mp4")) == ["video"]


def test_sound_of_a_line_and_of_a_sheet_is_that_of_the_line_alone(model: list[str], tmp_path: Path) -> None:
    make(model, tmp_path / "alone", "--output_type", "both")
    words = ("--output_type", "both", "--sheet", "guidance_scale=1,3")
    make(model, tmp_path / "sheet", *words)

    alone = saved(tmp_path / "alone")
    cells = [load_file(path) for path in (tmp_path / "sheet").glob("*.safetensors")]
    assert sum(torch.equal(one[AUDIO_LATENTS], alone[AUDIO_LATENTS]) for one in cells) == 1
    assert sorted(len(streams(path)) for path in (tmp_path / "sheet").glob("*.mp4")) == [1, 2, 2]


def test_every_clip_of_a_comparison_has_its_track(model: list[str], tmp_path: Path) -> None:
    lora = tmp_path / "style.safetensors"
    write_lora(lora, Path(model[1]), 2)
    words = [*model, *SIZE, *SAY, "--save_path", tmp_path / "grid", "--lora_weight", lora]

    main(
        [str(word) for word in words],
        make=lambda family, options: compare(with_audio(family), options, CompareOptions(lora=(lora,))),
    )

    tracks = {path.name[:3]: len(streams(path)) for path in (tmp_path / "grid").glob("*.mp4")}
    assert len([*(tmp_path / "grid").glob("001*.mp4")]) == 2
    assert tracks == {"001": 2, "com": 1}  # the grid is silent


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--save_audio", "wav", "--output_type", "latent"), "no sound is decoded"),
        (("--from_latent", "LATENT"), "starts from noise"),
        (("--perp_neg", 1), "needs its own .separate ones for picture and sound"),
        (("--cfgzerostar_scaling",), "needs its own"),
        (("--slg_layers", 1, "--slg_mode", "uncond"), "needs its own"),
        (("--guidance_rescale", 0.5), "needs its own"),
    ],
)
def test_what_sound_cannot_have_is_refused(
    model: list[str], tmp_path: Path, words: tuple[object, ...], said: str
) -> None:
    latent = tmp_path / "x_latent.safetensors"
    save_latents(latent, torch.zeros(1, 16, 3, 4, 4), None)

    with pytest.raises(OptionError, match=said):
        make(model, tmp_path, *(latent if word == "LATENT" else word for word in words), rules=STREAMS)


def test_latents_of_another_sound_are_refused(model: list[str], tmp_path: Path) -> None:
    latents = tmp_path / "x_latent.safetensors"
    save_latents(latents, torch.zeros(1, 16, 3, 4, 4), None, torch.zeros(1, 8, 5, 16))
    words = [*model, "--save_path", tmp_path, "--latent_path", latents, "--device", "cpu"]

    with pytest.raises(CheckpointError, match="8 x 16 values per time step, .* has 2 x 320"):
        generate_with_audio(words)


def test_steps_follow_given_noise_levels(model: list[str], tmp_path: Path) -> None:
    """Those of an even schedule, given as a list, make the same clip."""
    even = ("--output_type", "latent", "--sample_solver", "vanilla", "--flow_shift", 1, "--infer_steps", 4)
    make(model, tmp_path / "even", *even)
    make(model, tmp_path / "list", *even, levels=(1.0, 0.75, 0.5, 0.25, 0.0))

    assert same(tmp_path / "list", tmp_path / "even")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are copies of one with libraries")
def test_processes_that_share_passes_and_weights_make_the_same_sound(
    model: list[str], tmp_path: Path
) -> None:
    command = (*model, *SIZE, *SAY, "--output_type", "latent")
    script = "tests/sound_family.py"
    run_script(script, *command, "--save_path", "alone", folder=tmp_path)

    run_in_processes(
        2, script, *command, "--cfg_parallel", "--shard_base", "--save_path", "shared", folder=tmp_path
    )

    assert same(tmp_path / "shared", tmp_path / "alone")


def test_given_sound_stays_and_is_told_to_be_clean(model: list[str], tmp_path: Path) -> None:
    given = tone(SHAPE) / 3
    make(model, tmp_path / "given", "--output_type", "latent", given_audio=given, rules=STREAMS)
    make(model, tmp_path / "made", "--output_type", "latent", rules=STREAMS)

    ours, theirs = saved(tmp_path / "given"), saved(tmp_path / "made")
    assert torch.equal(ours[AUDIO_LATENTS], given)
    assert ours["latent"].isfinite().all()
    assert not torch.equal(ours["latent"], theirs["latent"])


class Answers:
    """A family whose network answers with the noisy latents themselves; notes the times that it is told."""

    def __init__(self) -> None:
        self.times: list[Tensor] = []

    def predict(self, _: Any, noisy: Tensor, timesteps: Tensor, *__: Any) -> Tensor:
        self.times += timesteps
        return noisy


JOINT = AudioVideoShapes((2, 3, 2, 2), (2, 5, 4))


@pytest.mark.parametrize(
    ("given", "solver"),
    [("one frame", "unipc"), ("picture", "dpm++sde"), ("sound", "lcm"), ("both", "unipc")],
)
def test_what_is_given_stays_at_every_step(given: str, solver: str) -> None:
    noise = torch.randn(1, math.prod(JOINT.image) + math.prod(JOINT.audio))
    section = Section(noise, {}, overrides=Overrides(audio_video_shapes=JOINT))
    frames = {"one frame": 1, "picture": 3, "both": 3}.get(given, 0)
    image, audio = torch.full((1, 2, frames, 2, 2), 7.0), torch.full((1, *JOINT.audio), 5.0)
    if frames:
        section = replace(
            section, clean_frames=image, overrides=replace(section.overrides, num_clean_frames=frames)
        )
    if given in {"sound", "both"}:
        section = replace(section, clean_audio=audio)
    shown, network = list[Tensor](), Answers()

    def watch(done: CompletedStep) -> bool:
        shown.append(done.step.noisy)
        for clean, full, is_held in zip(
            JOINT.split(done.clean), (image, audio), section.clean_streams, strict=True
        ):
            assert not is_held or torch.equal(clean, full)
        return False

    end = denoise(
        network,  # type: ignore[arg-type]
        lambda _: torch.nn.Identity(),
        section,
        noise,
        solver_for(solver, 3, 3.0, draw=lambda shape: torch.randn(*shape)),
        make_guidance(prepare(Request("p", 1, guidance_scale=1.0, steps=3)), PLAIN_GUIDANCE),
        [watch],
    )

    for latents in (*shown, end):
        seen, listened = JOINT.split(latents)
        assert torch.equal(seen[:, :, :frames], image)
        assert (given in {"sound", "both"}) is torch.equal(listened, audio)
    expected = {"one frame": True, "picture": [False, True], "sound": [True, False], "both": [False, False]}
    assert (network.times[0] > 0).tolist() == expected[given]


@pytest.mark.slow
def test_the_plan_counts_the_decoder_of_sound(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(model, tmp_path, "--plan")

    assert "decoding sound" in capsys.readouterr().out
