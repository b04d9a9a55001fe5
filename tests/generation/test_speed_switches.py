"""Speed switches act as they say in every family, and are neutral where they cannot act."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from modules.errors import OptionError
from modules.media.reading import read_image
from tests.media_tags import read_tags
from tests.tiny.families import ONE_OF_EACH, TinyFamily, write_for_anywhere

SIZE = ["--video_size", "32", "32", "--infer_steps", "2", "--device", "cpu", "--seed", "1"]
SIZE += ["--prompt", "a cat"]


@pytest.fixture(scope="module", params=ONE_OF_EACH, ids=lambda one: one.name)
def float32(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    """A family whose commands name whole paths."""
    family: TinyFamily = request.param
    return write_for_anywhere(family, tmp_path_factory.mktemp("project"))


def rewritten(family: TinyFamily, name: str, mixed: bool = False) -> TinyFamily:
    """The family with its transformer's weights in bfloat16; mixed: only the matrices of blocks."""
    place = family.generate.index("--dit") + 1
    tensors = load_file(family.generate[place])
    path = Path(family.generate[place]).with_name(f"{name}.safetensors")
    save_file(
        {
            key: tensor.bfloat16() if not mixed or ("blocks." in key and tensor.ndim == 2) else tensor
            for key, tensor in tensors.items()
        },
        path,
    )
    words = [*family.generate]
    words[place] = str(path)
    return replace(family, generate=words)


@pytest.fixture(scope="module")
def bfloat16(float32: TinyFamily) -> TinyFamily:
    return rewritten(float32, "bfloat16")


def run(family: TinyFamily, folder: Path, *more: str) -> Path:
    words = [*family.generate, *SIZE, "--save_path", str(folder), *more]
    importlib.import_module(words[0].removesuffix(".py")).main(words[1:])
    return folder


def latents(family: TinyFamily, folder: Path, *more: str) -> Tensor:
    (path,) = run(family, folder, "--output_type", "latent", *more).glob("*_latent.safetensors")
    return load_file(path)["latent"]


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_upcast_linear_computes_fp8_layers_in_float32(bfloat16: TinyFamily, tmp_path: Path) -> None:
    """The formula of a layer is in tests/modules/fp8/test_weights.py; here it arrives in the script."""
    scaled = latents(bfloat16, tmp_path / "scaled", "--fp8_scaled")
    wide = latents(bfloat16, tmp_path / "wide", "--fp8_scaled", "--upcast_linear")
    assert 1e-6 < apart(wide, scaled) < 0.05


def test_upcast_linear_without_fp8_is_an_error_in_every_script(float32: TinyFamily, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--upcast_linear needs --fp8_scaled"):
        run(float32, tmp_path, "--upcast_linear")
    assert not list(tmp_path.iterdir())


def test_the_last_frame_of_a_video_and_of_decoded_latents(float32: TinyFamily, tmp_path: Path) -> None:
    folder = run(float32, tmp_path / "made", "--output_type", "both", "--save_last_frame", "--keep_pngs")
    (video,), (last,), (latent,) = (
        [*folder.glob(kind)] for kind in ("*.mp4", "*_last.png", "*_latent.safetensors")
    )
    assert last.name == f"{video.stem}_last.png"
    frames = sorted((folder / "frames").iterdir())
    assert (read_image(last) == read_image(frames[-1])).all()
    assert read_tags(last) == read_tags(frames[-1])

    again = run(float32, tmp_path / "again", "--latent_path", str(latent), "--save_last_frame")
    (decoded,) = again.glob("*_last.png")
    assert (read_image(decoded) == read_image(last)).all()
    plain = run(float32, tmp_path / "plain", "--latent_path", str(latent))
    assert not list(plain.glob("*_last.png"))
