"""HunyuanVideo and SkyReels V1 through the command lines equal diffusers' pipelines at the same noise; in the
16 bits that users run, they are as near to float32 as the pipelines are.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import hv_generate_video
from modules.media.reading import read_image, video_frames
from modules.media.writing import write_png, write_video
from modules.seeds import derive_seed
from tests.faults.messages import succeed_here
from tests.parity.hunyuan import TEMPLATE, draw_noise, load_vae, pipeline
from tests.parity.reference import covering, to_pixels
from tests.parity.running import assert_as_exact, assert_equal
from tests.tiny.hunyuan import TinyHunyuan, write_tiny_hunyuan
from tests.tiny.project import CAPTIONS, moving_square, write_clips, write_dataset

PROMPT, NEGATIVE, SEED = "a small rabbit wakes up", "dull, blurry", 20
HEIGHT, WIDTH, FRAMES, STEPS = 32, 48, 9, 4
SIZE = ("--video_size", HEIGHT, WIDTH, "--video_length", FRAMES, "--infer_steps", STEPS)
SAY = (*SIZE, "--prompt", PROMPT, "--seed", SEED)
SCALE = 0.476986
ModelsOf = Callable[[str], TinyHunyuan]


@pytest.fixture(scope="module")
def models_of(tmp_path_factory: pytest.TempPathFactory) -> ModelsOf:
    made: dict[str, TinyHunyuan] = {}

    def models(kind: str) -> TinyHunyuan:
        if kind not in made:
            made[kind] = write_tiny_hunyuan(tmp_path_factory.mktemp(f"models of {kind}"), kind)
        return made[kind]

    return models


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media") / "start.png"
    write_png(path, numpy.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=numpy.uint8))
    return path


def generate(folder: Path, files: TinyHunyuan, *arguments: object) -> Tensor:
    """The latents that hv_generate_video.py leaves, 1 16 F h w."""
    options = ["--dit", files.dit, "--vae", files.vae, "--text_encoder1", files.text_encoder1]
    options += ["--text_encoder2", files.text_encoder2, "--output_type", "latent", "--device", "cpu"]
    words = [*options, "--save_path", folder / "made", *SAY, *arguments]
    hv_generate_video.main([str(word) for word in words])
    (path,) = (folder / "made").glob("*_latent.safetensors")
    return load_file(path)["latent"][None]


def run(pipe: Any, frames: int = FRAMES, **settings: Any) -> Tensor:
    """The latents of diffusers' pipeline, 1 16 F h w."""
    asked = {"prompt": PROMPT, "prompt_template": TEMPLATE, "height": HEIGHT, "width": WIDTH}
    asked |= {"num_frames": frames, "latents": draw_noise(SEED, frames, HEIGHT, WIDTH)}
    asked |= {"num_inference_steps": STEPS, "guidance_scale": 6.0, "output_type": "latent"}
    return pipe(**{**asked, **settings}).frames


def with_diffusers(
    files: TinyHunyuan, shift: float = 7.0, image: Any = None, for_clip: str = "", **settings: Any
) -> Tensor:
    """The same of its networks in float32.

    for_clip: a second prompt, which the pipeline takes and does not look at.
    """
    pipe = pipeline(files.dit.parent, shift, image=image is not None)
    if image is not None:
        generator = torch.Generator().manual_seed(derive_seed("posterior", SEED))
        settings |= {"image": image, "generator": generator}
    if for_clip:
        settings["pooled_prompt_embeds"] = pipe._get_clip_prompt_embeds(for_clip)
    return run(pipe, **settings)


GUIDED = {"negative_prompt": NEGATIVE, "true_cfg_scale": 3.0}
GUIDE = ("--guidance_scale", 3, "--negative_prompt", NEGATIVE)
CASES: dict[str, tuple[str, tuple[object, ...], dict[str, Any]]] = {
    "embedded guidance": ("t2v", ("--embedded_cfg_scale", 1), {"guidance_scale": 1.0}),
    "shift": ("t2v", ("--flow_shift", 14.5), {"shift": 14.5}),
    "guidance, split": ("t2v", (*GUIDE, "--split_uncond"), GUIDED),
    "guidance, nothing to avoid": ("t2v", ("--guidance_scale", 3), {**GUIDED, "negative_prompt": ""}),
    "a text for CLIP": ("t2v", ("--prompt_2", "a dog"), {"for_clip": "a dog"}),
    "still image": ("t2v", ("--video_length", 1), {"frames": 1}),
    "undistilled": ("undistilled", GUIDE, GUIDED),
    "noise of the CPU": ("t2v", ("--cpu_noise",), {}),
}


@pytest.mark.slow_cases("guidance, nothing to avoid", "guidance, split", "noise of the CPU", "shift")
@pytest.mark.parametrize("name", CASES)
def test_latents_equal_those_of_the_pipeline(tmp_path: Path, models_of: ModelsOf, name: str) -> None:
    kind, options, settings = CASES[name]

    latents = generate(tmp_path, models_of(kind), *options)

    assert_equal(latents, with_diffusers(models_of(kind), **settings), name)


