"""Clips in two stages equal those of diffusers: its upscaler's network, and its pipelines one after the other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2ImageToVideoPipeline, LTX2LatentUpsamplePipeline
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from diffusers.pipelines.ltx2.utils import STAGE_2_DISTILLED_SIGMA_VALUES
from safetensors.torch import load_file, save_file
from torch import Tensor

import ltx2_generate_video
from ltx_2.upscaler import SPATIAL, TEMPORAL, enlarge, factors
from modules.contract.data import SOUND
from modules.errors import CheckpointError, OptionError
from modules.media.pixels import image_pixels
from modules.media.reading import read_image
from tests.ltx_2.release import TinyRelease, dit_config, write_release
from tests.ltx_2.test_family import GUIDED, NEGATIVE, OF_SOUND, PROMPT, SEED, alone, scale_words, theirs
from tests.ltx_2.tiny_dit import dit_in_diffusers
from tests.parity.running import assert_equal
from tests.tiny.project import write_image

HEIGHT, WIDTH, FRAMES, STEPS, RANK = 128, 192, 17, 3, 4
CPU = torch.device("cpu")
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"use_rational_resampler": False},
    "rational": {},
    "three halves": {"rational_spatial_scale": 1.5},
    "four times": {"rational_spatial_scale": 4.0},
    "in two dimensions": {"dims": 2},
    "frames": {"spatial_upsample": False, "temporal_upsample": True},
    "both": {"temporal_upsample": True},
}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> TinyRelease:
    return write_release(tmp_path_factory.mktemp("größe"))


def upscaler(kind: str) -> LTX2LatentUpsamplerModel:
    with torch.random.fork_rng():
        torch.manual_seed(8)
        made = LTX2LatentUpsamplerModel(in_channels=16, mid_channels=32, num_blocks_per_stage=2, **KINDS[kind])
        for parameter in made.parameters():
            parameter.data.add_(0.05 * torch.randn(parameter.shape))
    return made.eval().requires_grad_(False)


def write_upscaler(path: Path, kind: str) -> LTX2LatentUpsamplerModel:
    """Write an official file: diffusers' names, the settings in its metadata under the official names."""
    made = upscaler(kind)
    config = {"spatial_scale": made.config.rational_spatial_scale, "dims": made.config.dims}
    save_file({**made.state_dict()}, path, {"config": json.dumps(config)})
    return made


