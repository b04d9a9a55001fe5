"""LTX-2 through its command lines equals diffusers: whole pipelines, with sound and without."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2ImageToVideoPipeline, LTX2Pipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import ltx2_generate_video
from ltx_2.files import Ltx2Files
from ltx_2.model_options import GEMMA
from modules.errors import CheckpointError
from modules.media.pixels import video_pixels
from modules.media.reading import read_image
from modules.media.samples import read_track
from modules.media.writing import write_png
from protocols.data import AUDIO_LATENTS
from tests.faults.messages import assert_one_message, run_here
from tests.ltx_2.release import TinyRelease, dit_config, write_release
from tests.ltx_2.tiny_dit import dit_in_diffusers
from tests.ltx_2.tiny_text import text_tokenizer
from tests.parity.running import assert_equal
from tests.tiny.project import moving_square, write_image

PROMPT, NEGATIVE, SEED = "a red cat sits down", "dull", 20
HEIGHT, WIDTH, FRAMES, STEPS = 64, 96, 9, 3
MU = 2.05  # of 4096 tokens, which the released pipelines take at any size


each_version = pytest.mark.parametrize("release", ["2.3", "2.0"], indirect=True)


@pytest.fixture(scope="module")
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyRelease:
    return write_release(tmp_path_factory.mktemp("größe"), request.param)


def theirs(release: TinyRelease) -> LTX2Pipeline:
    """diffusers' pipeline with the weights of this release, in float32 on the CPU."""
    there = release.networks
    pipe = LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=MU, max_shift=MU, shift_terminal=0.1
        ),
        vae=there["vae"],
        audio_vae=there["audio_vae"],
        text_encoder=there["text_encoder"],
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=text_tokenizer(), pad_token="<pad>", bos_token="<bos>"
        ),
        connectors=there["connectors"],
        transformer=dit_in_diffusers(there["version"], there["state"], config=dit_config(there["version"])),
        vocoder=there["vocoder"],
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(release: TinyRelease, folder: Path, *words: object, frames: int = FRAMES) -> dict[str, Tensor]:
    """Run the script; return the latents of the only video. PNG and WAV files of them are in `shown`."""
    size = ["--video_size", HEIGHT, WIDTH, "--video_length", frames, "--infer_steps", STEPS, "--seed", SEED]
    said = ["--prompt", PROMPT, "--negative_prompt", NEGATIVE, *release.texts]
    command = [*release.words, *release.vaes, "--device", "cpu", *words]
    made = ["--output_type", "latent", "--save_path", folder / "made"]
    ltx2_generate_video.main([str(word) for word in [*command, *size, *said, *made]])
    (path,) = (folder / "made").iterdir()
    shown = ["--output_type", "images", "--save_path", folder / "shown", "--save_audio", "wav"]
    if "--sample_audio_only" in words:
        shown = ["--save_path", folder / "shown" / "bell.wav"]
    ltx2_generate_video.main([str(word) for word in [*command, "--latent_path", path, *shown]])
    return load_file(path)