def test_image_to_video_equals_skyreels_pipeline(tmp_path: Path, models_of: ModelsOf, picture: Path) -> None:
    files = models_of("i2v")

    latents = generate(tmp_path, files, *GUIDE, "--embedded_cfg_scale", 1, "--image_path", picture)

    expected = with_diffusers(files, image=Image.open(picture), guidance_scale=1.0, **GUIDED)
    assert_equal(latents, expected, "SkyReels I2V")


@torch.no_grad()
def from_video(files: TinyHunyuan, video: Path, kept: int) -> Tensor:
    """Video-to-video with the pipeline's networks and scheduler: the last `kept` steps (features.md, section
    2.5).
    """
    pipe = pipeline(files.dit.parent, 7.0)
    text, pooled, mask = pipe.encode_prompt(PROMPT, prompt_template=TEMPLATE)
    pixels = to_pixels(list(video_frames(video))[:FRAMES])
    posterior = pipe.vae.encode(pixels).latent_dist
    clean = posterior.sample(torch.Generator().manual_seed(derive_seed("posterior", SEED))) * SCALE
    pipe.scheduler.set_timesteps(sigmas=numpy.linspace(1, 0, STEPS + 1)[:-1])
    begin = STEPS - kept
    sigma = pipe.scheduler.timesteps[begin] / 1000
    latents = sigma * draw_noise(SEED, FRAMES, HEIGHT, WIDTH) + (1 - sigma) * clean
    pipe.scheduler.set_begin_index(begin)
    for timestep in pipe.scheduler.timesteps[begin:]:
        guidance = torch.tensor([6000.0])
        given = (latents, timestep[None], text, mask, pooled, guidance)
        velocity = pipe.transformer(*given, return_dict=False)[0]
        latents = pipe.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    write_video(path, moving_square(12, WIDTH, HEIGHT, 3), fps=24)
    return path


@pytest.mark.parametrize(("strength", "kept"), [(0.8, 3), (0.0, 1)])
def test_video_to_video_makes_the_last_steps(
    tmp_path: Path, models_of: ModelsOf, video: Path, strength: float, kept: int
) -> None:
    files = models_of("t2v")

    latents = generate(tmp_path, files, "--video_path", video, "--strength", strength)

    assert_equal(latents, from_video(files, video, kept), f"strength {strength}")


def test_te_multiplier_acts_on_the_refiner_and_the_mean_text(tmp_path: Path, models_of: ModelsOf) -> None:
    files = models_of("t2v")
    pipe = pipeline(files.dit.parent, 7.0)
    embedder = pipe.transformer.context_embedder
    for block in embedder.token_refiner.refiner_blocks:
        block.register_forward_hook(lambda module, inputs, output: output * 1.3)
    embedder.time_text_embed.text_embedder.register_forward_hook(lambda module, inputs, output: output * 0.7)
    expected = run(pipe)

    latents = generate(tmp_path, files, "--te_multiplier", 1.3, 0.7)

    assert_equal(latents, expected, "te_multiplier")


@pytest.mark.slow
@torch.no_grad()
def test_in_bfloat16_it_is_as_exact_as_diffusers(tmp_path: Path) -> None:
    """Measured: ours 3.5e-3 from float32 and theirs 6e-3. Encoders are float16."""
    files = write_tiny_hunyuan(tmp_path / "models", dtype=torch.bfloat16)

    latents = generate(tmp_path, files)

    def expected(dit_dtype: torch.dtype, encoder_dtype: torch.dtype) -> Tensor:
        pipe = pipeline(files.dit.parent, 7.0, dit_dtype=dit_dtype, encoder_dtype=encoder_dtype)
        pipe.transformer.register_forward_pre_hook(rounded_numbers, with_kwargs=True)
        return run(pipe)

    theirs, exact = expected(torch.bfloat16, torch.float16), expected(torch.float32, torch.float32)
    assert_as_exact(latents, theirs, exact, "HunyuanVideo")


def rounded_numbers(_: object, inputs: tuple[object, ...], given: dict[str, Any]) -> Any:
    """Timestep and guidance as the released code rounds them; diffusers' pipeline feeds timesteps as they
    are. That is no error but what a model is fed, and a model fed other numbers is off by a third.
    """
    numbers = {name: given[name].bfloat16().float() for name in ("timestep", "guidance")}
    return inputs, given | numbers


