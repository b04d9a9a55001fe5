"""Guidance by CLIP and VGG16 against a plain loop of others' parts; pictures in place of a pooled state."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from encoders.clip_layers import MEAN, STD, load_clip_vision
from modules.errors import CheckpointError, DownloadError
from stable_diffusion.assembling import assemble
from stable_diffusion.contract import ImageSettings, Model, RequestedImage, TextState
from stable_diffusion.guiding import check_guides, load_vgg16
from stable_diffusion.making import ImageGenerator
from stable_diffusion.network_options import GuideOptions
from stable_diffusion.options import read_gen_img
from stable_diffusion.sampling_options import DeepShrinkOptions, GradualLatentOptions
from stable_diffusion.text import FOLDER, ImageVectors, find_image_encoder
from tests.encoders.test_clip import noise, write_tower
from tests.parity import stable_diffusion
from tests.stable_diffusion.loaded import make_images, make_towers
from tests.tiny.guides import VGG_LEVELS, vgg_state, write_clip, write_vgg16
from tests.tiny.stable_diffusion import TEXT_DIM, tokenizer_folder, write_sdxl

SIZE, STEPS, SCALE = 32, 2, 3.0
SCALES = {"clip_guidance_scale": 30.0, "clip_image_guidance_scale": 20.0, "vgg16_guidance_scale": 10.0}
SETTINGS = ImageSettings(SIZE, SIZE, STEPS, SCALE)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Project:
    """Tiny networks: ours are loaded from their files, these are others' of the same weights."""

    folder: Path
    files: stable_diffusion.Files
    clip: Any

    @cached_property
    def unet(self) -> Any:
        return UNet2DConditionModel.from_pretrained(self.files.folder / "unet")

    @cached_property
    def vae(self) -> Any:
        return AutoencoderKL.from_pretrained(self.files.folder / "vae")

    @property
    def guide(self) -> Path:
        return self.folder / "guide.png"

    def load(self, *words: str) -> ImageGenerator:
        """With all three guides."""
        scales = [word for name, scale in SCALES.items() for word in (f"--{name}", str(scale))]
        files = ["--clip_guidance_model", self.folder / "clip", "--guide_image_path", self.guide]
        files += ["--vgg16_guidance_model", self.folder / "vgg16.pth", "--prompt", "x"]
        made = assemble(read_gen_img(None, [*self.files.options, *scales, *map(str, files), *words]), CPU)
        assert isinstance(made, ImageGenerator)
        return made


def project(kind: str, folder: Path) -> Project:
    stable_diffusion.write_image(folder / "guide.png", (SIZE, SIZE), 3)
    write_vgg16(folder / "vgg16.pth")
    return Project(folder, stable_diffusion.write_files(kind, folder), write_clip(folder / "clip"))


def test_without_their_options_the_networks_come_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, vgg = "laion--CLIP-ViT-B-32-laion2B-s34B-b79K", "timm--vgg16.tv_in1k"
    found = {name: tmp_path / f"models--{name}" / "snapshots" / "1" for name in (clip, vgg)}
    for folder in found.values():
        (folder.parents[1] / "refs").mkdir(parents=True)
        (folder.parents[1] / "refs" / "main").write_text("1", encoding="utf-8")
    write_clip(found[clip])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    options = GuideOptions(clip_guidance_scale=1.0, vgg16_guidance_scale=1.0)
    with pytest.raises(DownloadError, match=r"--vgg16_guidance_model timm/vgg16\.tv_in1k: there is no such"):
        check_guides(options)
    write_vgg16(found[vgg] / "model.safetensors")

    guides = check_guides(options)

    assert guides.clip_guidance_model == found[clip]
    assert guides.vgg16_guidance_model == found[vgg] / "model.safetensors"


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return project("sd1", tmp_path_factory.mktemp("sd1"))


def picture(guide: Path | None = None, **others: Any) -> RequestedImage:
    given = {"prompt": "a (red:1.5) cat", "settings": SETTINGS, **others}
    guides = () if guide is None else (guide,)
    return RequestedImage("line 1", negative_prompt="ugly", seed=5, raw_prompt="", guides=guides, **given)


def vgg_features(pixels: Tensor, last: int) -> Tensor:
    """torchvision's VGG16, whose layers have these numbers."""
    layers: list[nn.Module] = []
    channels = 3
    for level in VGG_LEVELS:
        for width in level:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    network = nn.Sequential(*layers)
    state = {name.removeprefix("features."): one for name, one in vgg_state().items() if "features" in name}
    network.load_state_dict(state)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return network[: last + 1]((pixels - mean[:, None, None]) / std[:, None, None])


