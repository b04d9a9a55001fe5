"""Edits with Krea 2 through the command line equal a plain computation with the modules of diffusers and
transformers: no pipeline makes any. Source of the form: ai-toolkit's `edit: true`.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import Krea2Pipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import krea2_generate_image
from krea2.configs import STATES
from modules.media.pixels import to_pixels
from tests.krea2.making import in_diffusers, predict_edit
from tests.parity.pipelines import krea2, qwen_image_vae
from tests.parity.running import assert_equal, latents_in
from tests.qwen_image.making import pack
from tests.tiny.dit_files import TinyModel
from tests.tiny.krea2 import write_tiny_krea2
from tests.tiny.language_models import qwen3_vl
from tests.tiny.project import write_image

PROMPT, NEGATIVE, SEED = "the cat sits down", "dull", 20
HEIGHT, WIDTH, STEPS = 64, 48, 3
SIZES = ((96, 64), (32, 48))  # width and height of references


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_krea2(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"picture {index}.png" for index in range(len(SIZES))]
    for path, size in zip(paths, SIZES, strict=True):
        write_image(path, *size)
    return paths


def image_latents(files: TinyModel, pictures: Sequence[Path]) -> list[Tensor]:
    """Normalized means, each 1 16 1 h w."""
    vae = qwen_image_vae(files.vae)
    means, stds = (
        torch.tensor(getattr(vae.config, f"latents_{name}")).view(1, -1, 1, 1, 1) for name in ("mean", "std")
    )
    frames = [torch.frombuffer(bytearray(Image.open(path).tobytes()), dtype=torch.uint8) for path in pictures]
    sides = [Image.open(path).size for path in pictures]
    shaped = [one.view(1, 1, height, width, 3) for one, (width, height) in zip(frames, sides, strict=True)]
    return [(vae.encode(to_pixels(one)).latent_dist.mode() - means) / stds for one in shaped]


def states_of(pipe: Krea2Pipeline, prompt: str, pictures: Sequence[Path]) -> Tensor:
    """The stacked states 1 T n C of a prompt behind its pictures, from the whole of Qwen3-VL."""
    cut = Qwen2VLImageProcessorPil(
        patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, min_pixels=256 * 256
    )
    seen = cut(images=[Image.open(path) for path in pictures], return_tensors="pt")
    counts = [int(grid.prod()) // 4 for grid in seen["image_grid_thw"]]
    shown = "".join(
        f"Picture {number}: <|vision_start|>{'<|image_pad|>' * count}<|vision_end|>"
        for number, count in enumerate(counts, 1)
    )
    text = pipe.prompt_template_encode_prefix + shown + prompt + pipe.prompt_template_encode_suffix
    ids = pipe.tokenizer(text, return_tensors="pt").input_ids
    model = qwen3_vl(STATES[-1] + 1).model
    found = model(
        input_ids=ids,
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        output_hidden_states=True,
        **seen,
    ).hidden_states
    return torch.stack([found[index] for index in STATES], dim=2)[:, pipe.prompt_template_encode_start_idx :]


@torch.no_grad()
def expected(files: TinyModel, pictures: Sequence[Path], isolated: bool, scale: float) -> Tensor:
    """The tokens of the latents that an edit makes, 1 L 4Z."""
    pipe, dit = krea2(files), in_diffusers(load_file(files.dit))
    references = image_latents(files, pictures)
    texts = [states_of(pipe, text, pictures) for text in (PROMPT, NEGATIVE)[: 1 + (scale != 1)]]
    shape = (1, 16, 1, HEIGHT // 8, WIDTH // 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    mu = 0.5 + 0.65 * (HEIGHT * WIDTH // 256 - 256) / (6400 - 256)
    levels = [math.exp(mu) / (math.exp(mu) + 1 / (1 - step / STEPS) - 1) for step in range(STEPS)] + [0.0]
    for level, following in zip(levels, levels[1:], strict=False):
        found = [predict_edit(dit, x, torch.tensor([level]), text, references, isolated) for text in texts]
        velocity = found[-1] + scale * (found[0] - found[-1])
        rows = velocity.unflatten(1, (HEIGHT // 16, WIDTH // 16)).unflatten(-1, (16, 2, 2))
        x = x + (following - level) * rows.permute(0, 3, 1, 4, 2, 5).flatten(2, 3).flatten(3)[:, :, None]
    return pack(x)


def made(files: TinyModel, folder: Path, *words: object) -> Tensor:
    options = [*files.models, "--vae_dtype", "float32", "--prompt", PROMPT]
    options += ["--image_size", str(HEIGHT), str(WIDTH)]
    options += ["--infer_steps", str(STEPS), "--seed", str(SEED), "--output_type", "latent"]
    krea2_generate_image.main([*options, *map(str, words), "--device", "cpu", "--save_path", str(folder)])
    return pack(latents_in(folder)[None])


@pytest.mark.slow_cases("1-False-1", "1-True-4", "2-False-4")
@pytest.mark.parametrize(
    ("count", "isolated", "scale"), [(1, False, 1), (2, False, 4), (1, True, 4), (2, True, 1)]
)
def test_edits_equal_a_plain_computation(
    files: TinyModel, pictures: list[Path], tmp_path: Path, count: int, isolated: bool, scale: float
) -> None:
    words = ["--control_image_path", *pictures[:count], "--guidance_scale", scale]
    words += [*(["--kv_cache"] if isolated else []), *(["--negative_prompt", NEGATIVE] if scale != 1 else [])]
    wanted = expected(files, pictures[:count], isolated, scale)
    assert_equal(made(files, tmp_path, *words), wanted, "latents of an edit")
