"""Edits of Fibo 2.0 by command equal diffusers' whole pipeline: pictures, mask, guidance, a few-step LoRA."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import BriaFibo2Pipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import fibo_2_generate_image
from fibo_2.configs import STATES
from tests.fibo_2.making import Inputs, in_diffusers, unpack
from tests.flux_2.making import autoencoder_in_diffusers
from tests.parity.running import assert_equal, latents_in
from tests.tiny.dit_files import TinyModel
from tests.tiny.fibo_2 import CONFIG, write_tiny_fibo_2
from tests.tiny.language_models import qwen3_vl, qwen_tokenizer

SEED, STEPS, HEIGHT, WIDTH = 20, 3, 64, 96
PAD = "<|image_pad|>"
EDIT = '{"edit_instruction": "add a hat to <image_1>", "short_description": "a cat", "context": ""}'


class Processor:
    """Qwen3VLProcessor of this release without torchvision: each picture's mark stands for its tokens."""

    def __init__(self, config: Any) -> None:
        vision = config.vision_config
        self.token = config.image_token_id
        self.side = vision.patch_size * vision.spatial_merge_size
        self.cut = Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
            min_pixels=3136,
            max_pixels=1_605_632,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )

    def __call__(self, text: list[str], images: list[Image.Image] | None, **_: Any) -> Inputs:
        pictures = {} if images is None else dict(self.cut(images=images, return_tensors="pt"))
        pieces = text[0].split(PAD)
        grids = pictures.get("image_grid_thw", torch.zeros(0, 3))
        assert len(pieces) == len(grids) + 1
        counts = [int(grid.prod()) // 4 for grid in grids]
        full = pieces[0] + "".join(PAD * n + piece for n, piece in zip(counts, pieces[1:], strict=True))
        ids = torch.tensor([qwen_tokenizer().encode(full, add_special_tokens=False).ids])
        types = (ids == self.token).int()
        return Inputs(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types, **pictures)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_fibo_2(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four pictures of different shapes, and a mask of the first."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(2)
    paths = []
    for number, size in enumerate([(130, 90), (96, 64), (64, 128), (100, 100)]):
        drawn = generator.integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        paths.append(folder / f"{number}.png")
        Image.fromarray(drawn).resize(size).save(paths[-1])
    mask = generator.integers(0, 255, (9, 13), dtype=np.uint8)
    Image.fromarray(mask, "L").resize((130, 90)).save(folder / "mask.png")
    return [*paths, folder / "mask.png"]


def make_pipeline(files: TinyModel, state: dict[str, Tensor]) -> Any:
    """diffusers' pipeline with the tiny weights; this network reads fewer bundles than the released one."""
    network = in_diffusers(state)
    forward = network.forward

    def read_fewer(*args: Any, encoder_hidden_states: Tensor, **named: Any) -> Any:
        bundles = encoder_hidden_states[:, : 1 + len(CONFIG.injections)]
        return forward(*args, encoder_hidden_states=bundles, **named)

    network.forward = read_fewer
    encoder = qwen3_vl(layers=STATES[-1] + 1)
    pipeline: Any = BriaFibo2Pipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_image_seq_len=256,
            max_image_seq_len=4096,
            base_shift=0.5,
            max_shift=1.15,
        ),
        vae=autoencoder_in_diffusers(load_file(files.vae)),
        text_encoder=encoder,
        processor=None,
    )
    pipeline.processor = Processor(encoder.config)
    pipeline.vae_scale_factor = 8  # of the released autoencoder
    pipeline.image_processor = type(pipeline.image_processor)(vae_scale_factor=16)
    # the crops of several pictures are about a megapixel: here about 64 x 64
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(files: TinyModel, folder: Path, words: list[str]) -> Tensor:
    options = [*files.models, "--vae_dtype", "float32", "--text_encoder_dtype", "float32"]
    options += ["--infer_steps", str(STEPS), "--seed", str(SEED), "--output_type", "latent"]
    fibo_2_generate_image.main([*options, "--device", "cpu", "--save_path", str(folder), *words])
    return unpack(latents_in(folder)[None])[0]


@pytest.mark.parametrize(
    ("count", "words", "asked"),
    [
        (1, [], {"guidance_scale": 5.0}),
        (1, ["--guidance_scale", "1"], {"guidance_scale": 1.0}),
        (1, ["--mask_path", "MASK", "--negative_prompt", "dull"], {"negative_prompt": "dull"}),
        pytest.param(2, ["--guidance_scale", "3"], {"guidance_scale": 3.0}, marks=pytest.mark.slow),
        pytest.param(4, ["--guidance_scale", "1"], {"guidance_scale": 1.0}, marks=pytest.mark.slow),
    ],
    ids=["one", "unguided", "mask", "two", "four"],
)
def test_an_edit_is_made_as_in_diffusers(
    files: TinyModel,
    pictures: list[Path],
    tmp_path: Path,
    count: int,
    words: list[str],
    asked: dict[str, Any],
) -> None:
    mask = Image.open(pictures[-1]) if "MASK" in words else None
    images = [Image.open(path).convert("RGB") for path in pictures[:count]]
    expected = make_pipeline(files, load_file(files.dit))(
        prompt=EDIT,
        image=images,
        mask=mask,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
        **asked,
    ).images[0]

    words = [str(pictures[-1]) if word == "MASK" else word for word in words]
    words += ["--prompt", EDIT, "--image_size", str(HEIGHT), str(WIDTH)]
    made = generate(files, tmp_path, [*words, "--control_image_path", *map(str, pictures[:count])])

    assert_equal(made, expected, "latents")


def test_a_few_step_lora_of_edits_acts_at_guidance_1_as_in_diffusers(
    files: TinyModel, pictures: list[Path], tmp_path: Path
) -> None:
    """The LoRA, of diffusers' names, is merged by hand there."""
    state = load_file(files.dit)
    generator = torch.Generator().manual_seed(5)
    lora: dict[str, Tensor] = {}
    merged = dict(state)
    for path in (
        "layers.1.attention.to_q",
        "layers.0.cross_attention.to_k",
        "noise_refiner.0.feed_forward.w1",
    ):
        rows, columns = state[f"{path}.weight"].shape
        down, up = torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator)
        lora |= {f"transformer.{path}.lora_A.weight": down, f"transformer.{path}.lora_B.weight": up}
        merged[f"{path}.weight"] = state[f"{path}.weight"] + up @ down
    file = tmp_path / "edit few steps.safetensors"
    save_file(lora, file)

    def make_theirs(weights: dict[str, Tensor]) -> Tensor:
        pipeline = make_pipeline(files, weights)
        made: Tensor = pipeline(
            prompt="add a hat",
            image=[Image.open(pictures[0]).convert("RGB")],
            height=HEIGHT,
            width=WIDTH,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
        ).images[0]
        return made

    words = ["--guidance_scale", "1", "--prompt", "add a hat", "--image_size", str(HEIGHT), str(WIDTH)]
    words += ["--control_image_path", str(pictures[0]), "--lora_weight", str(file)]
    made = generate(files, tmp_path / "made", words)

    expected = make_theirs(merged)
    assert_equal(made, expected, "latents")
    assert (made - make_theirs(state)).abs().max() > 0.05 * expected.abs().max()