def loss_of(project: Project, maker: ImageGenerator, pixels: Tensor, text: str, guide: Image.Image) -> Tensor:
    """All three losses. pixels: 1 3 H W, in 0..1; the picture is square, so nothing is cut off for CLIP."""
    clip, tower = project.clip, maker.model.text_encoders[0]
    ids = torch.tensor([[tower.bos_token_id, *tower.tokenize(text), tower.eos_token_id]])
    theirs = torch.tensor(np.asarray(guide)).permute(2, 0, 1)[None] / 255

    def seen(image: Tensor) -> Tensor:
        small = F.interpolate(image, (28, 28), mode="bicubic", antialias=True).clamp(0, 1)
        pixel_values = (small - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        vector = clip.visual_projection(clip.vision_model(pixel_values).pooler_output)
        return vector / vector.norm()

    words = clip.text_projection(clip.text_model(ids).pooler_output)
    with torch.no_grad():
        processed = load_clip_vision(project.folder / "clip", CPU, torch.float32, "", "").encode([guide])
        torch.testing.assert_close(seen(theirs), processed / processed.norm(), atol=0.02, rtol=0)
    total = torch.zeros(())
    for target, scale in (
        (words / words.norm(), SCALES["clip_guidance_scale"]),
        (processed / processed.norm(), SCALES["clip_image_guidance_scale"]),
    ):
        angle = torch.arccos((seen(pixels) * target).sum())
        total = total + scale * angle**2 / 2
    difference = vgg_features(pixels, 20) - vgg_features(theirs, 20)
    return total + SCALES["vgg16_guidance_scale"] * difference.pow(2).mean()


def follow(
    project: Project, maker: ImageGenerator, scheduler: Any, latents: Tensor, text: str = "a red cat"
) -> Tensor:
    """The loop in plain code, as it is written down in the papers."""
    guide = Image.open(project.guide).convert("RGB")
    positive, negative = (
        maker.prompt_encoder.encode(each).context[None] for each in ("a (red:1.5) cat", "ugly")
    )
    for timestep in scheduler.timesteps:
        share = scheduler.alphas_cumprod[int(timestep)]
        sample = scheduler.scale_model_input(latents, timestep).detach().requires_grad_()
        prompted = project.unet(sample, timestep, positive).sample
        with torch.no_grad():
            avoided = project.unet(sample, timestep, negative).sample
        if scheduler.config.prediction_type == "v_prediction":
            clean = share.sqrt() * sample - (1 - share).sqrt() * prompted
        else:
            clean = (sample - (1 - share).sqrt() * prompted) / share.sqrt()
        mixed = (1 - share).sqrt() * clean + (1 - (1 - share).sqrt()) * sample
        pixels = (project.vae.decode(mixed / 0.18215).sample / 2 + 0.5).clamp(0, 1)
        (gradient,) = torch.autograd.grad(loss_of(project, maker, pixels, text, guide), sample)
        said = (avoided + SCALE * (prompted - avoided)).detach()
        if scheduler.config.prediction_type == "v_prediction":
            noise = share.sqrt() * said + (1 - share).sqrt() * sample.detach()
            steered = noise + (1 - share).sqrt() * gradient
            said = (steered - (1 - share).sqrt() * sample.detach()) / share.sqrt()
        else:
            said = said + (1 - share).sqrt() * gradient
        draws = {"generator": scheduler.drawn_from} if hasattr(scheduler, "drawn_from") else {}
        latents = scheduler.step(said, timestep, latents, **draws).prev_sample
    return latents


def begin(sampler: str, velocity: bool = False) -> tuple[Any, Tensor]:
    """A scheduler, and its start noise."""
    scheduler = stable_diffusion.their_scheduler(sampler, velocity)
    scheduler.set_timesteps(STEPS)
    (generator,) = stable_diffusion.generators(5)
    noise = torch.randn((1, 4, SIZE // 8, SIZE // 8), generator=generator)
    if sampler == "dpm_2_a":
        scheduler.drawn_from = generator
    return scheduler, noise * scheduler.init_noise_sigma


def latents_of(maker: ImageGenerator, asked: RequestedImage) -> Tensor:
    return maker.make([asked], wants_images=False).latents


def assert_same(made: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(made, wanted, rtol=0, atol=2e-3 * float(wanted.abs().max()))


@pytest.fixture(scope="module")
def maker(sd1: Project) -> ImageGenerator:
    return sd1.load()


@pytest.mark.slow_cases("dpm_2_a")
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpm_2_a", "dpmsolver++"])
def test_pictures_are_those_of_a_plain_loop(sd1: Project, maker: ImageGenerator, sampler: str) -> None:
    maker = replace(maker, sampling=replace(maker.sampling, sampler=sampler))
    made = latents_of(maker, picture(sd1.guide))
    plain = latents_of(replace(maker, guides=None), picture())

    assert_same(made, follow(sd1, maker, *begin(sampler)))
    assert (made - plain).abs().max() > 0.05 * plain.abs().max()


def test_models_that_predict_v_are_steered_alike(tmp_path: Path) -> None:
    sd2 = project("sd2", tmp_path)
    maker = sd2.load("--v_parameterization")

    assert_same(latents_of(maker, picture(sd2.guide)), follow(sd2, maker, *begin("ddim", velocity=True)))
    snr = replace(maker, sampling=replace(maker.sampling, zero_terminal_snr=True))
    assert latents_of(snr, picture(sd2.guide)).abs().max() < 10  # its first sample is noise alone


def test_clip_reads_another_text(sd1: Project, maker: ImageGenerator) -> None:
    made = latents_of(maker, picture(sd1.guide, clip_prompt="the old house"))

    assert_same(made, follow(sd1, maker, *begin("ddim"), text="the old house"))


@pytest.mark.parametrize(
    "changes",
    [
        {"deep_shrink": DeepShrinkOptions(ds_depth_1=1, ds_timesteps_1=0), "width": 64, "height": 64},
        {"parts": 2},
        {"scale": 1.0},
        {"negative_scale": 1.5},
        {
            "gradual_latent": GradualLatentOptions(
                gradual_latent_timesteps=990, gradual_latent_ratio_step=0.5, gradual_latent_every_n_steps=1
            ),
            "width": 128,
            "height": 128,
        },
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_the_unet_can_be_steered(
    sd1: Project, maker: ImageGenerator, changes: dict[str, Any]
) -> None:
    asked = picture(sd1.guide, settings=replace(SETTINGS, **changes), prompt="a cat AND a dog")
    if "gradual_latent" in changes:
        maker = replace(maker, sampling=replace(maker.sampling, sampler="euler_a"))
    made = latents_of(maker, asked)

    assert made.isfinite().all()
    assert (made - latents_of(replace(maker, guides=None), asked)).abs().max() > 1e-2


@pytest.mark.parametrize("last", [1, 4, 20, 30])
def test_layers_of_vgg16_are_those_of_torchvision(sd1: Project, last: int) -> None:
    pixels = torch.rand((2, 3, 40, 33), generator=torch.Generator().manual_seed(1))
    network = load_vgg16(sd1.folder / "vgg16.pth", last, CPU, torch.float32)
    torch.testing.assert_close(network(pixels), vgg_features(pixels, last).detach())


def make_model(kind: str, path: Path) -> Model:
    """A model of which only the text encoders are there."""
    towers, sort = make_towers(kind)
    return Model(sort, path, None, None, towers, False, False, CPU, torch.float32, torch.float32)


def test_the_image_encoder_is_found_with_the_tokenizers_then_beside_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "models" / "sdxl.safetensors"
    beside, _ = write_tower(tmp_path / "models" / "image_encoder")
    file = beside / "model.safetensors"
    assert find_image_encoder(checkpoint, tmp_path / "cache") == file
    assert find_image_encoder(beside.parent, None) == file  # a diffusers folder
    (tmp_path / "cache" / FOLDER).mkdir(parents=True)  # only a tokenizer
    assert find_image_encoder(checkpoint, tmp_path / "cache") == file
    cached, _ = write_tower(tmp_path / "cache" / FOLDER)
    assert find_image_encoder(checkpoint, tmp_path / "cache") == cached / "model.safetensors"


def test_without_the_image_encoder_the_message_says_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    with pytest.raises(DownloadError, match="OpenCLIP's bigG, which is not in .*cache.*Put the files"):
        find_image_encoder(tmp_path / "sdxl.safetensors", tmp_path / "cache")


def test_the_pictures_vector_times_the_strength_replaces_the_pooled_state(tmp_path: Path) -> None:
    folder, _ = write_tower(tmp_path / "image_encoder", projection=TEXT_DIM)
    images = [noise(40, 30), noise(30, 50)]
    paths = [tmp_path / "one.png", tmp_path / "two.png"]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    vectors = ImageVectors(make_model("sdxl", tmp_path / "x.safetensors"), None, 0.5)
    states = [TextState(torch.full((77, 128), float(index)), torch.ones(TEXT_DIM)) for index in range(3)]
    found = vectors.replace_pooled(states, [paths[0], paths[1], paths[0]])
    tower = load_clip_vision(folder, CPU, torch.float32, "--x", "a tower")
    for state, before, image in zip(found, states, (images[0], images[1], images[0]), strict=True):
        assert state.context is before.context
        assert state.pooled is not None
        assert torch.equal(state.pooled, tower.encode([image])[0] * 0.5)


def test_a_vector_of_another_width_is_refused(tmp_path: Path) -> None:
    write_tower(tmp_path / "image_encoder", projection=32)
    noise(40, 30).save(tmp_path / "one.png")
    vectors = ImageVectors(make_model("sdxl", tmp_path / "x.safetensors"), None, 1.0)
    with pytest.raises(CheckpointError, match="vectors of width 32, but the pooled state of .* has width 64"):
        vectors.replace_pooled([TextState(torch.ones(77, 128), torch.ones(64))], [tmp_path / "one.png"])


def test_a_picture_in_place_of_the_pooled_state(tmp_path: Path) -> None:
    ckpt, _ = write_sdxl(tmp_path), tokenizer_folder(tmp_path / "tokenizers")
    write_tower(tmp_path / "image_encoder", projection=TEXT_DIM)
    noise(64, 64).save(tmp_path / "one.png")
    words = ("--ckpt", ckpt, "--prompt", "a cat", "--W", "64", "--H", "64", "--steps", "2", "--seed", "1")
    words += ("--image_path", "one.png")
    [plain], [strong] = (
        make_images(tmp_path, tmp_path / str(number), *words, *more)
        for number, more in enumerate(((), ("--clip_vision_strength", "2")))
    )
    assert np.abs(plain - strong).max() > 1