def alone(_: Any, __: Any, given: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    """Keep the streams apart, as video is made without sound."""
    return (), {**given, "isolate_modalities": True}


Scales = dict[str, float]
THEIRS = {"cfg": "guidance_scale", "modality": "modality_scale", "rescale": "guidance_rescale"}
PLAIN = {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
RELEASED = {"guidance_scale": 3.0, "stg_scale": 1.0, "modality_scale": 3.0, "guidance_rescale": 0.7}
GUIDED = {"guidance_scale": 3.0, "stg_scale": 1.5, "modality_scale": 2.0, "guidance_rescale": 0.7}
AUDIO_SCALES = {"guidance_scale": 7.0, "stg_scale": 1.5, "modality_scale": 3.0, "guidance_rescale": 0.4}


def scale_words(picture: Scales, audio: Scales) -> list[object]:
    """Options of these scales; that of skipped self-attention is the same for both streams."""
    words: list[object] = ["--stg_scale", picture["stg_scale"]]
    for stream, scales in (("video", picture), ("audio", audio)):
        for name in ("cfg", "modality", "rescale"):
            words += [f"--{stream}_{name}_scale", scales[THEIRS[name]]]
    return words


@pytest.mark.slow_cases("2.5 alone", "as released", "guided", "video alone")
@pytest.mark.parametrize(
    ("release", "mode", "fps", "picture", "audio"),
    [
        ("2.3", "av", 24, RELEASED, RELEASED | {"guidance_scale": 7.0}),
        ("2.3", "v", 12, GUIDED | {"modality_scale": 1.0}, PLAIN),
        ("2.0", "av", 12, GUIDED, AUDIO_SCALES),
        ("2.0", "av", 24, PLAIN, PLAIN),
        ("2.5", "av", 24, RELEASED, RELEASED | {"guidance_scale": 7.0}),
        ("2.5", "v", 12, GUIDED | {"modality_scale": 1.0}, PLAIN),
    ],
    indirect=["release"],
    ids=["as released", "video alone", "guided", "plain", "2.5", "2.5 alone"],
)
def test_videos_and_their_sound_equal_those_of_diffusers(
    release: TinyRelease, tmp_path: Path, mode: str, fps: int, picture: Scales, audio: Scales
) -> None:
    words = ["--ltx2_mode", mode, "--fps", fps]
    if picture is not RELEASED:
        words += ["--stg_blocks", 1, *scale_words(picture, audio)]

    made = generate(release, tmp_path, *words)

    pipe = theirs(release)
    if mode == "v":
        pipe.transformer.register_forward_pre_hook(alone, with_kwargs=True)
    assert_as_there(pipe, made, tmp_path / "shown", fps, picture, audio)


def assert_shown(vae: Any, latents: Tensor, shown: Path) -> None:
    """The PNG files of a folder are the frames that diffusers' VAE decodes, as near as bytes can be."""
    pixels = (vae.decode(latents, None).sample[0].clamp(-1, 1) + 1) * 127.5
    frames = [torch.from_numpy(read_image(path)) for path in sorted(shown.rglob("*.png"))]
    assert (torch.stack(frames).permute(3, 0, 1, 2) - pixels).abs().max() < 0.6


def assert_as_there(
    pipe: Any, made: dict[str, Tensor], shown: Path, fps: int, picture: Scales, audio: Scales, **more: Any
) -> None:
    """Latents, pictures and the waveform are those of diffusers' pipeline. more: arguments of its call."""
    scales = {**picture, **{f"audio_{name}": scale for name, scale in audio.items()}}
    latents, heard = pipe(
        **{"prompt": PROMPT, "negative_prompt": NEGATIVE, "height": HEIGHT, "width": WIDTH},
        **{"num_frames": FRAMES, "frame_rate": float(fps), "num_inference_steps": STEPS},
        **{"spatio_temporal_guidance_blocks": [1], "return_dict": False, "output_type": "latent"},
        **{"generator": torch.Generator().manual_seed(SEED), **scales, **more},
    )
    vae, audios = pipe.vae, pipe.audio_vae
    if made["latent"].numel():
        expected = pipe._normalize_latents(latents, vae.latents_mean, vae.latents_std)[0]
        assert_equal(made["latent"], expected, "latents")
        assert_shown(vae, latents, shown)
    if AUDIO_LATENTS not in made:
        assert not [*shown.rglob("*.wav")]
        return
    packed = pipe._pack_audio_latents(heard)
    packed = pipe._normalize_audio_latents(packed, audios.latents_mean, audios.latents_std)
    unpacked = pipe._unpack_audio_latents(packed, heard.shape[2], heard.shape[3])
    assert_equal(made[AUDIO_LATENTS], unpacked[0], "sound")
    wave = pipe.vocoder(audios.decode(heard).sample)[0].clamp(-1, 1)
    (path,) = shown.rglob("*.wav")
    rate = getattr(pipe.vocoder.config, "output_sampling_rate", 24000)
    seconds = Fraction(FRAMES, fps)  # of the clip; the rest of the last latent is cut off
    count = min(int(seconds * rate), wave.shape[1])
    track = read_track(path, Fraction(0), count, rate, 2)
    assert track is not None
    assert (torch.from_numpy(track) - wave[:, :count]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("release", "words"),
    [("2.3", ["--ltx2_mode", "audio"]), ("2.5", ["--sample_audio_only", "--ltx2_video_vae", "absent.pt"])],
    indirect=["release"],
)
def test_sound_alone_equals_that_of_diffusers_without_pictures(
    release: TinyRelease, tmp_path: Path, words: list[str]
) -> None:
    """Its noise is the first that is drawn, and no pass has pictures; they need no VAE."""
    made = generate(release, tmp_path, *words)

    pipe = theirs(release)
    pipe.transformer.register_forward_pre_hook(alone, with_kwargs=True)
    begin = pipe.prepare_latents

    def begin_again(*given: Any, **told: Any) -> Tensor:
        images: Tensor = begin(*given, **told)
        given[-2].manual_seed(SEED)
        return images

    pipe.prepare_latents = begin_again
    of_audio = RELEASED | {"guidance_scale": 7.0, "modality_scale": 1.0}
    assert_as_there(pipe, made, tmp_path / "shown", 24, PLAIN, of_audio)


@pytest.mark.parametrize("release", ["2.3"], indirect=True)
def test_what_is_for_pictures_is_told_before_sound_alone_is_made(
    release: TinyRelease, tmp_path: Path
) -> None:
    command = ["ltx2_generate_video.py", *release.words, *release.texts, "--ltx2_mode", "audio"]
    command += ["--prompt", "a bell", "--device", "cpu", "--save_path"]
    for words, message in (
        (["bells", "--output_type", "images", "--trim_tail_frames", "2"], "_frames, --output_type images: "),
        (["bell.mp4"], "--save_path bell.mp4: the result is sound alone. Pass bell.wav"),
    ):
        code, said = run_here(*command, *words, folder=tmp_path)
        assert_one_message(code, said, message)


@pytest.mark.slow_cases("2.0-av-0", "2.3-av-None", "2.3-v-18", "2.5-av-None")
@pytest.mark.parametrize(
    ("release", "mode", "crf"),
    [("2.3", "av", None), ("2.0", "av", 0), ("2.3", "v", 18), ("2.5", "av", None)],
    indirect=["release"],
)
def test_a_video_from_an_image_equals_that_of_diffusers(
    release: TinyRelease, tmp_path: Path, mode: str, crf: int | None
) -> None:
    """diffusers modulates the streams by other times than the release, and guides the given frame too."""
    write_image(tmp_path / "start.png", WIDTH, HEIGHT)
    image = GUIDED if mode == "av" else GUIDED | {"modality_scale": 1.0}
    words = ["--ltx2_mode", mode, "--image_path", tmp_path / "start.png", "--stg_blocks", 1]
    words += [] if crf is None else ["--image_crf", crf]

    made = generate(release, tmp_path, *words, *scale_words(image, AUDIO_SCALES))

    pipe = LTX2ImageToVideoPipeline(**theirs(release).components)
    pipe.set_progress_bar_config(disable=True)
    dit, times = pipe.transformer, []

    def start(_: Any, __: Any, given: dict[str, Any]) -> None:
        times[:] = [given["sigma"]]

    def end(_: Any, __: Any, made: tuple[Tensor, Tensor]) -> None:
        made[0][:, : HEIGHT * WIDTH // 32**2] = 0

    dit.register_forward_pre_hook(start, with_kwargs=True)
    dit.register_forward_hook(end)
    dit.av_cross_attn_video_a2v_gate.register_forward_pre_hook(lambda *_: tuple(times))
    if mode == "v":
        dit.register_forward_pre_hook(alone, with_kwargs=True)
    default = 18 if release.networks["version"] == "2.5" else 33  # as the official pipelines have it
    asked = {
        "image": Image.open(tmp_path / "start.png"),
        "image_crf": default if crf is None else crf,
        "use_cross_timestep": False,
    }
    assert_as_there(pipe, made, tmp_path / "shown", 24, image, AUDIO_SCALES, **asked)


@pytest.mark.slow_cases("2.0", "2.3")
@each_version
def test_sound_is_made_for_a_given_video(release: TinyRelease, tmp_path: Path) -> None:
    """The video stays as it is, and its sound depends on it."""
    found = []
    for seed in (1, 2):
        folder = tmp_path / f"clip {seed}"
        folder.mkdir()
        for number, frame in enumerate(moving_square(FRAMES, WIDTH, HEIGHT, seed)):
            write_png(folder / f"{number:03d}.png", frame)
        there = tmp_path / f"made {seed}"
        found.append((folder, generate(release, there, "--ltx2_mode", "av", "--drive_video", folder)))

    for folder, made in found:
        pixels = video_pixels(folder, "", WIDTH, HEIGHT, FRAMES)
        pipe = theirs(release)
        expected = pipe.vae.encode(pixels).latent_dist.mode()
        normed = pipe._normalize_latents(expected, pipe.vae.latents_mean, pipe.vae.latents_std)
        assert_equal(made["latent"], normed[0], "latents")
    assert not torch.equal(found[0][1][AUDIO_LATENTS], found[1][1][AUDIO_LATENTS])


def test_a_file_that_nobody_typed_is_named_as_the_default_of_its_option() -> None:
    with pytest.raises(CheckpointError, match=f"--gemma_root is not given, and its default {GEMMA}: no such"):
        Ltx2Files(gemma=GEMMA).text_encoder()
    with pytest.raises(CheckpointError, match="^--gemma_root other: no such file"):
        Ltx2Files(gemma=Path("other")).text_encoder()


@pytest.mark.slow_cases("2.3")
@each_version
def test_sound_for_a_given_video_equals_that_of_diffusers(release: TinyRelease, tmp_path: Path) -> None:
    """There with the pictures' time at 0 and no velocity of theirs, and gates of the other stream's time."""
    folder = tmp_path / "clip"
    folder.mkdir()
    for number, frame in enumerate(moving_square(FRAMES, WIDTH, HEIGHT, 3)):
        write_png(folder / f"{number:03d}.png", frame)
    words = ["--ltx2_mode", "av", "--drive_video", folder, *scale_words(PLAIN, PLAIN)]

    made = generate(release, tmp_path, *words)

    pipe, times = theirs(release), [torch.zeros(1)]
    dit = pipe.transformer

    def start(_: Any, __: Any, given: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        times[:] = [given["timestep"]]
        still = torch.zeros_like(times[0])
        of_audio = {"audio_timestep": times[0], "audio_sigma": times[0]}
        return (), {**given, **of_audio, "timestep": still, "sigma": still, "use_cross_timestep": False}

    def stay(_: Any, __: Any, made: tuple[Tensor, Tensor]) -> None:
        made[0].zero_()

    dit.register_forward_pre_hook(start, with_kwargs=True)
    dit.register_forward_hook(stay)
    dit.av_cross_attn_video_a2v_gate.register_forward_pre_hook(lambda *_: (times[0],))
    dit.av_cross_attn_audio_v2a_gate.register_forward_pre_hook(lambda *_: (torch.zeros_like(times[0]),))
    given = pipe.vae.encode(video_pixels(folder, "", WIDTH, HEIGHT, FRAMES)).latent_dist.mode()
    assert_as_there(pipe, made, tmp_path / "shown", 24, PLAIN, PLAIN, latents=given, noise_scale=0.0)
