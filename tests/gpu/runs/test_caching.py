"""Caching from the command lines of all families: what a device encodes is what the CPU encodes."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.gpu.measuring import relative_error
from tests.gpu.runs.project import CPU, DEEP, ON_GPU, OTHERS, Project

pytestmark = ON_GPU

Find = Callable[[str], Project]
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


@pytest.mark.parametrize("name", ["wan t2v-1.3B", "hunyuan_video", "flux", "hunyuan_image"])
def test_latents_of_tiles_are_those_of_the_cpu(
    name: str, project_of: Find, device: torch.device, tmp_path: Path
) -> None:
    project, made = project_of(name), []
    tiles = ("--vae_spatial_tile_sample_min_size", "64")
    for where, folder in ((device, "ours"), (CPU, "theirs")):
        (tmp_path / folder).mkdir()
        made.append(caches(project, where, tmp_path / folder, *tiles, side=128))
    assert_near(*made)
    (tmp_path / "whole").mkdir()
    whole = caches(project, CPU, tmp_path / "whole", side=128)
    latents = [next(iter(made[1][name].values())) for name in whole if "_te" not in name]
    plain = [next(iter(tensors.values())) for name, tensors in whole.items() if "_te" not in name]
    assert not any(torch.equal(*pair) for pair in zip(latents, plain, strict=True))  # there are tiles
