"""Generation from the command lines of all families: a device's latents and frames are the CPU's, and what
saves memory changes no bit.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from modules.fp8.products import supports_fp8
from modules.media.reading import Frame, read_image
from tests.gpu.measuring import equal_bits, relative_error
from tests.gpu.runs.project import CPU, DEEP, EXPERTS, ON_GPU, OTHERS, Project, latents_in
from tests.tiny.taehv import write_taehv

pytestmark = ON_GPU

Find = Callable[[str], Project]
# a GPU computes text encoders of these, or CLIP, in float16; the CPU has no fast float16, and takes float32
HALF_TEXTS = ("hunyuan_video", "skyreels", "framepack", "wan i2v")
FP8 = ("--fp8_scaled", "--fp8")
TEACACHE = ("--teacache_threshold", "100", "--teacache_coefficients", "1", "0")


@pytest.fixture(params=DEEP)
def project(request: pytest.FixtureRequest, project_of: Find) -> Project:
    return project_of(request.param)


def tolerance(project: Project, usual: float) -> float:
    """The usual one is below what TF32 in place of float32 does; another order of sums does 1e-6."""
    return max(usual, 2e-2) if project.family.name.startswith(HALF_TEXTS) else usual


@pytest.mark.parametrize("name", [*DEEP, *OTHERS])
def test_latents_in_float32_are_those_of_the_cpu(name: str, project_of: Find, device: torch.device) -> None:
    project = project_of(name)
    ours, theirs = (project.generate(where) for where in (device, CPU))
    assert relative_error(ours, theirs) < tolerance(project, 2e-4)


@pytest.mark.parametrize("name", [*DEEP, *OTHERS])
def test_pictures_in_float32_are_those_of_the_cpu(name: str, project_of: Find, device: torch.device) -> None:
    """The same latents are decoded, so that only the decoder's rounding is seen: two levels of 255."""
    project = project_of(name)
    (path,) = project.make(CPU, "--output_type", "latent").glob("*_latent.safetensors")
    words = ("--latent_path", path, "--output_type", "images", "--vae_dtype", "float32")
    ours, theirs = (pictures_in(project.decode(where, *words)) for where in (device, CPU))
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 2
    assert theirs.std() > 1  # a picture, not a ground


def pictures_in(folder: Path) -> Frame:
    return np.stack([read_image(path) for path in sorted(folder.rglob("*.png"))])


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("usual", [(), FP8], ids=["float32", "fp8"])
def test_swapped_blocks_change_no_bit(project: Project, device: torch.device, usual: tuple[str, ...]) -> None:
    plain = project.generate(device, *usual)
    swap = ("--blocks_to_swap", project.swappable, "--img_in_txt_in_offloading")
    swapped = project.generate(device, *usual, *swap)
    assert equal_bits(swapped, plain)


def test_fp8_products_give_nearly_the_latents_of_fp8_weights(project: Project, device: torch.device) -> None:
    if not supports_fp8(device):
        pytest.skip(f"{device} has no fp8 units")
    large = ("--video_size", "64", "64")  # fewer than 16 tokens are multiplied in 16 bits
    weights = project.generate(device, *FP8, *large)
    products = project.generate(device, *FP8, *large, "--fp8_fast")
    assert 0 < relative_error(products, weights) < 0.2


def test_a_step_cache_skips_as_on_the_cpu(project: Project, device: torch.device) -> None:
    ours, theirs = (project.generate(where, *TEACACHE) for where in (device, CPU))
    assert relative_error(ours, theirs) < tolerance(project, 2e-4)
    assert not equal_bits(ours, project.generate(device))


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize("name", ["wan t2v-1.3B", "hunyuan_video", "framepack"])
def test_previews_change_no_bit(name: str, project_of: Find, device: torch.device, tmp_path: Path) -> None:
    pytest.importorskip("av")  # they are videos
    project, taehv = project_of(name), write_taehv(tmp_path / "taehv.safetensors")
    plain = project.generate(device)
    for how in ((), ("--preview_vae", taehv)):
        folder = project.make(device, "--output_type", "latent", "--preview_latent_every", "1", *how)
        assert equal_bits(latents_in(folder), plain)
        assert list(folder.glob("latent_preview*"))


@pytest.mark.usefixtures("repeatable")
@pytest.mark.parametrize(
    "how",
    [(), ("--offload_inactive_dit",), ("--lazy_loading",), ("--blocks_to_swap", "3"), FP8],
    ids=lambda how: " ".join(how) or "plain",
)
def test_two_experts_take_turns(project_of: Find, device: torch.device, how: tuple[str, ...]) -> None:
    """Both work, of three steps; from wherever they come, each has its own weights."""
    project, base = project_of(EXPERTS), FP8 if how == FP8 else ()
    turn = ("--infer_steps", "4", "--flow_shift", "5", *base)
    plain = project.generate(device, *turn)
    assert equal_bits(project.generate(device, *turn, *how), plain)
    theirs = project.generate(CPU, *turn)
    assert relative_error(plain, theirs) < (5e-2 if base else 2e-4)


@pytest.mark.parametrize("name", ["wan t2v-1.3B", "flux"])
def test_loras_are_merged_and_added_as_on_the_cpu(name: str, project_of: Find, device: torch.device) -> None:
    project = project_of(name)
    lora = "output/for generation.safetensors"
    project.train(CPU, "for generation", "--learning_rate", "1e-1", steps=2)
    plain = project.generate(CPU)
    ours, theirs = (project.generate(where, "--lora_weight", lora) for where in (device, CPU))
    assert relative_error(ours, theirs) < 1e-3
    assert relative_error(theirs, plain) > 1e-2


@pytest.mark.parametrize("name", DEEP[:3])
def test_compiled_blocks_give_the_latents_of_eager_ones(
    name: str, project_of: Find, device: torch.device
) -> None:
    project = project_of(name)
    compiled = ("--compile", "--compile_args", "inductor", "default", "auto", "False")
    eager = project.generate(device)
    assert relative_error(project.generate(device, *compiled), eager) < 1e-3
