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

# frames on disk, sections of 9 latent frames
CLIPS = {"one": (40, 1), "two": (76, 2), "five": (181, 5), "six": (220, 6)}
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
PICTURES = """
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

    @property
    def in_float16(self) -> framepack.Encoders:
        return replace(self.encoders, vae_dtype=torch.float16)

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

    def clip(self, name: str, source_fps: float | None = None) -> list[numpy.ndarray]:
        """The frames of a clip as the model sees them."""
        frames = decoded(self.folder / "clips" / f"{name}.mp4")
        kept = frames if source_fps is None else dropped_to(frames, source_fps, 30.0)
        return [covering(frame, 32, 32) for frame in kept]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("a project")
    for name in ("clips", "pictures", "controls"):
        (folder / name).mkdir()
    for seed, (name, (frames, _)) in enumerate(CLIPS.items()):
        write_video(folder / "clips" / f"{name}.mp4", moving_square(frames, 48, 40, seed), fps=30)
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


def assert_sections(
    project: Project,
    cache: Path,
    name: str,
    frames: list[numpy.ndarray],
    window: int,
    sections: int,
    rules: Rules,
) -> None:
    """The files of one clip: their names, the names of their tensors, and all numbers. frames: of the
    item.
    """
    stem = f"{name}_00000-{len(frames):03d}"
    used = frames[: 4 * window * sections + 1]
    expected = rules(project.encoders.latents(used, generator_of(f"{stem}_0032x0032_fp")), window)
    assert len(expected) == sections
    features = project.encoders.features(frames[0])
    files = sorted(path.name for path in cache.glob(f"{stem}-*"))
    assert files == [f"{stem}-{section:04d}_0032x0032_fp.safetensors" for section in range(len(expected))]
    for section, file in enumerate(files):
        tensors, metadata = read(cache / file)
        known = {"architecture": "framepack", "width": "32", "height": "32", "format_version": "1.0.1"}
        known |= {"frame_count": str(len(frames))}
        assert {key: metadata[key] for key in known} == known
        grid = f"{window}x4x4_float32"
        assert tensors.keys() == {
            *(f"{latents}_{grid}" for latents in LATENTS),
            *(f"{indices}_int64" for indices in INDICES),
            "image_embeddings_float32",
        }
        for key, theirs in expected[section].items():
            ours = next(tensor for tensor_name, tensor in tensors.items() if training_key(tensor_name) == key)
            if key in INDICES or not theirs.any():  # whole numbers, and what is black
                assert torch.equal(ours, theirs), (section, key)
            else:
                assert_equal(ours, theirs, f"{name} section {section} {key}")
        assert_equal(tensors["image_embeddings_float32"], features, f"{name} features")


ORDERS = [
    pytest.param((), framepack.anti_drifting_sections, id="anti-drifting"),
    pytest.param(("--f1",), framepack.f1_sections, id="f1"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("switches", "rules"), ORDERS)
def test_sections_of_clips_are_those_of_the_documented_rules(
    project: Project, switches: tuple[str, ...], rules: Rules
) -> None:
    """Clips of one, two and five sections, which are encoded whole, and a longer one; a rest of frames is
    left out.
    """
    more = 'frame_extraction = "full"\nmax_frames = 1000'
    cache = project.cache(f"rules{' '.join(switches)}", DATASET, *switches, more=more)
    for name, (frames, sections) in CLIPS.items():
        assert_sections(
            project, cache, name, project.clip(name)[: (frames - 1) // 4 * 4 + 1], 9, sections, rules
        )


@pytest.mark.parametrize(("switches", "rules"), ORDERS)
def test_another_window_is_followed(project: Project, switches: tuple[str, ...], rules: Rules) -> None:
    """Sections of two latent frames out of a clip with another rate: one, two and five of them, the last with
    frames left over.
    """
    more = "target_frames = [9, 17, 45]\nfp_latent_window_size = 2\nsource_fps = 40.0"
    cache = project.cache(f"window{' '.join(switches)}", DATASET, *switches, more=more)
    frames = project.clip("two", 40.0)
    for length, sections in {9: 1, 17: 2, 45: 5}.items():
        assert_sections(project, cache, "two", frames[:length], 2, sections, rules)


@pytest.mark.parametrize(
    ("switches", "no_post"),
    [((), False), (("--one_frame_no_2x",), True), (("--one_frame_no_2x", "--one_frame_no_4x"), False)],
)
def test_pictures_are_those_of_the_documented_rules(
    project: Project, switches: tuple[str, ...], no_post: bool
) -> None:
    """Two control images at places of their own; where an image or a control image is transparent its latents
    are 0.
    """
    keys = "fp_1f_clean_indices = [0, 10]\nfp_1f_target_index = 5\nfp_latent_window_size = 7"
    more = f"{keys}\nfp_1f_no_post = {str(no_post).lower()}"
    cache = project.cache(f"pictures {len(switches)}", PICTURES, "--one_frame", *switches, more=more)

    coarse = {"clean_latent_2x_indices": range(9, 11), "clean_latent_4x_indices": range(11, 27)}
    left_out = {f"clean_latent_{switch[-2:]}_indices" for switch in switches}
    coarse = {name: places for name, places in coarse.items() if name not in left_out}
    assert_pictures(project, cache, [0, 10], 5, None if no_post else 8, coarse)


def test_pictures_without_keys_have_one_control_image_and_the_usual_places(project: Project) -> None:
    cache = project.cache("pictures usual", PICTURES, "--one_frame")
    coarse = {"clean_latent_2x_indices": range(11, 13), "clean_latent_4x_indices": range(13, 29)}
    assert_pictures(project, cache, [0], 9, 10, coarse)


def assert_pictures(
    project: Project,
    cache: Path,
    places: list[int],
    target_index: int,
    post_index: int | None,
    coarse: dict[str, range],
) -> None:
    assert sorted(path.name for path in cache.iterdir()) == [
        "cut_0096x0064_fp.safetensors",
        "plain_0096x0064_fp.safetensors",
    ]
    for name in ("cut", "plain"):
        expected = expected_picture(project, project.encoders, name, places, target_index, post_index, coarse)
        tensors, metadata = read(cache / f"{name}_0096x0064_fp.safetensors")
        assert metadata["architecture"] == "framepack"
        assert "frame_count" not in metadata
        assert tensors.keys() == {
            *("latents_1x4x6_float32", "latents_clean_1x4x6_float32", "image_embeddings_float32"),
            *(f"{key}_int64" for key in expected if key in INDICES),
        }
        for tensor_name, ours in tensors.items():
            assert_equal(ours, expected[training_key(tensor_name)], f"{name} {tensor_name}")


def expected_picture(
    project: Project,
    encoders: framepack.Encoders,
    name: str,
    places: list[int],
    target_index: int,
    post_index: int | None,
    coarse: dict[str, range],
) -> framepack.Section:
    target = in_bucket(project.folder / "pictures" / f"{name}.png")
    controls = [
        in_bucket(project.folder / "controls" / f"{name}_{index}.png") for index in range(len(places))
    ]
    generator = generator_of(f"{name}_0096x0064_fp")
    return framepack.one_frame_section(
        encoders, target, controls, generator, places, target_index, post_index, coarse
    )


def in_bucket(path: Path) -> framepack.Picture:
    """An image file at 48 x 32, its colours and its transparency apart."""
    pixels = numpy.asarray(Image.open(path))
    alpha = numpy.ascontiguousarray(pixels[..., 3]) if pixels.shape[2] == 4 else None
    return framepack.Picture(
        covering(numpy.ascontiguousarray(pixels[..., :3]), 32, 48),
        None if alpha is None else covering(alpha, 32, 48),
    )


# of a cache, and what theirs and the exact ones hold
File = tuple[dict[str, Tensor], framepack.Section, framepack.Section]


@pytest.mark.parametrize(("switches", "rules"), ORDERS)
def test_without_a_dtype_sections_are_float16(
    project: Project, switches: tuple[str, ...], rules: Rules
) -> None:
    more = "target_frames = [17]\nfp_latent_window_size = 2"
    cache = project.cache(f"half{' '.join(switches)}", DATASET, *switches, more=more, dtype=None)
    frames = project.clip("two")[:17]
    theirs, exact = (
        rules(encoders.latents(frames, generator_of("two_00000-017_0032x0032_fp")), 2)
        for encoders in (project.in_float16, project.encoders)
    )
    features = {"image_embeddings": project.encoders.features(frames[0])}
    files: list[File] = []
    for section in range(2):
        tensors, _ = read(cache / f"two_00000-017-{section:04d}_0032x0032_fp.safetensors")
        files.append((tensors, theirs[section] | features, exact[section] | features))
    assert_float16(files, "latents_2x4x4_float16", f"sections{' '.join(switches)}")


def assert_float16(files: list[File], target: str, what: str) -> None:
    """Latents, all together, are as exact as diffusers' in float16.

    On a CPU SigLIP computes in float32, rounded at the end.
    """
    latents: list[tuple[Tensor, Tensor, Tensor]] = []
    for tensors, theirs, exact in files:
        assert {target, "image_embeddings_float16"} <= tensors.keys()
        for name, ours in tensors.items():
            key = training_key(name)
            if key in INDICES or not exact[key].any():
                assert torch.equal(ours, exact[key].to(ours.dtype)), (what, key)
                continue
            assert ours.dtype == torch.float16, name
            if key == "image_embeddings":
                assert_equal(ours, exact[key], f"{what} {key}", ROUNDED)
            else:
                latents.append((ours.flatten(), theirs[key].flatten(), exact[key].flatten()))
    assert_as_exact(*(torch.cat(parts) for parts in zip(*latents, strict=True)), f"{what} in float16")
