"""Run scripts in parity tests, and the data sets and latents that are compared."""

import math
from collections.abc import Sequence
from pathlib import Path

import av
import numpy
import torch
from safetensors.torch import load_file
from torch import Tensor

from modules.media.reading import read_image
from tests.faults.messages import succeed_here
from tests.parity.reference import covering, relative_error, to_pixels

# Of the largest value, in float32: what the project promises. Both sides round each product differently and
# diffusers has its timestep embedding in float32, which a small gradient shows most. Measured: latents and
# caches 1e-6 to 1e-5, gradients up to 4e-5; the smallest wrong detail that test_generation.py tries is above
# 3e-4.
TOLERANCE = 1e-4


def models_in(folder: Path) -> list[str]:
    """The options that name the models of a folder written by `write_tiny_wan`."""
    return [
        word
        for name in ("dit", "vae", "t5", "clip")
        for word in (f"--{name}", str(folder / f"{name}.safetensors"))
    ]


def generate(out: Path, models: Path, task: str, *arguments: object) -> Tensor:
    """Run wan_generate_video.py in `out`; the latents 16 F h w of the one file it leaves in `made`."""
    out.mkdir(parents=True, exist_ok=True)
    options = [*models_in(models), "--task", task, "--save_path", "made", "--output_type", "latent"]
    succeed_here("wan_generate_video.py", *options, "--device", "cpu", *arguments, folder=out)
    return latents_in(out / "made")


def latents_in(folder: Path) -> Tensor:
    """The latents of the only file of them there."""
    (path,) = folder.glob("*_latent.safetensors")
    return load_file(path)["latent"]


def image_in(folder: Path) -> Tensor:
    """The levels H W 3 of the only picture there, 0..255."""
    (path,) = (path for path in folder.glob("*.png") if "rcm" not in path.name)
    return torch.from_numpy(read_image(path)).float()


def assert_equal(ours: Tensor, expected: Tensor, what: str = "", tolerance: float = TOLERANCE) -> None:
    """Within the tolerance of the largest expected value; says by how much they differ."""
    error = relative_error(ours, expected)
    print(f"parity {what}: {error:.2e}")  # noqa: T201 (shown with pytest -s, and where a test fails)
    assert error <= tolerance, f"{what}: relative error {error:.2e}, allowed {tolerance:.0e}"


def assert_as_exact(ours: Tensor, theirs: Tensor, exact: Tensor, what: str = "") -> None:
    """What we compute in 16 bits is no further from the same computed in float32 than theirs in 16 bits, both
    as vectors.

    Half as far again is allowed: both are sums of thousands of roundings, and of tiny models one seed is not
    like another.
    """
    assert ours.shape == theirs.shape == exact.shape
    wanted = exact.float()
    ours_off, theirs_off = (
        float((found.float() - wanted).norm() / wanted.norm()) for found in (ours, theirs)
    )
    print(f"parity {what}: {ours_off:.2e}, theirs {theirs_off:.2e}")  # noqa: T201 (as above)
    assert 0 < theirs_off < 5e-2, f"{what}: the reference is {theirs_off:.2e} from its own float32"
    assert ours_off <= 1.5 * theirs_off, (
        f"{what}: {ours_off:.2e} from float32, the reference {theirs_off:.2e}"
    )


Frames = list[numpy.ndarray]  # H W 3 uint8 each
STEP = 16


def decoded(path: Path) -> Frames:
    """All frames of a video."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def dropped_to(frames: Sequence[numpy.ndarray], source_fps: float, target_fps: float = 16.0) -> Frames:
    """The frames that stay: a running sum, kept wherever its whole part changes (formats.md, section 2)."""
    kept, position, last = [], 0.0, -1
    for frame in frames:
        slot = int(position)
        position += target_fps / source_fps
        if slot != last:
            kept.append(frame)
            last = slot
    return kept


def bucket_for(width: int, height: int, resolution: tuple[int, int]) -> tuple[int, int]:
    """Width and height of the bucket, with enable_bucket."""
    area = resolution[0] * resolution[1]
    side = int(math.sqrt(area))
    sizes = set()
    for short in range(side // 2 // STEP * STEP, side + STEP, STEP):
        if short:
            long = area // short // STEP * STEP
            sizes |= {(short, long), (long, short)}
    return min(sorted(sizes), key=lambda size: abs(size[0] / size[1] - width / height))


def in_bucket(frames: Sequence[numpy.ndarray], bucket: tuple[int, int]) -> Tensor:
    """1 3 F H W in -1..1."""
    return to_pixels([covering(frame, bucket[1], bucket[0]) for frame in frames])


def training_key(name: str) -> str:
    """The name under which the known tuners' training finds a tensor of a cache (formats.md, section 3)."""
    name = name.removeprefix("varlen_")
    if name.endswith("_mask"):
        return name
    name = name[: name.rindex("_")]
    return name[: name.rindex("_")] if name.startswith("latents_") else name
