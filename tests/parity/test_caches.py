"""Caches written by the command line hold what diffusers' VAE and transformers' encoders make of
independently decoded frames.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from modules.media.writing import write_png, write_video
from tests.faults.messages import succeed_here
from tests.parity import reference
from tests.parity.reference import open_image
from tests.parity.running import (
    assert_as_exact,
    assert_equal,
    bucket_for,
    decoded,
    dropped_to,
    in_bucket,
    training_key,
)
from tests.parity.theirs import Theirs
from tests.tiny.project import moving_square
from tests.tiny.wan import write_tiny_wan
from tests.tiny.wan_encoders import t5_tensors, write_tokenizer

FLOAT16 = 1e-3  # image features are stored in 11 bits
CAPTIONS = {
    "clip_one": "a  rabbit &amp; a squirrel",
    "clip_two": "waves，foam",
    "pic": "a red apple in the morning light",
}
DATASET = """
[general]
caption_extension = ".txt"
batch_size = 2
enable_bucket = true

[[datasets]]
video_directory = "{folder}/clips"
cache_directory = "{folder}/cache/clips"
control_directory = "{folder}/control"
resolution = [64, 48]
target_frames = [1, 5]
frame_extraction = "chunk"
source_fps = 24

[[datasets]]
image_directory = "{folder}/pictures"
cache_directory = "{folder}/cache/pictures"
resolution = [48, 48]
"""
RESOLUTION = (64, 48)


@dataclass(frozen=True)
class Cached:
    """A project of two clips and a picture, and the models it was cached with."""

    folder: Path
    theirs: Theirs

    def clip(self, name: str, place: str = "clips") -> Tensor:
        """The kept frames in their bucket: 1 3 F H W.

        A control clip has the bucket of its clip, not its own.
        """
        frames = decoded(self.folder / place / f"{name}.mp4")
        of_clip = decoded(self.folder / "clips" / f"{name}.mp4")[0]
        return in_bucket(dropped_to(frames, 24), bucket_for(of_clip.shape[1], of_clip.shape[0], RESOLUTION))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a dataset")
    write_tiny_wan(folder / "models", "i2v")
    for name, frames, width, height in (("clip_one", 18, 100, 60), ("clip_two", 9, 40, 70)):
        for place, seed in (("clips", frames), ("control", frames + 1)):
            (folder / place).mkdir(exist_ok=True)
            write_video(folder / place / f"{name}.mp4", moving_square(frames, width, height, seed), fps=24)
        (folder / "clips" / f"{name}.txt").write_text(f" {CAPTIONS[name]}\n", encoding="utf-8")
    (folder / "pictures").mkdir()
    image = numpy.random.default_rng(1).integers(0, 256, (90, 30, 3), dtype=numpy.uint8)
    write_png(folder / "pictures" / "pic.png", image)
    (folder / "pictures" / "pic.txt").write_text(CAPTIONS["pic"], encoding="utf-8")
    (folder / "dataset.toml").write_text(DATASET.format(folder=folder.as_posix()), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def cached(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Cached:
    """Latents with image conditions in float32 and texts, made from another folder."""
    elsewhere, models = tmp_path_factory.mktemp("elsewhere"), project / "models"
    dataset = ("--dataset_config", project / "dataset.toml")
    exact = ("--vae", models / "vae.safetensors", "--vae_dtype", "float32")
    clip, t5 = ("--clip", models / "clip.safetensors"), ("--t5", models / "t5.safetensors")
    succeed_here("wan_cache_latents.py", *dataset, *exact, *clip, folder=elsewhere)
    succeed_here("wan_cache_text_encoder_outputs.py", *dataset, *t5, folder=elsewhere)
    return Cached(project, Theirs(models))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 (it is not a dictionary)


def foreign_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """All but our record, which other tools ignore."""
    return {name: value for name, value in metadata.items() if not name.startswith("reelsmith_")}


@pytest.mark.slow
def test_the_files_have_the_known_names(cached: Cached) -> None:
    """At 24 frames a second clip_one keeps 12 of its 18 frames (two spans of 5, twelve of 1), clip_two 6 of
    9.
    """
    width, height = bucket_for(40, 70, RESOLUTION)
    assert bucket_for(100, 60, RESOLUTION) == RESOLUTION
    spans = {f"clip_one_{start:05d}-001_0064x0048" for start in range(12)}
    spans |= {f"clip_one_{start:05d}-005_0064x0048" for start in (0, 5)}
    spans |= {f"clip_two_{start:05d}-001_{width:04d}x{height:04d}" for start in range(6)}
    spans |= {f"clip_two_00000-005_{width:04d}x{height:04d}"}

    caches = cached.folder / "cache"
    clips, images = (
        {path.name for path in (caches / table).glob("*.safetensors")} for table in ("clips", "pictures")
    )

    assert clips == {f"{span}_wan.safetensors" for span in spans} | {
        f"clip_{name}_wan_te.safetensors" for name in ("one", "two")
    }
    assert images == {"pic_0030x0090_wan.safetensors", "pic_wan_te.safetensors"}


@pytest.mark.parametrize("span", [(5, 5), (11, 1)])
def test_latents_and_image_conditions_of_a_clip_equal_those_of_diffusers(
    cached: Cached, span: tuple[int, int]
) -> None:
    start, frames = span
    path = cached.folder / "cache" / "clips" / f"clip_one_{start:05d}-{frames:03d}_0064x0048_wan.safetensors"
    theirs, pixels = cached.theirs, cached.clip("clip_one")[:, :, start : start + frames]
    control = cached.clip("clip_one", "control")[:, :, start : start + frames]

    tensors, metadata = read(path)

    assert {training_key(name) for name in tensors} == {"latents", "latents_control", "latents_image", "clip"}
    size = f"{(frames - 1) // 4 + 1}x6x8"
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()} == {
        f"latents_{size}_float32": ((16, (frames - 1) // 4 + 1, 6, 8), torch.float32),
        f"latents_control_{size}_float32": ((16, (frames - 1) // 4 + 1, 6, 8), torch.float32),
        f"latents_image_{size}_float32": ((20, (frames - 1) // 4 + 1, 6, 8), torch.float32),
        "clip_float16": ((257, 160), torch.float16),
    }
    assert foreign_metadata(metadata) == {
        "architecture": "wan",
        "width": "64",
        "height": "48",
        "format_version": "1.0.1",
        "frame_count": str(frames),
    }
    assert_equal(tensors[f"latents_{size}_float32"], theirs.encode(pixels)[0], f"latents {span}")
    assert_equal(tensors[f"latents_control_{size}_float32"], theirs.encode(control)[0], f"control {span}")
    image = reference.image_condition(theirs, pixels[:, :, :1], frames)
    assert_equal(tensors[f"latents_image_{size}_float32"], image, f"image {span}")
    assert_equal(tensors["clip_float16"], theirs.image_features(pixels[:, :, 0])[0], f"clip {span}", FLOAT16)


def test_latents_of_a_picture_equal_those_of_diffusers(cached: Cached) -> None:
    """The name contains the size of the original, the tensors have that of the bucket."""
    image = open_image(cached.folder / "pictures" / "pic.png")
    pixels = in_bucket([image], bucket_for(30, 90, (48, 48)))

    tensors, metadata = read(cached.folder / "cache" / "pictures" / "pic_0030x0090_wan.safetensors")

    rows, columns = pixels.shape[-2] // 8, pixels.shape[-1] // 8
    assert foreign_metadata(metadata) == {
        "architecture": "wan",
        "width": "30",
        "height": "90",
        "format_version": "1.0.1",
    }
    assert tensors.keys() == {
        f"latents_1x{rows}x{columns}_float32",
        f"latents_image_1x{rows}x{columns}_float32",
        "clip_float16",
    }
    assert_equal(tensors[f"latents_1x{rows}x{columns}_float32"], cached.theirs.encode(pixels)[0], "picture")


@pytest.mark.parametrize(("table", "stem"), [("clips", "clip_one"), ("clips", "clip_two")])
def test_texts_equal_those_of_transformers(cached: Cached, table: str, stem: str) -> None:
    tensors, metadata = read(cached.folder / "cache" / table / f"{stem}_wan_te.safetensors")

    assert foreign_metadata(metadata) == {
        "architecture": "wan",
        "caption1": CAPTIONS[stem],
        "format_version": "1.0.1",
    }
    assert tensors.keys() == {"varlen_t5_float32"}
    assert {training_key(name) for name in tensors} == {"t5"}
    assert_equal(tensors["varlen_t5_float32"], cached.theirs.text(CAPTIONS[stem]), f"text of {stem}")


def test_texts_of_a_bfloat16_encoder_have_the_known_name(
    project: Path, cached: Cached, tmp_path: Path
) -> None:
    models = project / "models" / "bf16"
    models.mkdir()
    save_file(t5_tensors(dtype=torch.bfloat16), models / "t5.safetensors")
    write_tokenizer(models / "google" / "umt5-xxl")
    images_only(project, tmp_path, "te")

    words = ("--dataset_config", "dataset.toml", "--t5", models / "t5.safetensors")
    succeed_here("wan_cache_text_encoder_outputs.py", *words, folder=tmp_path)

    ((name, rows),) = read(project / "cache te" / "pictures" / "pic_wan_te.safetensors")[0].items()
    assert (name, rows.dtype) == ("varlen_t5_bfloat16", torch.bfloat16)
    exact, theirs = Theirs(models), Theirs(models)
    theirs.t5.bfloat16()
    assert_as_exact(rows, theirs.text(CAPTIONS["pic"]), exact.text(CAPTIONS["pic"]), "bfloat16 text")


def test_first_and_last_frame_conditions_equal_those_of_diffusers(
    project: Path, cached: Cached, tmp_path: Path
) -> None:
    text = (project / "dataset.toml").read_text(encoding="utf-8").split("[[datasets]]")
    (tmp_path / "dataset.toml").write_text(
        "[[datasets]]".join(text[:2])
        .replace("/cache/", "/cache flf2v/")
        .replace("target_frames = [1, 5]", "target_frames = [5]"),
        encoding="utf-8",
    )
    words = ("--dataset_config", "dataset.toml", "--vae", project / "models" / "vae.safetensors")
    clip = ("--clip", project / "models" / "clip.safetensors", "--flf2v")

    succeed_here("wan_cache_latents.py", *words, *clip, "--vae_dtype", "fp32", folder=tmp_path)

    tensors, _ = read(project / "cache flf2v" / "clips" / "clip_one_00005-005_0064x0048_wan.safetensors")
    theirs, pixels = cached.theirs, cached.clip("clip_one")[:, :, 5:10]
    first, last = pixels[:, :, :1], pixels[:, :, -1:]
    condition = reference.first_last_condition(theirs, first, last, 5)
    assert_equal(tensors["latents_image_2x6x8_float32"], condition, "flf2v condition")
    features = torch.cat([theirs.image_features(image[:, :, 0])[0] for image in (first, last)])
    assert_equal(tensors["clip_float16"], features, "flf2v clip", FLOAT16)


def test_without_a_dtype_latents_are_bfloat16(project: Path, cached: Cached, tmp_path: Path) -> None:
    images_only(project, tmp_path, "bf16")
    image = in_bucket([open_image(project / "pictures" / "pic.png")], bucket_for(30, 90, (48, 48)))

    words = ("--dataset_config", "dataset.toml", "--vae", project / "models/vae.safetensors")
    succeed_here("wan_cache_latents.py", *words, folder=tmp_path)

    cache = project / "cache bf16" / "pictures" / "pic_0030x0090_wan.safetensors"
    ((name, latents),) = read(cache)[0].items()
    assert name == f"latents_1x{image.shape[-2] // 8}x{image.shape[-1] // 8}_bfloat16"
    assert latents.dtype == torch.bfloat16
    theirs = Theirs(project / "models")
    theirs.vae.bfloat16()
    assert_as_exact(latents, theirs.encode(image.bfloat16())[0], cached.theirs.encode(image)[0], "bfloat16")


def images_only(project: Path, folder: Path, mark: str) -> None:
    """dataset.toml in `folder` with the table of pictures alone, cached below `cache <mark>`."""
    text = (project / "dataset.toml").read_text(encoding="utf-8").split("[[datasets]]")
    text = "[[datasets]]".join([text[0], text[2]]).replace("/cache/", f"/cache {mark}/")
    (folder / "dataset.toml").write_text(text, encoding="utf-8")
