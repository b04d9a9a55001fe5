"""Qwen-Image-Edit through the command line equals diffusers: whole pipelines and masks.

diffusers' pipelines hand no kinds of tokens to Qwen2.5-VL of transformers 5, without which it does not see a
picture's rows and columns; the oracle gets them here.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditInpaintPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
)
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_inpaint,
    pipeline_qwenimage_edit_plus,
)
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import qwen_image_generate_image
from tests.parity.pipelines import qwen_image_vae
from tests.parity.running import assert_equal, image_in, latents_in
from tests.qwen_image.making import in_diffusers, pack
from tests.qwen_image.test_family import SCHEDULER
from tests.tiny.dit_files import TinyModel
from tests.tiny.language_models import qwen25_vl
from tests.tiny.project import write_image
from tests.tiny.qwen_image import write_tiny_qwen_image

PROMPT, NEGATIVE, SEED = "a red cat sits down", "dull", 20
HEIGHT, WIDTH, STEPS = 64, 48, 3
# of one area, so that diffusers resizes none if told so; in width and height
SIZES = ((96, 64), (64, 96), (192, 32))
AREA = 96 * 64


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_qwen_image(tmp_path_factory.mktemp("models"), edits=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for index, (width, height) in enumerate(SIZES):
        write_image(folder / f"picture {index}.png", width, height)
    return [folder / f"picture {index}.png" for index in range(len(SIZES))]


def theirs(files: TinyModel, version: str, kind: type[Any] | None = None) -> Any:
    """diffusers' pipeline of a release, or another kind, with the weights of these files, in float32."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(files.text_encoder / "tokenizer.json"),
        pad_token="<|endoftext|>",
        padding_side="right",
    )
    encoder = qwen25_vl()
    forward, image_token = encoder.forward, encoder.config.image_token_id

    def see(input_ids: Tensor, **others: Any) -> Any:
        kinds = (input_ids == image_token).int()
        return forward(input_ids=input_ids, mm_token_type_ids=kinds, **others)

    encoder.forward = see
    cut = Qwen2VLImageProcessorPil()

    def process(text: Sequence[str], images: Any, padding: bool, return_tensors: str) -> BatchFeature:
        found = cut(images=images, return_tensors=return_tensors)
        counts = iter(int(grid.prod()) // cut.merge_size**2 for grid in found["image_grid_thw"])
        parts = [one.split("<|image_pad|>") for one in text]
        full = [
            first + "".join("<|image_pad|>" * next(counts) + one for one in rest) for first, *rest in parts
        ]
        return BatchFeature({**tokenizer(full, padding=padding, return_tensors=return_tensors), **found})

    default = QwenImageEditPipeline if version == "edit" else QwenImageEditPlusPipeline
    pipe = (kind or default)(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=qwen_image_vae(files.vae),
        text_encoder=encoder,
        tokenizer=tokenizer,
        processor=process,
        transformer=in_diffusers(load_file(files.dit), clean_references=version == "edit-2511"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def own_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have diffusers keep the sizes of `SIZES`."""
    for name in ("CONDITION_IMAGE_SIZE", "VAE_IMAGE_SIZE"):
        monkeypatch.setattr(pipeline_qwenimage_edit_plus, name, AREA)
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_inpaint):
        calculate: Callable[..., Any] = module.calculate_dimensions
        monkeypatch.setattr(
            module, "calculate_dimensions", lambda area, ratio, calculate=calculate: calculate(AREA, ratio)
        )


def ours(
    files: TinyModel,
    folder: Path,
    version: str,
    shown: Sequence[Path],
    *words: str,
    size: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Latents as tokens, 1 L 4Z, and the picture H W 3, 0..255, of our command line."""
    options = [*files.models, "--model_version", version, "--vae_dtype", "float32", "--prompt", PROMPT]
    options += ["--control_image_path", *map(str, shown), "--image_size", *map(str, size)]
    options += ["--infer_steps", str(STEPS), "--seed", str(SEED), "--output_type", "latent_images", *words]
    qwen_image_generate_image.main([*options, "--device", "cpu", "--save_path", str(folder)])
    return pack(latents_in(folder)[None]), image_in(folder)


@torch.no_grad()
def assert_same(made: tuple[Tensor, Tensor], pipe: Any, image: Any, **asked: Any) -> None:
    """Compare with what diffusers makes: latents, and pixels as near as bytes can be."""
    asked = {"prompt": PROMPT, "num_inference_steps": STEPS, "height": HEIGHT, "width": WIDTH, **asked}
    latents = pipe(image, output_type="latent", generator=torch.Generator().manual_seed(SEED), **asked).images
    assert_equal(made[0], latents, "latents")
    means, stds = (
        torch.tensor(getattr(pipe.vae.config, name)).view(1, -1, 1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    full = pipe._unpack_latents(latents, asked["height"], asked["width"], pipe.vae_scale_factor)
    pixels = pipe.vae.decode(full * stds + means).sample[0, :, 0].permute(1, 2, 0)
    assert (made[1] - (pixels / 2 + 0.5).clamp(0, 1) * 255).abs().max() < 0.51


CASES: dict[str, tuple[str, int, float]] = {
    "edit": ("edit", 1, 4.0),
    "edit-2509 with two": ("edit-2509", 2, 4.0),
    "edit-2511 with two": ("edit-2511", 2, 4.0),
    "edit-2511 with three, unguided": ("edit-2511", 3, 1.0),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("own_sizes")
def test_pictures_equal_those_of_diffusers(
    files: TinyModel, pictures: list[Path], tmp_path: Path, name: str
) -> None:
    version, count, scale = CASES[name]
    guided = ["--guidance_scale", str(scale)] + ["--negative_prompt", NEGATIVE] * (scale != 1)
    made = ours(files, tmp_path, version, pictures[:count], *guided, size=(HEIGHT, WIDTH))

    images = [Image.open(path) for path in pictures[:count]]
    asked: Mapping[str, Any] = {"true_cfg_scale": scale, "negative_prompt": NEGATIVE if scale != 1 else None}
    pipe = theirs(files, version)
    assert_same(made, pipe, images[0] if version == "edit" else images, **asked)


@pytest.mark.usefixtures("own_sizes")
def test_a_mask_keeps_the_rest_as_in_diffusers(
    files: TinyModel, pictures: list[Path], tmp_path: Path
) -> None:
    mask = Image.new("L", (WIDTH, HEIGHT))
    mask.paste(255, (10, 20, 40, 50))
    mask.save(tmp_path / "mask.png")
    width, height = SIZES[0]
    words = ["--guidance_scale", "1", "--mask_path", str(tmp_path / "mask.png")]
    made = ours(files, tmp_path / "out", "edit", pictures[:1], *words, size=(height, width))

    pipe = theirs(files, "edit", QwenImageEditInpaintPipeline)
    # the mode of the posterior, as in the pipeline without a mask; that with one draws a sample
    pipe._encode_vae_image = functools.partial(QwenImageEditPipeline._encode_vae_image, pipe)
    asked = {"mask_image": mask, "strength": 1.0, "true_cfg_scale": 1.0, "height": height, "width": width}
    assert_same(made, pipe, Image.open(pictures[0]), **asked)
