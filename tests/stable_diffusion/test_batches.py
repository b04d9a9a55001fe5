"""A picture does not depend on its batch: four at once are the four single ones, through the command line."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.faults.messages import run_here
from tests.stable_diffusion.bad_files import write_good, write_lora, write_picture
from tests.tiny.control_nets import write_control_net, write_lllite
from tests.tiny.stable_diffusion import write_sdxl

LINES = (
    "a (red:1.4) cat on a mat --n [blurry], bad --d 11",
    "the sea BREAK a boat ((in the night)) --n ugly --d 12",
    "a house, a tree, a very long road that winds through the hills and comes back --d 13",
    "nothing --d 14",
)
PARTS = (
    "a cat AND a (dog:1.3) --n bad --d 21",
    "the sea BREAK a boat AND sand --d 22",
    "a house AND a road --n [ugly] --d 23",
    "red AND blue --d 24",
)
SMALL = (
    *("--W", "64", "--H", "48", "--steps", "3", "--max_embeddings_multiples", "2", "--sequential_file_name"),
)
NETWORK = ("--network_module", "networks.lora", "--network_weights")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_good(tmp_path_factory.mktemp("project"))
    write_sdxl(folder)
    write_lora(folder / "second.safetensors", seed=1)
    for number in (0, 1):
        write_lora(folder / f"xl{number}.safetensors", "sdxl", seed=number)
    (folder / "lines.txt").write_text("\n".join(LINES), encoding="utf-8")
    (folder / "parts.txt").write_text("\n".join(PARTS), encoding="utf-8")
    write_control_net(folder / "control.safetensors", "sd1")
    write_lllite(folder / "lllite.safetensors")
    (folder / "pictures").mkdir()
    for number in range(4):
        write_picture(folder / "pictures" / f"{number}.png", seed=number)
    return folder


def make(project: Path, out: Path, *words: object) -> list[np.ndarray]:
    """The pictures of a run, in the order of their lines."""
    arguments = ("--tokenizer_cache_dir", "tokenizers", *SMALL, "--outdir", out, *words)
    code, said = run_here("gen_img.py", *arguments, folder=project)
    assert code == 0, said[-3000:]
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(out.glob("*.png"))]


def assert_same(some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> None:
    assert len(some) == len(others) == 4
    for one, other in zip(some, others, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max() <= 1
    assert len({picture.tobytes() for picture in some}) == 4
    assert all(picture.std() > 5 for picture in some)


XL = ("--ckpt", "sdxl.safetensors")
SD = ("--ckpt", "sd1.safetensors")
CASES = {
    "lora": (*SD, "--from_file", "lines.txt", *NETWORK, "lora.safetensors", "--sampler", "euler_a"),
    "regions": (
        *(*SD, "--from_file", "parts.txt", "--mask_path", "mask.png", "--sampler", "dpm_2_a"),
        *(*NETWORK, "lora.safetensors", "second.safetensors"),
    ),
    "image to image": (*SD, "--from_file", "lines.txt", "--image_path", "pictures", "--sampler", "euler_a"),
    "xl": (
        *(*XL, "--from_file", "lines.txt", "--sampler", "euler_a", "--negative_scale", "2"),
        *(*NETWORK, "xl0.safetensors"),
    ),
    "control": (
        *(*SD, "--from_file", "parts.txt", "--mask_path", "mask.png", "--sampler", "dpm_2_a"),
        *("--control_net_models", "control.safetensors", "--guide_image_path", "pictures"),
    ),
    "xl control": (
        *(*XL, "--from_file", "lines.txt", "--sampler", "euler_a"),
        *("--control_net_lllite_models", "lllite.safetensors", "--guide_image_path", "pictures"),
    ),
    "grown": (
        *(*SD, "--from_file", "parts.txt", "--mask_path", "mask.png", "--sampler", "euler_a"),
        *("--gradual_latent_timesteps", "900", "--gradual_latent_every_n_steps", "1"),
        *(*NETWORK, "lora.safetensors", "second.safetensors"),
    ),
}
USUAL = {"regions", "xl"}  # the others are slow together


def _cases(names: Iterable[str], usual: Collection[str]) -> list[Any]:
    return [name if name in usual else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("case", _cases(CASES, USUAL))
def test_four_at_once_are_the_four_single_pictures(case: str, project: Path, tmp_path: Path) -> None:
    single = make(project, tmp_path / "single", *CASES[case])
    batch = make(project, tmp_path / "batch", *CASES[case], "--batch_size", 4, "--vae_batch_size", 0.5)

    assert_same(batch, single)


@pytest.mark.slow
def test_parts_without_a_mask_are_averaged_everywhere(project: Path, tmp_path: Path) -> None:
    """One LoRA acts on all of them."""
    common = (*SD, "--sampler", "ddim", *NETWORK, "lora.safetensors")
    [once] = make(project, tmp_path / "once", *common, "--prompt", "a cat --d 5")
    [twice] = make(project, tmp_path / "twice", *common, "--prompt", "a cat AND a cat --d 5")
    [mixed] = make(project, tmp_path / "mixed", *common, "--prompt", "a cat AND the sea --d 5")

    assert np.abs(twice - once).max() <= 1
    assert np.abs(mixed - once).max() > 5
