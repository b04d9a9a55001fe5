"""FramePack's caches written by the command line hold what diffusers and transformers make of independently
decoded frames.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

import fpack_cache_latents
from modules.media.writing import write_video
from modules.seeds import derive_seed
from tests.parity import framepack
from tests.parity.reference import covering
from tests.parity.running import assert_as_exact, assert_equal, decoded, dropped_to, training_key
from tests.tiny.framepack import write_siglip
from tests.tiny.hunyuan_vae import write_vae
from tests.tiny.project import moving_square

INDICES = {"latent_indices", "clean_latent_indices", "clean_latent_2x_indices", "clean_latent_4x_indices"}
LATENTS = {"latents", "latents_clean", "latents_clean_2x", "latents_clean_4x"}
ROUNDED = 1e-3  # float16, stored with 11 bits
Rules = Callable[[Tensor, int], dict[int, framepack.Section]]  # latents of a clip, window -> its sections
DATASET = """
[[datasets]]
video_directory = "{folder}/clips"
cache_directory = "{folder}/cache {name}"
resolution = [32, 32]
{more}
"""
IMAGES = """
[[datasets]]
image_directory = "{folder}/pictures"
control_directory = "{folder}/controls"
cache_directory = "{folder}/cache {name}"
resolution = [48, 32]
{more}
"""


@dataclass(frozen=True)
class Project:
    """Clips, pictures with control images, and the models they are cached with."""

    folder: Path
    encoders: framepack.Encoders

    def cache(
        self, name: str, dataset: str, *switches: str, more: str = "", dtype: str | None = "float32"
    ) -> Path:
        """Run fpack_cache_latents.py on a dataset in this process, which saves the start of Python; the
        folder of its caches.
        """
        config = self.folder / f"{name}.toml"
        config.write_text(
            dataset.format(folder=self.folder.as_posix(), name=name, more=more), encoding="utf-8"
        )
        models = ["--vae", str(self.encoders.vae), "--image_encoder", str(self.encoders.siglip)]
        dtypes = [] if dtype is None else ["--vae_dtype", dtype]
        fpack_cache_latents.main(
            ["--dataset_config", str(config), "--device", "cpu", *models, *dtypes, *switches]
        )
        return self.folder / f"cache {name}"

    def clip(self, source_fps: float = 30.0) -> list[numpy.ndarray]:
        """The frames of the clip as the model sees them."""
        kept = dropped_to(decoded(self.folder / "clips" / "clip.mp4"), source_fps, 30.0)
        return [covering(frame, 32, 32) for frame in kept]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("a project")
    for name in ("clips", "pictures", "controls"):
        (folder / name).mkdir()
    write_video(folder / "clips" / "clip.mp4", moving_square(76, 48, 40, 1), fps=30)
    random = numpy.random.default_rng(3)
    shapes = {"pictures/plain": 3, "pictures/cut": 4, "controls/plain_0": 3, "controls/plain_1": 4}
    shapes |= {"controls/cut_0": 4, "controls/cut_1": 3}
    for name, channels in shapes.items():
        small = random.integers(0, 256, (6, 8, channels), dtype=numpy.uint8)
        side = (96, 64) if name.startswith("pictures") else (30, 20)  # made smaller; made larger
        Image.fromarray(small).resize(side, Image.Resampling.NEAREST).save(folder / f"{name}.png")
    return Project(
        folder,
        framepack.Encoders(
            write_vae(folder / "vae.safetensors"), write_siglip(folder / "siglip.safetensors")
        ),
    )


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def generator_of(stem: str) -> torch.Generator:
    """What the posterior of an item is sampled with."""
    return torch.Generator().manual_seed(derive_seed("posterior", stem))


ORDERS = [
    pytest.param((), framepack.anti_drifting_sections, id="anti-drifting"),
    pytest.param(("--f1",), framepack.f1_sections, id="f1"),
]


@pytest.mark.parametrize(("switches", "rules"), ORDERS)
def test_sections_are_those_of_the_documented_rules(
    project: Project, switches: tuple[str, ...], rules: Rules
) -> None:
    """Sections of two latent frames out of a clip with another rate: one, two and five of them, the last with
    frames left over.
    """
    more = "target_frames = [9, 17, 45]\nfp_latent_window_size = 2\nsource_fps = 40.0"
    cache = project.cache(f"window{' '.join(switches)}", DATASET, *switches, more=more)
    clip = project.clip(40.0)
    features = project.encoders.features(clip[0])
    for length, sections in {9: 1, 17: 2, 45: 5}.items():
        stem = f"clip_00000-{length:03d}"
        latents = project.encoders.latents(clip[: 8 * sections + 1], generator_of(f"{stem}_0032x0032_fp"))
        expected = rules(latents, 2)
        files = sorted(path.name for path in cache.glob(f"{stem}-*"))
        assert files == [f"{stem}-{section:04d}_0032x0032_fp.safetensors" for section in range(sections)]
        for section, file in enumerate(files):
            tensors, metadata = read(cache / file)
            known = {"architecture": "framepack", "width": "32", "height": "32", "format_version": "1.0.1"}
            assert metadata.items() >= (known | {"frame_count": str(length)}).items()
            assert tensors.keys() == {
                *(f"{latents}_2x4x4_float32" for latents in LATENTS),
                *(f"{indices}_int64" for indices in INDICES),
                "image_embeddings_float32",
            }
            assert_tensors(tensors, expected[section] | {"image_embeddings": features}, f"section {section}")


def assert_tensors(tensors: dict[str, Tensor], expected: framepack.Section, what: str) -> None:
    """Whole numbers and what is black are equal to the bit."""
    for name, ours in tensors.items():
        theirs = expected[training_key(name)]
        if not theirs.is_floating_point() or not theirs.any():
            assert torch.equal(ours, theirs), (what, name)
        else:
            assert_equal(ours, theirs, f"{what} {name}")


COARSE = {"clean_latent_2x_indices": range(9, 11), "clean_latent_4x_indices": range(11, 27)}
KEYS = "fp_1f_clean_indices = [0, 10]\nfp_1f_target_index = 5\nfp_latent_window_size = 7\n"
NO_POST = f"{KEYS}fp_1f_no_post = true"
NO_2X, NO_4X = "--one_frame_no_2x", "--one_frame_no_4x"
DEFAULT = {"clean_latent_2x_indices": range(11, 13), "clean_latent_4x_indices": range(13, 29)}
# switches, keys of the table, places of control images, of the target, of the black frame, of coarse frames
IMAGES_AS: dict[str, tuple[tuple[str, ...], str, list[int], int, int | None, dict[str, range]]] = {
    "usual": ((), "", [0], 9, 10, DEFAULT),
    "keys": ((), KEYS, [0, 10], 5, 8, COARSE),
    "no 2x, no post": ((NO_2X,), NO_POST, [0, 10], 5, None, {"clean_latent_4x_indices": range(11, 27)}),
    "no 2x, no 4x": ((NO_2X, NO_4X), KEYS, [0, 10], 5, 8, {}),
}


@pytest.mark.parametrize("name", IMAGES_AS)
def test_pictures_are_those_of_the_documented_rules(project: Project, name: str) -> None:
    """Two control images at places of their own; where an image or a control image is transparent its latents
    are 0.
    """
    switches, keys, *places = IMAGES_AS[name]

    cache = project.cache(f"pictures {name}", IMAGES, "--one_frame", *switches, more=keys)

    files = {f"{image}_0096x0064_fp" for image in ("cut", "plain")}
    assert {path.stem for path in cache.glob("*.safetensors")} == files
    for file in files:
        tensors, metadata = read(cache / f"{file}.safetensors")
        assert metadata["architecture"] == "framepack"
        assert "frame_count" not in metadata
        expected = expected_image(project, file, *places)
        assert tensors.keys() == {
            *("latents_1x4x6_float32", "latents_clean_1x4x6_float32", "image_embeddings_float32"),
            *(f"{key}_int64" for key in expected if key in INDICES),
        }
        assert_tensors(tensors, expected, file)


def expected_image(
    project: Project,
    file: str,
    places: list[int],
    target_index: int,
    post_index: int | None,
    coarse: dict[str, range],
) -> framepack.Section:
    name = file.partition("_")[0]
    target = in_bucket(project.folder / "pictures" / f"{name}.png")
    controls = [
        in_bucket(project.folder / "controls" / f"{name}_{index}.png") for index in range(len(places))
    ]
    where = (places, target_index, post_index, coarse)
    return framepack.one_frame_section(project.encoders, target, controls, generator_of(file), *where)


def in_bucket(path: Path) -> framepack.Picture:
    """An image file at 48 x 32, its colors and its transparency apart."""
    pixels = numpy.asarray(Image.open(path))
    alpha = numpy.ascontiguousarray(pixels[..., 3]) if pixels.shape[2] == 4 else None
    return framepack.Picture(
        covering(numpy.ascontiguousarray(pixels[..., :3]), 32, 48),
        None if alpha is None else covering(alpha, 32, 48),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("switches", "rules"), ORDERS)
def test_without_a_dtype_sections_are_as_exact_as_diffusers_in_float16(
    project: Project, switches: tuple[str, ...], rules: Rules
) -> None:
    """Latents, all together. On a CPU SigLIP computes in float32, rounded at the end."""
    more = "target_frames = [17]\nfp_latent_window_size = 2"
    cache = project.cache(f"half{' '.join(switches)}", DATASET, *switches, more=more, dtype=None)
    frames = project.clip()[:17]
    half = replace(project.encoders, vae_dtype=torch.float16)
    theirs, exact = (
        rules(encoders.latents(frames, generator_of("clip_00000-017_0032x0032_fp")), 2)
        for encoders in (half, project.encoders)
    )
    features, latents = project.encoders.features(frames[0]), []
    for section in range(2):
        tensors, _ = read(cache / f"clip_00000-017-{section:04d}_0032x0032_fp.safetensors")
        found = {training_key(name): tensor for name, tensor in tensors.items()}
        assert {"latents_2x4x4_float16", "image_embeddings_float16"} <= tensors.keys()
        assert_equal(found["image_embeddings"], features, f"features of section {section}", ROUNDED)
        for key in LATENTS:
            assert found[key].dtype == torch.float16
            latents.append([one.flatten() for one in (found[key], theirs[section][key], exact[section][key])])
    assert_as_exact(*(torch.cat(parts) for parts in zip(*latents, strict=True)), "sections in float16")
