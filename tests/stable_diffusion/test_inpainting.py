"""Inpainting models of Stable Diffusion: trained, saved and generated with (--train_inpainting)."""

import json
import random
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import (
    StableDiffusionInpaintPipeline,
)
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_inpaint import (
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from checkpoints.shards import IN_ONE_FILE
from dataset.config import load_dataset_config
from dataset.listing import find_all_sources
from dataset.sources.decoding import decode_source
from dataset.subset_options import SubsetOptions
from encoders.tiles import posterior_generator
from modules.errors import CheckpointError
from modules.media.random_masks import draw_cloud, draw_mask, draw_polygons, draw_shape
from modules.script_options import parse_options
from protocols.data import LOSS_MASK, MediaEncoders
from protocols.family import Abilities
from protocols.loading import Placement
from stable_diffusion.family import StableDiffusion
from stable_diffusion.files import ModelType
from stable_diffusion.inpainting import INPAINTING, draw_wobbly_ellipse
from stable_diffusion.samplers import make_scheduler
from stable_diffusion.training_files import UnetInput
from stable_diffusion.whole_files import make_writer
from stable_diffusion.whole_folders import make_folder_writer
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.stable_diffusion.test_training_step import CPU, KINDS, make_batch, make_family, plain_loss
from tests.tiny.stable_diffusion import WRITERS, tokenizer_folder, unet_state, write_folder
from training.features.inpainting import InpaintingOptions, add_inputs
from training.loss import NoisyBatch
from training.reports.history import history_path, read_history, read_session
from training.targets.passes import training_loss

DATASET = """[general]
resolution = 64
caption_extension = ".txt"

[[datasets]]
batch_size = 2

[[datasets.subsets]]
image_dir = "pictures"
flip_aug = true
"""
PIPELINES: dict[str, Any] = {"sd1": StableDiffusionInpaintPipeline, "sdxl": StableDiffusionXLInpaintPipeline}
LINE = "a red cat --w 64 --h 64 --d 5 --s 4 --l 4 --img pictures/0.png --m mask.png\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    generator = np.random.default_rng(0)
    for index in range(2):
        pixels = generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{index}.png")
        (tmp_path / "pictures" / f"{index}.txt").write_text(f"a cat, number {index}", encoding="utf-8")
    mask = np.zeros((64, 64), np.uint8)
    mask[8:40, 16:44] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (tmp_path / "dataset.toml").write_text(DATASET, encoding="utf-8")
    (tmp_path / "samples.txt").write_text(LINE, encoding="utf-8")
    tokenizer_folder(tmp_path / "tokenizers")
    return tmp_path


def words(model: Path, *further: object) -> list[object]:
    files = ["--pretrained_model_name_or_path", model, "--tokenizer_cache_dir", "tokenizers"]
    data = ["--dataset_config", "dataset.toml", "--max_data_loader_n_workers", "0"]
    steps = ["--max_train_steps", "1", "--seed", "1", "--learning_rate", "0.01"]
    return [*files, *data, *steps, "--output_dir", "output", "--output_name", "it", *further]


def picture(path: Path) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(path)).astype(np.int64))


def painting_family(kind: str, folder: Path, channels: int = 9) -> StableDiffusion:
    """A family whose U-Net takes 9 channels: that of its file, or one of 4 that is widened."""
    family = make_family(kind, folder)
    write_folder(kind, folder / kind, in_channels=channels)
    files = replace(family.files, unet_input=UnetInput.WIDENED)
    return replace(family, inpaints=True, files=files)


def with_masks(noisy_batch: NoisyBatch) -> NoisyBatch:
    generator = torch.Generator().manual_seed(4)
    mask = (torch.rand(2, 1, 1, 8, 8, generator=generator) < 0.4).float()
    masked = torch.randn(2, 4, 1, 8, 8, generator=generator)
    tensors = {**noisy_batch.batch.tensors, INPAINTING: torch.cat([mask, masked], dim=1)}
    return replace(noisy_batch, batch=replace(noisy_batch.batch, tensors=tensors))


