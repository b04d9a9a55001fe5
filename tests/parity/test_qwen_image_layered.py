"""Qwen-Image-Layered through the command line equals diffusers: latents of all frames, and each layer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageLayeredPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_layered
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import qwen_image_generate_image
from tests.parity.pipelines import language_model, quiet, qwen_image_vae
from tests.parity.running import assert_equal, latents_in
from tests.qwen_image.making import in_diffusers
from tests.tiny.dit_files import TinyModel
from tests.tiny.qwen_image import write_tiny_qwen_image

PROMPT, NEGATIVE, SEED, STEPS, LAYERS = "a red cat sits down", "dull", 20, 3, 2
HEIGHT, WIDTH = 64, 96
# of the release's scheduler_config.json
SCHEDULER = {
    "base_shift": 0.5,
    "max_shift": 0.9,
    "shift_terminal": None,
    "use_dynamic_shifting": True,
    "time_shift_type": "linear",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_qwen_image(tmp_path_factory.mktemp("models"), layered=True)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of the size of the result, that is transparent in places."""
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    pixels = numpy.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 4), numpy.uint8)
    Image.fromarray(pixels).save(path)
    return path


def theirs(files: TinyModel) -> Any:
    """diffusers' pipeline with the weights of these files, in float32."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(files.text_encoder / "tokenizer.json"),
        pad_token="<|endoftext|>",
        padding_side="right",
    )
    pipe = QwenImageLayeredPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=qwen_image_vae(files.vae, colors=4),
        text_encoder=language_model(files.text_encoder),
        tokenizer=tokenizer,
        processor=None,
        transformer=in_diffusers(load_file(files.dit), layered=True),
    )
    return quiet(pipe)


def unpack(tokens: Tensor) -> Tensor:
    """Latents C F h w of diffusers' tokens, 1 L 4Z."""
    rows, columns = HEIGHT // 16, WIDTH // 16
    cut = tokens[0].reshape(LAYERS + 1, rows, columns, -1, 2, 2)
    return cut.permute(3, 0, 1, 4, 2, 5).reshape(-1, LAYERS + 1, 2 * rows, 2 * columns)


@torch.no_grad()
def make_theirs(
    pipe: Any, picture: Path, monkeypatch: pytest.MonkeyPatch, **asked: Any
) -> tuple[Tensor, Tensor]:
    """Return the latents C F h w, and the layers F H W 4, 0..255, of diffusers' pipeline."""
    monkeypatch.setattr(
        pipeline_qwenimage_layered, "calculate_dimensions", lambda area, ratio: (WIDTH, HEIGHT)
    )
    seen: list[Tensor] = []

    def note(pipe: Any, step: int, time: Any, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        seen.append(values["latents"])
        return values

    settings = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "num_inference_steps": STEPS, **asked}
    (layers,) = pipe(
        Image.open(picture),
        layers=LAYERS,
        output_type="pt",
        generator=torch.Generator().manual_seed(SEED),
        callback_on_step_end=note,
        **settings,
    ).images
    return unpack(seen[-1]), layers.permute(0, 2, 3, 1) * 255


def make_ours(files: TinyModel, folder: Path, picture: Path, *words: str) -> Tensor:
    """Return the latents, C F h w, of our command line, which also writes pictures."""
    options = [*files.models, "--model_version", "layered", "--vae_dtype", "float32", "--prompt", PROMPT]
    options += ["--control_image_path", str(picture), "--output_layers", str(LAYERS)]
    options += ["--infer_steps", str(STEPS), "--seed", str(SEED), "--output_type", "latent_images"]
    options += ["--device", "cpu", "--save_path", str(folder), *words]
    qwen_image_generate_image.main(options)
    return latents_in(folder)


SIZE = ["--image_size", str(HEIGHT), str(WIDTH)]
CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "guided": (["--negative_prompt", NEGATIVE, "--guidance_scale", "4"], {"true_cfg_scale": 4.0}),
    "unguided": (["--guidance_scale", "1"], {"true_cfg_scale": 1.0}),
    "with the norms of the prompt": (
        ["--negative_prompt", NEGATIVE, "--guidance_scale", "4", "--cfg_norm"],
        {"true_cfg_scale": 4.0, "cfg_normalize": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_picture_comes_apart_as_in_diffusers(
    case: str, files: TinyModel, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, asked = CASES[case]
    latents, layers = make_theirs(theirs(files), picture, monkeypatch, **asked)

    made = make_ours(files, tmp_path, picture, *SIZE, *words)

    assert_equal(made, latents, "latents")
    for index, layer in enumerate(layers, 1):
        (path,) = tmp_path.glob(f"*_layer{index}.png")
        pixels = torch.from_numpy(numpy.array(Image.open(path))).float()
        assert pixels.shape == (HEIGHT, WIDTH, 4)
        assert (pixels - layer).abs().max() < 0.51  # as near as bytes can be
    assert len(list(tmp_path.glob("*_layer*.png"))) == LAYERS + 1
    assert len(list(tmp_path.glob("*_composite.png"))) == 1
