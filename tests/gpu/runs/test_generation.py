"""Generation from the command lines of all families: a device's latents and frames are the CPU's, and what
saves memory changes no bit.
"""

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoints.stored.fp8_products import supports_fp8
from modules.media.reading import Frame, read_image
from postprocessing.contract import Clip
from postprocessing.interpolation.stage import make_interpolation
from postprocessing.upscaling.stage import make_upscaler
from tests.gpu.measuring import equal_bits, relative_error
from tests.gpu.runs.project import CPU, DEEP, EXPERTS, ON_GPU, OTHERS, Project, latents_in, run
from tests.postprocessing.interpolation import test_stage as interpolating
from tests.postprocessing.upscaling import plain_clips
from tests.tiny.post_interpolation import write_gimm_r
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
    ours, theirs = (images_in(project.decode(where, *words)) for where in (device, CPU))
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 2
    assert theirs.std() > 1  # a picture, not a ground


def images_in(folder: Path) -> Frame:
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


Caches = dict[str, dict[str, Tensor]]  # by name of the file
# relative, by the dtype in which a tensor is kept: a GPU computes encoders in float16 that the CPU has in
# float32
TOLERANCE = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 2e-2}


def caches(
    project: Project, device: torch.device, folder: Path, *latents: object, side: int | None = None
) -> Caches:
    """Make the caches of a project on a device, in a folder of their own. side: of what is cached, in
    pixels.
    """
    config = folder / "dataset.toml"
    text = (project.folder / "dataset.toml").read_text(encoding="utf-8")
    here = (project.folder / "cache").as_posix()
    assert f'"{here}"' in text
    text = text.replace(f'"{here}"', f'"{(folder / "cache").as_posix()}"')
    if side is not None:
        text = re.sub(r"resolution = .*", f"resolution = [{side}, {side}]", text)
    config.write_text(text, encoding="utf-8")
    where = ("--dataset_config", config, "--device", device)
    project.run(device, *project.family.cache_latents, *where, *latents)
    project.run(device, *project.family.cache_texts, *where)
    return {path.name: load_file(path) for path in sorted((folder / "cache").glob("*.safetensors"))}


def assert_near(ours: Caches, theirs: Caches) -> None:
    assert ours.keys() == theirs.keys()
    assert ours
    for file, tensors in theirs.items():
        assert ours[file].keys() == tensors.keys(), file
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                error = relative_error(ours[file][name], tensor)
                assert error < TOLERANCE[tensor.dtype], f"{file}: {name}: {error:.1e}"
            else:
                assert torch.equal(ours[file][name], tensor), f"{file}: {name}"


@pytest.mark.parametrize("name", [*DEEP, *OTHERS])
def test_latents_and_texts_are_those_of_the_cpu(
    name: str, project_of: Find, device: torch.device, tmp_path: Path
) -> None:
    """Clips, pictures, CLIP's and SigLIP's embeddings, all text encoders."""
    project = project_of(name)
    theirs = {path.name: load_file(path) for path in (project.folder / "cache").glob("*.safetensors")}
    assert_near(caches(project, device, tmp_path), theirs)


@pytest.mark.parametrize(
    ("name", "tile"), [("wan t2v-1.3B", 64), ("hunyuan_video", 64), ("flux", 64), ("hunyuan_image", 128)]
)
def test_latents_of_tiles_are_those_of_the_cpu(
    name: str, tile: int, project_of: Find, device: torch.device, tmp_path: Path
) -> None:
    project, made, side = project_of(name), [], 2 * tile
    tiles = ("--vae_spatial_tile_sample_min_size", tile)
    for where, folder in ((device, "ours"), (CPU, "theirs")):
        (tmp_path / folder).mkdir()
        made.append(caches(project, where, tmp_path / folder, *tiles, side=side))
    assert_near(*made)
    (tmp_path / "whole").mkdir()
    full = caches(project, CPU, tmp_path / "whole", side=side)
    latents = [next(iter(made[1][name].values())) for name in full if "_te" not in name]
    plain = [next(iter(tensors.values())) for name, tensors in full.items() if "_te" not in name]
    assert not any(torch.equal(*pair) for pair in zip(latents, plain, strict=True))  # there are tiles


def assert_levels(ours: list[Frame], theirs: list[Frame], levels: int) -> None:
    """No pixel differs by more levels of 255."""
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert np.abs(mine.astype(int) - other.astype(int)).max() <= levels


@pytest.mark.parametrize("kind", plain_clips.ALL_WRITERS)
def test_pictures_are_enlarged_as_on_the_cpu(kind: str, device: torch.device, tmp_path: Path) -> None:
    model = plain_clips.ALL_WRITERS[kind](tmp_path / "x.pth")
    made = []
    for where in (device, CPU):
        stage = make_upscaler(plain_clips.options(model), where)
        images = plain_clips.run(stage, plain_clips.pictures(), plain_clips.clip())
        made.append([image.pixels for image in images])
    assert_levels(*made, levels=1)


def test_pictures_between_are_those_of_the_cpu(device: torch.device, tmp_path: Path) -> None:
    folder, frames = write_gimm_r(tmp_path), interpolating.moving(3)
    starts = [Fraction(index, 24) for index in range(3)]
    clip = Clip(tmp_path / "clip.mkv", 130, 128, Fraction(24), 3, False)
    made = []
    for where in (device, CPU):
        stage = make_interpolation(interpolating.options(folder), where)
        made.append([image.pixels for image in stage.run(interpolating.stream(frames, starts), clip)])
    assert len(made[0]) == 5
    assert_levels(*made, levels=2)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_pictures_of_stable_diffusion_are_those_of_the_cpu(
    kind: str, device: torch.device, tmp_path: Path
) -> None:
    pytest.importorskip("diffusers")
    from tests.tiny.stable_diffusion import tokenizer_folder, write_sd1, write_sdxl

    model = (write_sd1 if kind == "sd1" else write_sdxl)(tmp_path)
    words = ("--ckpt", model, "--tokenizer_cache_dir", tokenizer_folder(tmp_path / "t"), "--W", 64, "--H", 64)
    asked = (
        *("--prompt", "a cat", "--seed", 7, "--steps", 4, "--images_per_prompt", 2),
        "--sequential_file_name",
    )
    made = []
    for name, where in (("ours", device), ("theirs", CPU)):
        run(tmp_path, where, "gen_img.py", *words, *asked, "--outdir", name, "--device", where)
        made.append([read_image(path) for path in sorted((tmp_path / name).glob("*.png"))])
    assert_levels(*made, levels=2)
