"""Clips in two stages equal those of diffusers: its upscaler, and its pipelines one after the other."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2ImageToVideoPipeline, LTX2LatentUpsamplePipeline
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from diffusers.pipelines.ltx2.utils import STAGE_2_DISTILLED_SIGMA_VALUES
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import ltx2_generate_video
from blissful_tuner.taehv import TaehvConfig
from ltx_2.stage_options import Ltx2OfficialStages
from ltx_2.stages import two_stages
from ltx_2.upscaler import SPATIAL, TEMPORAL, enlarge, read_scale_factors
from modules.errors import UserError
from modules.media.pixels import image_pixels
from modules.media.reading import read_image, video_frames
from modules.media.writing import write_png
from protocols.data import AUDIO_LATENTS
from tests.faults.messages import succeed_here
from tests.ltx_2.release import (
    KINDS,
    TinyRelease,
    dit_config,
    upscaler,
    write_lora,
    write_release,
    write_upscaler,
)
from tests.ltx_2.test_family import AUDIO_SCALES, GUIDED, NEGATIVE, PROMPT, SEED, alone, scale_words, theirs
from tests.ltx_2.test_training import run, samples, write_project
from tests.ltx_2.tiny_dit import dit_in_diffusers
from tests.parity.running import assert_equal
from tests.tiny.project import moving_square, write_image
from tests.tiny.taehv import write_taehv

HEIGHT, WIDTH, FRAMES, STEPS = 128, 192, 17, 3
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyRelease:
    return write_release(tmp_path_factory.mktemp("größe"), getattr(request, "param", "2.3"))


@pytest.mark.slow_cases("plain-False")
@pytest.mark.parametrize("is_folder", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_enlarged_as_in_diffusers(
    release: TinyRelease, tmp_path: Path, kind: str, is_folder: bool
) -> None:
    path, theirs = (
        tmp_path / "up scaler.safetensors",
        write_upscaler(tmp_path / "up scaler.safetensors", kind),
    )
    if is_folder:
        path = tmp_path / "latent_upsampler"
        theirs.save_pretrained(path)
    latents = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    vae = release.networks["vae"]
    mean, std = (one.view(1, -1, 1, 1, 1) for one in (vae.latents_mean, vae.latents_std))

    option = TEMPORAL if kind == "frames" else SPATIAL
    made = enlarge(latents, {option: path}, release.checkpoint, torch.float32)

    expected = (theirs(latents * std + mean) - mean) / std
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)  # float32, the same operations
    frames, side = read_scale_factors(path, option, 16)
    assert made.shape[2:] == ((3 - 1) * frames + 1, 4 * side, 6 * side)


def generate(release: TinyRelease, folder: Path, *words: object) -> dict[str, Tensor]:
    """Run the script; return the latents of the only video. PNG files of them are in `shown`."""
    size = ["--video_size", HEIGHT, WIDTH, "--video_length", FRAMES, "--infer_steps", STEPS, "--seed", SEED]
    said = ["--prompt", PROMPT, "--negative_prompt", NEGATIVE, *release.texts]
    command = [*release.words, *release.vaes, "--device", "cpu", *size, *words]
    made = ["--output_type", "latent", "--save_path", folder / "made"]
    ltx2_generate_video.main([str(word) for word in [*command, *said, *made]])
    (path,) = (folder / "made").glob("*.safetensors")
    shown = ["--latent_path", path, "--output_type", "images", "--save_path", folder / "shown"]
    ltx2_generate_video.main([str(word) for word in [*command, *shown]])
    return load_file(path)


def token_by_token(latents: Tensor, scale: Any, generator: torch.Generator) -> Tensor:
    """Mix noise in as diffusers does it for videos from texts, which have no first frame."""
    rows = latents.flatten(2).transpose(1, 2)
    noise = torch.randn(rows.shape, generator=generator).transpose(1, 2).unflatten(2, latents.shape[2:])
    return scale * noise + (1 - scale) * latents


@pytest.mark.slow_cases("an IC-LoRA in the first stage", "from an image", "twice the frames")
@pytest.mark.parametrize(
    ("release", "mode", "image", "strengths", "kinds"),
    [
        ("2.5", "av", False, (0.0, 1.0), ("rational",)),
        ("2.3", "v", False, (0.25, 0.5), ("plain", "frames")),
        ("2.3", "av", True, (0.0, 1.0), ("rational",)),
        ("2.3", "v", False, (0.75, 0.0), ("rational",)),
    ],
    indirect=["release"],
    ids=["with sound", "twice the frames", "from an image", "an IC-LoRA in the first stage"],
)
def test_two_stages_equal_those_of_diffusers(
    release: TinyRelease,
    tmp_path: Path,
    mode: str,
    image: bool,
    strengths: tuple[float, float],
    kinds: Sequence[str],
) -> None:
    networks = [write_upscaler(tmp_path / f"{kind}.safetensors", kind) for kind in kinds]
    is_reference = not strengths[1]
    lora = tmp_path / "distilled.safetensors"
    added = write_lora(lora, **({"reference_downscale_factor": "2"} if is_reference else {}))
    scales = GUIDED if mode == "av" else GUIDED | {"modality_scale": 1.0}
    words = ["--ltx2_mode", mode, "--sample_two_stage", "--stg_blocks", 1]
    if is_reference:
        words += ["--lora_weight", lora, "--lora_multiplier", strengths[0]]
    else:
        words += ["--distilled_lora_path", lora]
    for option, kind in zip((SPATIAL, TEMPORAL), kinds, strict=False):
        words += [option, tmp_path / f"{kind}.safetensors"]
    if not is_reference and strengths != (0.0, 1.0):
        words += ["--sample_stage1_distilled_lora_multiplier", strengths[0]]
        words += ["--sample_stage2_distilled_lora_multiplier", strengths[1]]
    if image:
        write_image(tmp_path / "start.png", WIDTH, HEIGHT)
        words += ["--image_path", tmp_path / "start.png", "--image_crf", 0]

    made = generate(release, tmp_path, *words, *scale_words(scales, AUDIO_SCALES))

    latents, audio, pipe = as_there(release, networks, mode, scales, strengths, added, tmp_path, image)
    vae = pipe.vae
    expected = pipe._normalize_latents(latents, vae.latents_mean, vae.latents_std)[0]
    assert_equal(made["latent"], expected, "latents")
    if mode == "av":
        assert_equal(made[AUDIO_LATENTS], audio[0], "sound of the first stage")
    pixels = (vae.decode(latents, None).sample[0].clamp(-1, 1) + 1) * 127.5
    frames = [torch.from_numpy(read_image(path)) for path in sorted((tmp_path / "shown").rglob("*.png"))]
    assert (torch.stack(frames).permute(3, 0, 1, 2) - pixels).abs().max() < 0.6  # as near as bytes can be


def as_there(
    release: TinyRelease,
    networks: Sequence[LTX2LatentUpsamplerModel],
    mode: str,
    scales: dict[str, float],
    strengths: tuple[float, float],
    added: dict[str, Tensor],
    folder: Path,
    image: bool,
) -> tuple[Tensor, Tensor, Any]:
    """Return latents without the model's norm, those of the sound with it, and the pipeline."""
    there, generator = release.networks, torch.Generator().manual_seed(SEED)

    def pipeline(strength: float) -> Any:
        state = {name: one + strength * added.get(name, 0.0) for name, one in there["state"].items()}
        parts = theirs(release).components
        version = there["version"]
        parts["transformer"] = dit_in_diffusers(version, state, config=dit_config(version))
        pipe = (LTX2ImageToVideoPipeline if image else type(theirs(release)))(**parts)
        pipe.set_progress_bar_config(disable=True)
        if mode == "v":
            pipe.transformer.register_forward_pre_hook(alone, with_kwargs=True)
        return pipe

    shared: dict[str, Any] = {
        **{"prompt": PROMPT, "negative_prompt": NEGATIVE},
        **{"return_dict": False, "output_type": "latent", "generator": generator},
    }
    first = pipeline(strengths[0])
    of_audio = {f"audio_{name}": scale for name, scale in AUDIO_SCALES.items()}
    small = {"height": HEIGHT // 2, "width": WIDTH // 2, "num_inference_steps": STEPS}
    growth = len(networks)  # of the frames
    small |= {"num_frames": (FRAMES - 1) // growth + 1, "frame_rate": 24 / growth}
    if image:
        small |= start_from(first, folder / "start.png", small)
    guided = {"spatio_temporal_guidance_blocks": [1], **scales, **of_audio}
    latents, heard = first(**shared, **small, **guided)
    packed = first._pack_audio_latents(heard)
    norms = first.audio_vae.latents_mean, first.audio_vae.latents_std
    audio = first._unpack_audio_latents(
        first._normalize_audio_latents(packed, *norms), heard.shape[2], heard.shape[3]
    )
    drawn_before = torch.empty(latents.shape)
    for network in networks:
        upsample = LTX2LatentUpsamplePipeline(first.vae, network)
        upsample.set_progress_bar_config(disable=True)
        asked = {"height": HEIGHT, "width": WIDTH, "output_type": "latent", "return_dict": False}
        (latents,) = upsample(latents=latents, **asked)
    second = pipeline(strengths[1])
    if mode == "v":  # there the noise of a sound is drawn in any case, before that of the second stage
        generator.manual_seed(SEED)
        drawn_before.normal_(generator=generator)
    second.scheduler = FlowMatchEulerDiscreteScheduler(shift_terminal=None, use_dynamic_shifting=False)
    plain = {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
    plain |= {f"audio_{name}": scale for name, scale in plain.items()}
    levels = STAGE_2_DISTILLED_SIGMA_VALUES
    large = {"height": HEIGHT, "width": WIDTH, "sigmas": levels, "noise_scale": levels[0]}
    large |= {"num_frames": FRAMES, "frame_rate": 24.0}
    if image:
        large |= start_from(second, folder / "start.png", large)
        pixels = image_pixels(folder / "start.png", WIDTH, HEIGHT)
        latents[:, :, :1] = second.vae.encode(pixels).latent_dist.mode()  # which the pipelines here omit
        mix = second._create_noised_state
        second._create_noised_state = lambda given, *more: (
            token_by_token(given, *more) if given.ndim == 5 else mix(given, *more)
        )
    large |= {"num_inference_steps": 3, **plain}
    made, _ = second(**shared, **large, latents=latents, audio_latents=heard)
    return made, audio, second


def start_from(pipe: Any, path: Path, size: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an image; guide and modulate as the release (see `test_family`), and make the
    image smaller as we do.
    """
    pipe.video_processor.preprocess = lambda *_, **__: image_pixels(path, size["width"], size["height"])[
        :, :, 0
    ]
    times: list[Tensor] = []

    def start(_: Any, __: Any, given: dict[str, Any]) -> None:
        times[:] = [given["sigma"]]

    def end(_: Any, __: Any, made: tuple[Tensor, Tensor]) -> None:
        made[0][:, : size["height"] * size["width"] // 32**2] = 0

    pipe.transformer.register_forward_pre_hook(start, with_kwargs=True)
    pipe.transformer.register_forward_hook(end)
    pipe.transformer.av_cross_attn_video_a2v_gate.register_forward_pre_hook(lambda *_: tuple(times))
    return {"image": Image.open(path), "image_crf": 0, "use_cross_timestep": False}


@pytest.mark.slow
def test_the_first_stage_alone_is_a_clip_of_its_size(release: TinyRelease, tmp_path: Path) -> None:
    write_upscaler(tmp_path / "up.safetensors", "three halves")
    words = [
        "--sample_two_stage",
        "--spatial-upsampler-path",
        tmp_path / "up.safetensors",
        "--ltx2_mode",
        "v",
    ]

    early = generate(release, tmp_path / "early", *words, "--skip-stage-2", "--video_size", 96, 192)
    small = generate(release, tmp_path / "small", "--ltx2_mode", "v", "--video_size", 64, 128)

    assert torch.equal(early["latent"], small["latent"])


def test_the_loras_of_one_stage_are_recorded_with_their_strength_in_it(tmp_path: Path) -> None:
    for name in ("up", "few", "ic"):
        (tmp_path / name).touch()
    options = Ltx2OfficialStages(
        sample_two_stage=True,
        spatial_upsampler_path=tmp_path / "up",
        distilled_lora=(str(tmp_path / "few"), "0.5"),
        first_loras=((tmp_path / "ic", 0.75),),
    )
    made = [two_stages(one) for one in (options, replace(options, skip_stage_2=True))]

    first = {"first_stage_loras": "ic 0.75"}
    said = [one.metadata for one in made if one is not None]
    assert said == [{**first, "second_stage_loras": "few 0.5"}, first]


@pytest.mark.slow
def test_two_stages_are_planned_compiled_and_previewed(
    release: TinyRelease, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan counts the upscaler; compiled blocks and previews change no bit."""
    write_upscaler(tmp_path / "up.safetensors", "rational")
    write_lora(lora := tmp_path / "distilled.safetensors")
    taehv = write_taehv(tmp_path / "tae.safetensors", TaehvConfig(16, (16, 12, 8, 8), (2, 2, 2), patch=4))
    words = ["--ltx2_mode", "av", "--sample_two_stage", SPATIAL, tmp_path / "up.safetensors"]
    words += ["--distilled_lora_path", lora]
    ways = {
        "plain": [],
        "compiled": ["--compile", "--compile_backend", "eager"],
        "previewed": ["--preview_latent_every", 1, "--preview_vae", taehv],
    }

    made = {name: generate(release, tmp_path / name, *words, *more) for name, more in ways.items()}
    planned = [*release.words, *release.texts, *words, "--prompt", "x", "--save_path", tmp_path / "planned"]
    planned += ["--video_size", HEIGHT, WIDTH, "--video_length", FRAMES, "--plan", "--device", "cpu"]
    ltx2_generate_video.main([str(word) for word in planned])

    assert type(upscaler("rational")).__name__ in capsys.readouterr().out
    assert not (tmp_path / "planned").exists()
    for name in made["plain"]:
        assert torch.equal(made["compiled"][name], made["plain"][name])
        assert torch.equal(made["previewed"][name], made["plain"][name])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sample_two_stage"], "pass --spatial_upsampler_path"),
        (["--sample_two_stage", SPATIAL, "frames"], "this upscaler is for --temporal_upsampler_path"),
        (["--sample_two_stage", TEMPORAL, "plain"], "this upscaler is for --spatial_upsampler_path"),
        (["--sample_two_stage", SPATIAL, "other"], "is not a latent upscaler of LTX-2; it looks like a LoRA"),
        (
            ["--sample_two_stage", SPATIAL, "plain", "--distilled_lora_path", "frames"],
            "is a latent upscaler. Pass it to --spatial_upsampler_path",
        ),
        (["--sample_two_stage", SPATIAL, "wide"], "takes 24 latent channels, the VAE makes 16"),
        (["--sample_two_stage", SPATIAL, "reduces"], "say a scale of 0.75; 1.5 is known"),
        (["--sample_two_stage", SPATIAL, "plain", "--video_size", "96", "192"], "must be multiples of 64"),
        (["--sample_two_stage", SPATIAL, "plain", "--drive_video", "clip"], "Pass one of them"),
        (["--sample_two_stage", SPATIAL, "plain", "--video_path", "clip"], "Omit one of them"),
        (
            ["--sample_two_stage", SPATIAL, "plain", "--distilled-lora", "a", "b"],
            "pass a file, and a strength",
        ),
        (["--sample_two_stage", SPATIAL, "plain", "--distilled-lora", "gone"], "gone: no such file"),
        (
            ["--sample_two_stage", SPATIAL, "plain", "--distilled-lora", "none"],
            "none: this word stands for no file, but is read as a path. Omit it",
        ),
        (
            ["--sample_two_stage", SPATIAL, "plain", "--lora_weight", "ic", "--lora_rounding", "nearest"],
            "is an IC-LoRA, which is not merged into the weights",
        ),
    ],
)
def test_what_cannot_be_made_is_one_message(
    release: TinyRelease, tmp_path: Path, words: list[str], message: str
) -> None:
    for kind in ("frames", "plain"):
        write_upscaler(tmp_path / kind, kind)
    save_file({"diffusion_model.a.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "other")
    wide = LTX2LatentUpsamplerModel(in_channels=24, mid_channels=32, num_blocks_per_stage=1)
    save_file(wide.state_dict(), tmp_path / "wide")
    less = LTX2LatentUpsamplerModel(16, 32, 1, rational_spatial_scale=0.75)
    save_file(less.state_dict(), tmp_path / "reduces", {"config": json.dumps({"spatial_scale": 0.75})})
    write_lora(tmp_path / "ic", reference_downscale_factor="2")
    write_clip(tmp_path / "clip")
    paths = [str(tmp_path / word) if (tmp_path / word).exists() else word for word in words]

    with pytest.raises(UserError, match=message):
        generate(release, tmp_path, "--ltx2_mode", "av", *paths)


def write_clip(folder: Path) -> None:
    folder.mkdir()
    for number, frame in enumerate(moving_square(FRAMES, WIDTH, HEIGHT, 1)):
        write_png(folder / f"{number:03d}.png", frame)


@pytest.mark.slow
def test_samples_of_a_training_are_made_in_two_stages(tmp_path: Path) -> None:
    """As the generation script makes them of what was trained; the training is the same without them."""
    project = write_project(tmp_path / "größe", batch_size=1, audios="a")
    write_upscaler(project.folder / "up.safetensors", "rational")
    write_lora(lora := project.folder / "distilled.safetensors")
    (project.folder / "prompts.txt").write_text("a cat --w 64 --h 64 --f 9 --s 2 --d 1\n", encoding="utf-8")
    stages = [
        "--sample_two_stage",
        "--spatial_upsampler_path",
        "up.safetensors",
        "--distilled_lora_path",
        lora,
    ]

    slow = ["--learning_rate", 1e-3]  # else the clip depends on the last digits of the weights
    project.train(*run("plain", 4), *slow)
    project.train(*run("lora", 4), *slow, *samples(project), *stages)
    (path,) = (project.folder / "out" / "sample").glob("lora*.mp4")
    command = [*project.release.words, "--ltx2_mode", "av", "--device", "cpu", *stages, "--prompt", "a cat"]
    command += ["--video_size", 64, 64, "--video_length", 9, "--infer_steps", 2, "--seed", 1]
    command += ["--gemma_root", project.release.gemma, "--lora_weight", "out/lora.safetensors"]
    for save, more in (("made", []), ("alone", ["--sample_stage2_distilled_lora_multiplier", 0])):
        succeed_here("ltx2_generate_video.py", *command, *more, "--save_path", save, folder=project.folder)

    paths = path, *(next((project.folder / save).glob("*.mp4")) for save in ("made", "alone"))
    ours, made, alone = (torch.tensor(numpy.stack([*video_frames(one)])).int() for one in paths)
    assert ours.shape == (9, 64, 64, 3)
    same, other = ((ours - one).abs().float().mean() for one in (made, alone))
    assert same < 3  # a sample has a bit rate, a clip a quality
    assert other > 1.5 * same
    plain, sampled = (load_file(project.folder / "out" / f"{name}.safetensors") for name in ("plain", "lora"))
    assert all(torch.equal(plain[name], sampled[name]) for name in plain)