def test_decoded_pictures_equal_those_of_the_pipeline(tmp_path: Path, models_of: ModelsOf) -> None:
    """In tiles: the video is larger than a tile, as most are."""
    files = models_of("t2v")
    more = ("--video_size", 64, 48, "--video_length", 1, "--vae_spatial_tile_sample_min_size", 32)

    latents = generate(tmp_path, files, *more, "--output_type", "both")

    vae = load_vae(files.vae)
    vae.enable_tiling(32, 32, tile_sample_stride_height=24, tile_sample_stride_width=24)
    with torch.no_grad():
        pixels = vae.decode(latents / SCALE).sample.clamp(-1, 1)
    (png,) = (tmp_path / "made").glob("*.png")
    assert torch.allclose(to_pixels([read_image(png)]), pixels, atol=1.01 / 127.5)


# caches


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and the caches of two clips, image-to-video, in float32."""
    folder = tmp_path_factory.mktemp("a dataset")
    files = write_tiny_hunyuan(folder / "models")
    write_clips(folder / "clips", count=2)
    write_dataset(folder, frames="5")
    texts = (
        *("--text_encoder1", files.text_encoder1, "--text_encoder2", files.text_encoder2),
        *("--text_encoder_dtype", "float32"),
    )
    config = ("--dataset_config", folder / "dataset.toml")
    vae = ("--vae", files.vae, "--vae_dtype", "float32")
    succeed_here("cache_latents.py", *config, *vae, "--i2v", folder=folder)
    succeed_here("cache_text_encoder_outputs.py", *config, *texts, folder=folder)
    return folder


@torch.no_grad()
def test_cached_latents_are_samples_of_diffusers_posterior(cached: Path) -> None:
    """Not multiplied by the scaling factor; drawn from a generator that the item's name seeds."""
    stem = "clip 1_00000-005_0032x0032_hv"
    frames = [covering(frame, 32, 32) for frame in list(video_frames(cached / "clips" / "clip 1.mp4"))[:5]]
    vae, generator = (
        load_vae(cached / "models" / "vae.safetensors"),
        torch.Generator().manual_seed(derive_seed("posterior", stem)),
    )

    tensors = load_file(cached / "cache" / f"{stem}.safetensors")

    assert tensors.keys() == {"latents_2x4x4_float32", "latents_image_1x4x4_float32"}
    pixels = to_pixels(frames)
    assert_equal(
        tensors["latents_2x4x4_float32"], vae.encode(pixels).latent_dist.sample(generator)[0], "latents"
    )
    assert_equal(
        tensors["latents_image_1x4x4_float32"],
        vae.encode(pixels[:, :, :1]).latent_dist.sample(generator)[0],
        "image",
    )


@torch.no_grad()
def test_without_a_dtype_caches_are_float16_as_exact_as_the_pipelines(cached: Path) -> None:
    stem, models = "clip 0_00000-005_0032x0032_hv", cached / "models"
    config = (cached / "dataset.toml").read_text(encoding="utf-8").replace("/cache", "/cache in float16")
    (cached / "half.toml").write_text(config, encoding="utf-8")
    texts = ("--text_encoder1", models / "text_encoder", "--text_encoder2", models / "text_encoder_2")
    say = ("--dataset_config", "half.toml", "--device", "cpu")

    succeed_here("cache_latents.py", *say, "--vae", models / "vae.safetensors", folder=cached)
    succeed_here("cache_text_encoder_outputs.py", *say, *texts, folder=cached)

    (latents,) = load_file(cached / "cache in float16" / f"{stem}.safetensors").values()
    # compared with diffusers above
    exact = load_file(cached / "cache" / f"{stem}.safetensors")["latents_2x4x4_float32"]
    frames = [covering(frame, 32, 32) for frame in list(video_frames(cached / "clips" / "clip 0.mp4"))[:5]]
    posterior = load_vae(models / "vae.safetensors").half().encode(to_pixels(frames).half()).latent_dist
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(derive_seed("posterior", stem)))
    assert latents.dtype == torch.float16
    assert_as_exact(
        latents, posterior.mean[0].float() + posterior.std[0].float() * noise, exact, "latents in float16"
    )
    tensors = load_file(cached / "cache in float16" / "clip 0_hv_te.safetensors")
    text, pooled, mask = pipeline(models, 7.0, encoder_dtype=torch.float16).encode_prompt(
        CAPTIONS[0], prompt_template=TEMPLATE
    )
    real = int(mask.sum())
    assert torch.equal(tensors["llm_float16"][:real], text[0, :real])
    assert torch.equal(tensors["clipL_float16"], pooled[0])


@torch.no_grad()
def test_cached_texts_are_the_pipelines(cached: Path) -> None:
    text, pooled, mask = pipeline(cached / "models", 7.0).encode_prompt(CAPTIONS[1], prompt_template=TEMPLATE)

    tensors = load_file(cached / "cache" / "clip 1_hv_te.safetensors")

    assert tensors.keys() == {"llm_float32", "llm_mask", "clipL_float32", "clipL_mask"}
    real = int(mask.sum())
    assert torch.equal(tensors["llm_mask"], mask[0].to(torch.int64))
    assert_equal(tensors["llm_float32"][:real], text[0, :real], "llm")
    assert_equal(tensors["clipL_float32"], pooled[0], "clipL")
