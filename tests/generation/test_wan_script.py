"""wan_generate_video.py on a tiny Wan2.1, from the command line to files."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import wan_generate_video
from modules.contract.loading import Placement
from modules.contract.requests import Prompt
from modules.media.reading import video_frames
from tests.tiny.project import write_image, write_lora
from tests.tiny.wan import TinyWan, write_tiny_wan
from wan.checkpoints import load_dit
from wan.configs import NEGATIVE_PROMPT
from wan.t5 import WanTextEncoder

SIZE = ("--video_size", "32", "48", "--video_length", "5", "--infer_steps", "3", "--device", "cpu")


@pytest.fixture(scope="module")
def t2v(tmp_path_factory: pytest.TempPathFactory) -> TinyWan:
    return write_tiny_wan(tmp_path_factory.mktemp("t2v"))


def generate(folder: Path, files: TinyWan, *arguments: object, task: str = "t2v-1.3B") -> None:
    wan_generate_video.main(
        ["--save_path", str(folder), "--task", task, *SIZE, *files.models, *map(str, arguments)]
    )


def latents_in(folder: Path) -> Tensor:
    (path,) = folder.glob("*_latent.safetensors")
    return load_file(path)["latent"]


def text_of(files: TinyWan, text: str) -> list[Tensor]:
    encoder = WanTextEncoder(files.t5)
    encoder.load(torch.device("cpu"))
    return [tensor for conditions in encoder.encode([Prompt(text)]) for tensor in conditions["t5"]]


@torch.no_grad()
def by_hand(
    files: TinyWan, prompt: str, seed: int, scales: Sequence[float], flow_shift: float = 5.0
) -> Tensor:
    """Euler's steps with guidance, written out. Returns C F H W."""
    dit = load_dit(files.dit, Placement(torch.device("cpu")))
    positive, negative = text_of(files, prompt), text_of(files, NEGATIVE_PROMPT)
    torch.manual_seed(seed)
    x = torch.randn(16, 2, 4, 6)[None]
    line = torch.linspace(1, 0, len(scales) + 1)
    sigmas = flow_shift * line / (1 + (flow_shift - 1) * line)
    for step, scale in enumerate(scales):
        timestep = sigmas[step : step + 1] * 1000
        v, u = (dit(x, timestep, text, None) for text in (positive, negative))
        x = x + (u + scale * (v - u)) * (sigmas[step + 1] - sigmas[step])
    return x[0]


def test_latents_equal_a_computation_by_hand(tmp_path: Path, t2v: TinyWan) -> None:
    say = ("--prompt", "a cat", "--seed", 7, "--sample_solver", "vanilla", "--cpu_noise")
    generate(tmp_path, t2v, *say, "--output_type", "latent")
    expected = by_hand(t2v, "a cat", 7, [5.0] * 3)
    assert float((latents_in(tmp_path) - expected).abs().max() / expected.abs().max()) < 1e-4


def test_a_lora_changes_the_result_and_a_merged_model_gives_the_same(tmp_path: Path, t2v: TinyWan) -> None:
    lora = tmp_path / "style.safetensors"
    write_lora(lora, t2v.dit)
    say = ("--prompt", "a cat", "--seed", 1, "--output_type", "latent")
    generate(tmp_path / "plain", t2v, *say)
    weights = ("--lora_weight", lora, "--lora_multiplier", 0.7)
    generate(tmp_path / "lora", t2v, *say, *weights)
    generate(tmp_path / "merge", t2v, *weights, "--save_merged_model", tmp_path / "m.safetensors")
    generate(tmp_path / "merged", TinyWan(tmp_path / "m.safetensors", t2v.vae, t2v.t5, t2v.clip), *say)
    assert not torch.allclose(latents_in(tmp_path / "plain"), latents_in(tmp_path / "lora"), atol=1e-3)
    assert torch.equal(latents_in(tmp_path / "lora"), latents_in(tmp_path / "merged"))


def test_image_to_video_takes_the_images_aspect(tmp_path: Path) -> None:
    files = write_tiny_wan(tmp_path / "models", "i2v")
    write_image(tmp_path / "in.png", 64, 32)
    say = ("--prompt", "p", "--image_path", tmp_path / "in.png", "--output_type", "both")
    generate(tmp_path / "out", files, *say, task="i2v-14B")
    # near 32 x 48 pixels in area, twice as wide as high
    assert latents_in(tmp_path / "out").shape == (16, 2, 2, 6)


def test_first_and_last_image_and_end_image(tmp_path: Path) -> None:
    write_image(tmp_path / "in.png", 48, 32)
    image = tmp_path / "in.png"
    paths = ("--image_path", image, "--end_image_path", image, "--output_type", "both")
    for kind, frames in (("flf2v", 2), ("i2v", 3)):
        files = write_tiny_wan(tmp_path / kind / "models", kind)
        generate(tmp_path / kind, files, "--prompt", "p", *paths, "--trim_tail_frames", 3, task=f"{kind}-14B")
        assert latents_in(tmp_path / kind).shape[1] == frames
        (video,) = (tmp_path / kind).glob("*.mp4")
        assert len(list(video_frames(video))) == (frames - 1) * 4 + 1 - 3
