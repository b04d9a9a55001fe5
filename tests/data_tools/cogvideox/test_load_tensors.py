"""load_tensors: latents come from moments that were computed before, and equal those of our own encoding."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import cache_latents
import wan_cache_latents
from dataset.cache.files import read_header
from dataset.cache.records import latent_record
from hunyuan_model.vae import load_vae as load_hunyuan_vae
from modules.errors import DatasetError, UserError
from modules.media.pixels import to_pixels
from modules.media.reading import video_frames
from tests.data_tools.cogvideox.making import NAMES, save, write_config, write_data
from tests.tiny.hunyuan_vae import write_vae
from tests.tiny.wan_encoders import vae22_tensors, vae_tensors
from wan.vae import load_vae as load_wan_vae

CPU = torch.device("cpu")
SCRIPTS = {"wan": wan_cache_latents, "hv": cache_latents}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips of 16 frames, with the moments of their first 13 by the tiny VAEs of two families."""
    folder = tmp_path_factory.mktemp("moments")
    for tag in SCRIPTS:
        write_data(folder / tag)
    torch.save(vae_tensors(), folder / "wan.pth")
    write_vae(folder / "hv.safetensors")
    vaes = {
        "wan": load_wan_vae(folder / "wan.pth", CPU, torch.float32),
        "hv": load_hunyuan_vae(folder / "hv.safetensors", CPU, torch.float32),
    }
    for tag, vae in vaes.items():
        for name in NAMES:
            frames = [
                torch.from_numpy(frame) for frame in video_frames(folder / tag / "videos" / f"{name}.mp4")
            ]
            pixels = to_pixels(torch.stack(frames)[None, :13])
            save(vae.moments(pixels)[0], folder / tag / "video_latents" / f"{name}.pt")
            save(vae.moments(pixels[:, :, :1])[0], folder / tag / "image_latents" / f"{name}.pt")
    return folder


def cache(project: Path, tag: str, config: Path, *switches: str, dtype: str = "float32") -> None:
    vae = project / ("wan.pth" if tag == "wan" else "hv.safetensors")
    SCRIPTS[tag].main(["--dataset_config", str(config), "--vae", str(vae), "--vae_dtype", dtype, *switches])


def latents_in(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize(
    ("tag", "switches", "dtype"),
    [("hv", ("--i2v",), "float32"), ("wan", (), "bfloat16")],
)
def test_latents_of_moments_equal_those_of_the_clip(
    tag: str, switches: Sequence[str], dtype: str, project: Path, tmp_path: Path
) -> None:
    own = write_config(tmp_path, project / tag, "target_frames = [13]", name="own.toml", cache="own")
    given = write_config(tmp_path, project / tag, "load_tensors = true", name="given.toml", cache="given")

    cache(project, tag, own, *switches, dtype="float32")
    cache(project, tag, given, *switches, dtype=dtype)

    expected, found = latents_in(tmp_path / "own"), latents_in(tmp_path / "given")
    assert len(found) == 3
    assert found.keys() == expected.keys()
    most = 0.0 if dtype == "float32" else 2**-7
    for name, tensors in found.items():
        for mine, theirs in zip(tensors.values(), expected[name].values(), strict=True):
            assert mine.dtype == getattr(torch, dtype)
            torch.testing.assert_close(mine.float(), theirs, rtol=most, atol=most)
    if tag == "hv":  # a sample, not the mean
        mean = torch.load(project / tag / "video_latents" / f"{NAMES[0]}.pt")[:16]
        assert not torch.equal(next(iter(found.values()))[next(iter(next(iter(found.values()))))], mean)


def test_another_run_keeps_what_is_right_and_makes_anew_what_has_changed(
    project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_data(tmp_path / "data", count=2)
    for name in NAMES[:2]:
        save(torch.zeros(32, 2, 4, 4), root / "video_latents" / f"{name}.pt")
    config = write_config(tmp_path, root, "load_tensors = true")
    cache(project, "wan", config)
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    cache(project, "wan", config)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == first

    save(torch.ones(32, 3, 4, 4), root / "video_latents" / f"{NAMES[1]}.pt")
    cache(project, "wan", config)

    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert names == [
        f"{NAMES[0]}_00000-005_0032x0032_wan.safetensors",
        f"{NAMES[1]}_00000-009_0032x0032_wan.safetensors",
    ]
    assert (tmp_path / "cache" / names[0]).stat().st_mtime_ns == first[names[0]]

    clips = write_config(tmp_path, root, "target_frames = [5]")
    cache(project, "wan", clips)  # the same names, but from the clips
    tensors = load_file(tmp_path / "cache" / names[0])
    assert next(iter(tensors.values())).abs().max() > 0
    record = latent_record(read_header(tmp_path / "cache" / names[0]))
    assert record is not None
    assert [file.name for file in record.files] == [f"{NAMES[0]}.mp4"]


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("this would run",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (Harmful(), "holds program code beside its tensors and is refused"),
        (b"no file of torch", r"video_latents.00001\.pt"),
        ({"latents": torch.zeros(1)}, "holds dict, not a tensor"),
        (torch.zeros(32, 4, 4), "holds 32x4x4 of torch.float32, not moments"),
        (torch.zeros(32, 1, 4, 3), "is of a clip of 24x32; the model takes sides that are multiples of 16"),
        (torch.zeros(16, 1, 4, 4), "has 16 channels: this model's VAE has 32, .* look like latents"),
        (torch.full((32, 1, 4, 4), float("nan")), "values of latents are NaN"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_the_others_are_cached(
    content: object, words: str, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_data(tmp_path / "data", count=2)
    good, bad = (root / "video_latents" / f"{name}.pt" for name in NAMES[:2])
    save(torch.zeros(32, 1, 4, 4), good)
    if isinstance(content, bytes):
        bad.write_bytes(content)
    else:
        torch.save(content, bad)

    with pytest.raises(UserError, match=words):
        cache(project, "wan", write_config(tmp_path, root, "load_tensors = true"))

    assert "this would run" not in capsys.readouterr().out
    if "NaN" not in words:  # that one ends the run, as of clips
        assert [path.name[:5] for path in (tmp_path / "cache").iterdir()] == [NAMES[0]]


def test_another_vae_is_refused_by_name_before_anything_is_read(project: Path, tmp_path: Path) -> None:
    torch.save(vae22_tensors(), tmp_path / "wan22.pth")
    config = write_config(tmp_path, project / "wan", "load_tensors = true")
    with pytest.raises(DatasetError, match="has 32 channels, but this model's VAE has 96"):
        wan_cache_latents.main(["--dataset_config", str(config), "--vae", str(tmp_path / "wan22.pth")])