class PlainInputs(torch.nn.Module):
    """The U-Net of diffusers, given mask and masked latents behind the noisy ones."""

    def __init__(self, unet: torch.nn.Module, further: Tensor) -> None:
        super().__init__()
        self.unet, self.further = unet, further

    def forward(self, noisy: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.unet(torch.cat([noisy, self.further], dim=1), *args, **kwargs)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_loss_is_that_of_diffusers_with_the_mask_before_the_masked_latents(
    kind: str, tmp_path: Path
) -> None:
    family = painting_family(kind, tmp_path)
    noisy_batch = with_masks(make_batch(family, (801, 437)))
    ours: Any = family.load_dit(Placement(CPU, torch.float32)).requires_grad_(True)
    loss = training_loss(family, ours, noisy_batch, torch.enable_grad)
    loss.backward()

    further = noisy_batch.batch.tensor(INPAINTING)[:, :, 0]
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / kind / "unet")
    expected = plain_loss(PlainInputs(theirs, further), family, noisy_batch)
    expected.backward()

    torch.testing.assert_close(loss, expected)
    weight = ours.conv_in.weight.grad
    # sums in another order, in float32
    torch.testing.assert_close(weight, theirs.conv_in.weight.grad, rtol=1e-4, atol=1e-6)
    assert weight is not None
    assert weight[:, 4:].abs().max() > 0
    mask, masked = further[:, :1], further[:, 1:]
    for wrong in (torch.cat([masked, mask], dim=1), torch.cat([1 - mask, masked], dim=1)):
        with torch.no_grad():
            assert not torch.isclose(loss, plain_loss(PlainInputs(theirs, wrong), family, noisy_batch))


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_what_the_mask_hides_is_gray_and_the_mask_is_not_averaged(kind: str, tmp_path: Path) -> None:
    family = painting_family(kind, tmp_path)
    generator = torch.Generator().manual_seed(2)
    frames = torch.randint(256, (1, 64, 40, 3), dtype=torch.uint8, generator=generator)
    mask = torch.rand(64, 40, generator=generator) < 0.5
    encoders = MediaEncoders(vae=family.files.load_vae(CPU))

    pixels = frames.permute(0, 3, 1, 2) / 127.5 - 1
    (made,) = family.encode_masked(encoders, pixels, mask, posterior_generator("cat masked")).values()

    vae = AutoencoderKL.from_pretrained(tmp_path / kind / "vae")
    with torch.no_grad():
        posterior = vae.encode(pixels * ~mask).latent_dist
        expected = posterior.sample(posterior_generator("cat masked")) * vae.config.scaling_factor
    torch.testing.assert_close(made[1:, 0], expected[0], rtol=1e-4, atol=1e-4)
    small = torch.nn.functional.interpolate(mask.float()[None, None], (8, 5), mode="nearest")
    assert torch.equal(made[:1, 0], small[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_widened_unet_predicts_the_same_and_is_saved_with_nine_channels(kind: str, tmp_path: Path) -> None:
    narrow = make_family(kind, tmp_path)
    wide = painting_family(kind, tmp_path, channels=4)
    noisy_batch = with_masks(make_batch(wide, (801, 437)))
    placement = Placement(CPU, torch.float32)
    unet = wide.load_dit(placement)
    with torch.no_grad():
        before = training_loss(narrow, narrow.load_dit(placement), noisy_batch, torch.no_grad)
        assert torch.equal(training_loss(wide, unet, noisy_batch, torch.no_grad), before)

    single = WRITERS[kind](tmp_path)
    of_file = replace(wide.files, ckpt=single)
    model_type = ModelType(KINDS[kind], predicts_velocity=False, zero_terminal_snr=False)
    make_writer(of_file, {"dit": unet}, model_type).write(tmp_path / "file.safetensors", None, {})
    make_folder_writer(wide.files, {"dit": unet}, model_type, IN_ONE_FILE).write(
        tmp_path / "folder", None, {}
    )

    weight = load_file(tmp_path / "file.safetensors")["model.diffusion_model.input_blocks.0.0.weight"]
    saved = UNet2DConditionModel.from_pretrained(tmp_path / "folder" / "unet")
    for tensor in (weight, saved.conv_in.weight):
        assert tensor.shape[1] == 9
        assert torch.equal(tensor[:, :4], unet_state(kind)["conv_in.weight"])
        assert not tensor[:, 4:].any()
    assert replace(of_file, ckpt=tmp_path / "file.safetensors", unet_input=UnetInput.INPAINTING).inpaints


KINDS_OF_MASKS: dict[str, tuple[Callable[..., Any], float, float, float]] = {
    # smallest and largest share of the image, and the middle one
    "cloud": (draw_cloud, 0.10, 0.30, 0.20),
    "polygon": (draw_polygons, 0.03, 0.60, 0.20),
    "shape": (draw_shape, 0.07, 0.61, 0.25),
}


@pytest.mark.parametrize("kind", KINDS_OF_MASKS)
def test_masks_cover_as_much_as_those_of_sd_scripts(kind: str) -> None:
    """Sizes of `inpainting` masks, drawn 2000 times by them: middle 20 %, 20 % and 25 %."""
    draw, low, high, middle = KINDS_OF_MASKS[kind]
    numbers = random.Random(0)
    shares = [float(draw(96, 128, numbers).mean()) for _ in range(200)]

    assert low - 0.01 <= min(shares)
    assert max(shares) <= high + 0.01
    assert abs(float(np.median(shares)) - middle) < 0.04


def test_masks_follow_their_seed_and_are_neither_empty_nor_full() -> None:
    def draw_all(seed: int) -> np.ndarray[Any, Any]:
        numbers = random.Random(seed)
        return np.stack([draw_mask(64, 96, numbers) for _ in range(40)])

    masks = draw_all(1)
    assert np.array_equal(masks, draw_all(1))
    assert not np.array_equal(masks, draw_all(2))
    assert masks.mean(axis=(1, 2)).min() > 0.03
    assert masks.mean(axis=(1, 2)).max() < 0.9
    ellipse = draw_wobbly_ellipse(256, 256, random.Random(3))
    assert 0.1 < ellipse.mean() < 0.35


def test_files_that_do_not_fit_are_refused_before_loading(tmp_path: Path) -> None:
    nine = WRITERS["sd1"](tmp_path, channels=9, name="nine.safetensors")
    files = make_family("sd1", tmp_path).files
    with pytest.raises(CheckpointError, match="is a checkpoint for images.*fine_tune.py"):
        replace(files, unet_input=UnetInput.INPAINTING).check()
    with pytest.raises(CheckpointError, match="9 channels instead of 4. Train it with --train_inpainting"):
        replace(files, ckpt=nine, unet_input=UnetInput.LATENTS).check()


def test_a_model_with_new_input_channels_is_not_compared_with_its_base(tmp_path: Path) -> None:
    """No LoRA can be extracted from the difference."""
    nine = WRITERS["sd1"](tmp_path, channels=9, name="nine.safetensors")
    family = make_family("sd1", tmp_path)
    widened = replace(family.files, unet_input=UnetInput.WIDENED)
    assert family.keeps_shapes
    assert not replace(family, inpaints=True, files=widened).keeps_shapes
    assert replace(family, inpaints=True, files=replace(widened, ckpt=nine)).keeps_shapes


REFUSED: dict[str, tuple[str, list[str], str]] = {
    "cached latents": ("train_network.py", ["--cache_latents"], "--cache_latents with --train_inpainting"),
    "another family": ("flux_train_network.py", [], "is for Stable Diffusion 1, 2 and XL"),
    "a ControlNet": ("train_control_net.py", [], "this script trains ControlNet"),
    "a LoRA of four channels": ("train_network.py", [], "is a checkpoint for images"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_the_reason(case: str, folder: Path) -> None:
    script, further, reason = REFUSED[case]
    code, said = run_here(
        script, *words(WRITERS["sd1"](folder), "--train_inpainting", *further), folder=folder
    )

    assert_one_message(code, said, reason)


@pytest.mark.parametrize("further", [[], ["--masked_loss"]])
def test_nothing_is_held_outside_masks_that_weigh_no_loss(further: list[object], folder: Path) -> None:
    """--mask_prior_weight needs masks of the loss; those of --train_inpainting are inputs."""
    (folder / "masks").mkdir()
    for name in ("0.png", "1.png"):
        shutil.copy(folder / "mask.png", folder / "masks" / name)
    key = "conditioning_data_dir" if further else "mask_directory"
    (folder / "dataset.toml").write_text(f'{DATASET}{key} = "masks"\n', encoding="utf-8")
    model = WRITERS["sd1"](folder, channels=9, name="nine.safetensors")
    lora: list[object] = ["--train_inpainting", "--mask_prior_weight", 0.5, "--network_train_unet_only"]

    code, said = run_here("train_network.py", *words(model, *lora, *further), folder=folder)

    if further:
        assert (code, (folder / "output" / "it.safetensors").is_file()) == (0, True)
    else:
        assert_one_message(code, said, "--mask_prior_weight 0.5 with --train_inpainting: masks are inputs")


def test_a_lora_learns_on_an_inpainting_model_and_its_samples_are_the_images_of_the_scripts(
    folder: Path,
) -> None:
    model = WRITERS["sd1"](folder, channels=9, name="nine.safetensors")
    samples: list[object] = [
        "--sample_prompts",
        "samples.txt",
        "--sample_every_n_steps",
        1,
        "--sample_sampler",
        "euler_a",
    ]
    lora: list[object] = ["--train_inpainting", "--network_dim", 2, "--network_train_unet_only"]
    succeed_here("train_network.py", *words(model, *lora, *samples), folder=folder)

    with safe_open(folder / "output" / "it.safetensors", framework="pt") as file:
        assert file.metadata()["ss_train_inpainting"] == "True"
    given: list[object] = ["--ckpt", model, "--tokenizer_cache_dir", "tokenizers", "--sampler", "euler_a"]
    given += ["--prompt", "a red cat", "--seed", 5, "--steps", 4, "--scale", 4, "--strength", 1]
    given += ["--mask_path", "mask.png"]
    one: list[object] = ["--network_module", "networks.lora", "--network_weights", "output/it.safetensors"]
    one += ["--image_path", "pictures/0.png", "--W", 64, "--H", 64, "--outdir", "one"]
    succeed_here("gen_img.py", *given, *one, folder=folder)
    two: list[object] = ["--i2i_path", "pictures/0.png", "--image_size", 64, 64, "--save_path", "two"]
    two += ["--lora_weight", "output/it.safetensors"]
    succeed_here("sd_generate_image.py", *given, *two, folder=folder)

    (sample,) = (folder / "output" / "sample").glob("it_000001_00*.png")
    (first,) = (folder / "one").glob("*.png")
    (second,) = (folder / "two").glob("*.png")
    assert torch.equal(picture(sample), picture(first))
    # added to outputs, or to weights, which rounds once more
    assert (picture(first) - picture(second)).abs().max() <= 1


def test_the_printed_command_repaints_an_image_of_the_training(folder: Path) -> None:
    model = WRITERS["sd1"](folder, channels=9, name="nine.safetensors")
    lora: list[object] = ["--train_inpainting", "--network_dim", 2, "--network_train_unet_only"]

    succeed_here("train_network.py", *words(model, *lora, "--max_train_steps", 1), folder=folder)

    path = history_path(folder / "output", "it")
    session = read_session(path)
    assert session is not None
    commands = {command.title: command for command in read_history(path, session).commands}
    generate = commands["Generate with it"]
    assert "MASK_FILE" in generate.missing
    argv = shlex.split(generate.bash)
    image = folder / argv[argv.index("--i2i_path") + 1]
    assert image.is_file()
    assert image.parent == folder / "pictures"
    filled = [word.replace("MASK_FILE", "mask.png") for word in argv[2:]]
    succeed_here(Path(argv[1]).name, *filled, "--steps", "2", folder=folder)
    assert any((folder / "output" / "generated").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_images_are_those_of_diffusers_pipelines(kind: str, folder: Path) -> None:
    model = write_folder(kind, folder / "model", in_channels=9, sample_size=64)
    config = model / "model_index.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**settings, "_diffusers_version": "0.42.1"}), encoding="utf-8")
    pipeline = PIPELINES[kind].from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler("ddim", predicts_velocity=False)
    result = pipeline(
        prompt="a red cat",
        image=Image.open(folder / "pictures" / "0.png"),
        mask_image=Image.open(folder / "mask.png"),
        height=64,
        width=64,
        strength=1.0,
        num_inference_steps=4,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
    )
    script = "sdxl_generate_image.py" if kind == "sdxl" else "sd_generate_image.py"
    given: list[object] = [
        "--ckpt",
        model,
        "--sampler",
        "ddim",
        "--prompt",
        "a red cat",
        "--seed",
        5,
        "--steps",
        4,
    ]
    given += ["--scale", 4, "--i2i_path", "pictures/0.png", "--strength", 1, "--mask_path", "mask.png"]
    succeed_here(script, *given, "--image_size", 64, 64, "--save_path", "ours", folder=folder)

    (ours,) = (folder / "ours").glob("*.png")
    expected = torch.from_numpy(np.asarray(result.images[0]).astype(np.int64))
    # sums in another order, and bytes that round the other way
    assert (picture(ours) - expected).abs().max() <= 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_diffusers_reads_a_widened_model_from_a_single_file(kind: str, folder: Path) -> None:
    """Its reader takes the 9 channels from the file's first layer, the rest of the sizes from a folder."""
    script = "sdxl_train.py" if kind == "sdxl" else "fine_tune.py"
    command = words(WRITERS[kind](folder), "--train_inpainting", "--optimizer_type", "SGD")
    succeed_here(script, *command, folder=folder)
    succeed_here(script, *command, "--save_model_as", "diffusers", "--output_name", "whole", folder=folder)

    wide = PIPELINES[kind].from_pretrained(folder / "output" / "whole", local_files_only=True).unet
    read = (
        PIPELINES[kind]
        .from_single_file(
            str(folder / "output" / "it.safetensors"),
            config=str(folder / "output" / "whole"),
            local_files_only=True,
            # towers of equal width: the reader would take the first one for both
            **({"text_encoder": None, "text_encoder_2": None} if kind == "sdxl" else {"text_encoder": None}),
        )
        .unet
    )

    assert read.config.in_channels == read.conv_in.weight.shape[1] == 9
    assert read.conv_in.weight[:, 4:].abs().max() > 0  # learned
    expected = wide.state_dict()
    assert read.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in read.state_dict().items())


@dataclass(frozen=True)
class ShownMasks:
    """A family that keeps the mask of an image."""

    abilities: Abilities = Abilities(inpaints=True)

    def encode_masked(self, _: Any, pixels: Tensor, mask: Tensor, generator: Any) -> dict[str, Tensor]:
        return {"mask": mask}


def masks_of(folder: Path, key: str, **settings: Any) -> list[tuple[Tensor, Tensor]]:
    """Twelve times the first image of a dataset, H W bool, changed each time, and the mask that it gets."""
    (folder / "masks").mkdir()
    shutil.copy(folder / "mask.png", folder / "masks" / "0.png")
    shutil.copy(folder / "mask.png", folder / "pictures" / "0.png")
    text = DATASET.replace("resolution = 64", "resolution = 48")
    text = text.replace('"pictures"', f"'{folder / 'pictures'}'")
    text += f"random_crop = true\n{key} = '{folder / 'masks'}'\n"
    (folder / "dataset.toml").write_text(text, encoding="utf-8")
    options = parse_options(None, [], SubsetOptions)[0]
    config = load_dataset_config(folder / "dataset.toml", replace(options, masked_loss="cond" in key))
    source = next(source for source in find_all_sources(config) if source.stem == "0")
    asked = InpaintingOptions.from_defaults(train_inpainting=True, **settings)
    found = []
    for number in range(12):
        image = decode_source(source, 1.0, 8, rng=random.Random(number))
        tensors = {} if image.mask is None else {LOSS_MASK: torch.ones(1)}
        weighs = "cond" in key
        made = add_inputs(asked, weighs, ShownMasks(), None, image, str(number), tensors)  # type: ignore[arg-type]
        assert (LOSS_MASK in made) is weighs
        found.append((torch.from_numpy(image.frames[0, ..., 0] >= 128), made["mask"]))
    return found


def test_masks_of_the_dataset_win_over_random_ones_and_follow_crop_and_flip(folder: Path) -> None:
    found = masks_of(folder, "mask_directory")
    assert all(torch.equal(white, mask) for white, mask in found)
    assert len({tuple(mask.flatten().tolist()) for _, mask in found}) == 2  # mirrored too


def test_masks_that_weigh_the_loss_leave_random_ones(folder: Path) -> None:
    found = masks_of(folder, "conditioning_data_dir")
    assert not any(torch.equal(white, mask) for white, mask in found)


def test_a_fraction_of_the_masks_is_the_whole_image(folder: Path) -> None:
    found = masks_of(folder, "mask_directory", inpainting_full_mask_rate=0.5)
    assert 2 < sum(bool(mask.all()) for _, mask in found) < 10