@pytest.mark.parametrize("is_folder", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_enlarged_as_in_diffusers(
    release: TinyRelease, tmp_path: Path, kind: str, is_folder: bool
) -> None:
    path, theirs = tmp_path / "up scaler.safetensors", write_upscaler(tmp_path / "up scaler.safetensors", kind)
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
    frames, side = factors(path, option, 16)
    assert made.shape[2:] == ((3 - 1) * frames + 1, 4 * side, 6 * side)


def write_lora(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Write a LoRA as it is released, for attention of both streams; also return what it adds to weights."""
    config, generator = dit_config("2.3"), torch.Generator().manual_seed(9)
    assert config.sound is not None
    tensors, added = {}, {}
    for block in range(config.num_layers):
        for name, width in (("attn1", config.video.dim), ("audio_attn1", config.sound.dim)):
            layer = f"transformer_blocks.{block}.{name}.to_q"
            down, up = (torch.randn(shape, generator=generator) for shape in ((RANK, width), (width, RANK)))
            tensors[f"diffusion_model.{layer}.lora_A.weight"] = down
            tensors[f"diffusion_model.{layer}.lora_B.weight"] = up
            added[f"{layer}.weight"] = up @ down
    save_file(tensors, folder / "distilled.safetensors")
    return folder / "distilled.safetensors", added


def generate(release: TinyRelease, folder: Path, *words: object) -> dict[str, Tensor]:
    """Run the script; return the latents of the only video. PNG files of them are in `shown`."""
    size = ["--video_size", HEIGHT, WIDTH, "--video_length", FRAMES, "--infer_steps", STEPS, "--seed", SEED]
    said = ["--prompt", PROMPT, "--negative_prompt", NEGATIVE, "--gemma_root", release.gemma]
    command = [*release.words, "--device", "cpu", *words]
    made = ["--output_type", "latent", "--save_path", folder / "made"]
    ltx2_generate_video.main([str(word) for word in [*command, *size, *said, *made]])
    (path,) = (folder / "made").iterdir()
    shown = ["--latent_path", path, "--output_type", "images", "--save_path", folder / "shown"]
    ltx2_generate_video.main([str(word) for word in [*command, *shown]])
    return load_file(path)


def token_by_token(latents: Tensor, scale: Any, generator: torch.Generator) -> Tensor:
    """Mix noise in as diffusers does it for videos from texts, which have no first frame."""
    rows = latents.flatten(2).transpose(1, 2)
    noise = torch.randn(rows.shape, generator=generator).transpose(1, 2).unflatten(2, latents.shape[2:])
    return scale * noise + (1 - scale) * latents


@pytest.mark.parametrize(
    ("mode", "image", "strengths"),
    [("av", False, (0.0, 1.0)), ("v", False, (0.25, 0.5)), ("av", True, (0.0, 1.0))],
    ids=["with sound", "video alone", "from an image"],
)
def test_two_stages_equal_those_of_diffusers(
    release: TinyRelease, tmp_path: Path, mode: str, image: bool, strengths: tuple[float, float]
) -> None:
    network = write_upscaler(tmp_path / "spatial.safetensors", "rational")
    lora, added = write_lora(tmp_path)
    scales = GUIDED if mode == "av" else GUIDED | {"modality_scale": 1.0}
    words = ["--ltx2_mode", mode, "--sample_two_stage", "--distilled_lora_path", lora]
    words += ["--spatial_upsampler_path", tmp_path / "spatial.safetensors", "--stg_blocks", 1]
    if strengths != (0.0, 1.0):
        words += ["--sample_stage1_distilled_lora_multiplier", strengths[0]]
        words += ["--sample_stage2_distilled_lora_multiplier", strengths[1]]
    if image:
        write_image(tmp_path / "start.png", WIDTH, HEIGHT)
        words += ["--image_path", tmp_path / "start.png", "--image_crf", 0]

    made = generate(release, tmp_path, *words, *scale_words(scales, OF_SOUND))

    latents, sound, pipe = as_there(release, network, mode, scales, strengths, added, tmp_path, image)
    vae = pipe.vae
    expected = pipe._normalize_latents(latents, vae.latents_mean, vae.latents_std)[0]
    assert_equal(made["latent"], expected, "latents")
    if mode == "av":
        assert_equal(made[SOUND], sound[0], "sound of the first stage")
    pixels = (vae.decode(latents, None).sample[0].clamp(-1, 1) + 1) * 127.5
    frames = [torch.from_numpy(read_image(path)) for path in sorted((tmp_path / "shown").rglob("*.png"))]
    assert (torch.stack(frames).permute(3, 0, 1, 2) - pixels).abs().max() < 0.6  # as near as bytes can be


def as_there(
    release: TinyRelease,
    network: LTX2LatentUpsamplerModel,
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
        parts["transformer"] = dit_in_diffusers("2.3", state, config=dit_config("2.3"))
        pipe = (LTX2ImageToVideoPipeline if image else type(theirs(release)))(**parts)
        pipe.set_progress_bar_config(disable=True)
        if mode == "v":
            pipe.transformer.register_forward_pre_hook(alone, with_kwargs=True)
        return pipe

    shared: dict[str, Any] = {
        **{"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_frames": FRAMES, "frame_rate": 24.0},
        **{"return_dict": False, "output_type": "latent", "generator": generator},
    }
    first = pipeline(strengths[0])
    of_sound = {f"audio_{name}": scale for name, scale in OF_SOUND.items()}
    small = {"height": HEIGHT // 2, "width": WIDTH // 2, "num_inference_steps": STEPS}
    if image:
        small |= start_from(first, folder / "start.png", small)
    guided = {"spatio_temporal_guidance_blocks": [1], **scales, **of_sound}
    latents, heard = first(**shared, **small, **guided)
    packed = first._pack_audio_latents(heard)
    norms = first.audio_vae.latents_mean, first.audio_vae.latents_std
    sound = first._unpack_audio_latents(
        first._normalize_audio_latents(packed, *norms), heard.shape[2], heard.shape[3]
    )
    upsample = LTX2LatentUpsamplePipeline(first.vae, network)
    upsample.set_progress_bar_config(disable=True)
    (latents,) = upsample(latents=latents, height=HEIGHT, width=WIDTH, output_type="latent", return_dict=False)
    second = pipeline(strengths[1])
    second.scheduler = FlowMatchEulerDiscreteScheduler(shift_terminal=None, use_dynamic_shifting=False)
    plain = {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
    plain |= {f"audio_{name}": scale for name, scale in plain.items()}
    levels = STAGE_2_DISTILLED_SIGMA_VALUES
    large = {"height": HEIGHT, "width": WIDTH, "sigmas": levels, "noise_scale": levels[0]}
    if image:
        large |= start_from(second, folder / "start.png", large)
        pixels = image_pixels(folder / "start.png", WIDTH, HEIGHT)
        latents[:, :, :1] = second.vae.encode(pixels).latent_dist.mode()  # which the pipelines here leave out
        mix = second._create_noised_state
        second._create_noised_state = lambda given, *more: (
            token_by_token(given, *more) if given.ndim == 5 else mix(given, *more)
        )
    large |= {"num_inference_steps": 3, **plain}
    made, _ = second(**shared, **large, latents=latents, audio_latents=heard)
    return made, sound, second


def start_from(pipe: Any, path: Path, size: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an image, and guide and modulate as the release: see `test_family`."""
    from PIL import Image

    times: list[Tensor] = []

    def start(_: Any, __: Any, given: dict[str, Any]) -> None:
        times[:] = [given["sigma"]]

    def end(_: Any, __: Any, made: tuple[Tensor, Tensor]) -> None:
        made[0][:, : size["height"] * size["width"] // 32**2] = 0

    pipe.transformer.register_forward_pre_hook(start, with_kwargs=True)
    pipe.transformer.register_forward_hook(end)
    pipe.transformer.av_cross_attn_video_a2v_gate.register_forward_pre_hook(lambda *_: tuple(times))
    return {"image": Image.open(path), "image_crf": 0, "use_cross_timestep": False}
