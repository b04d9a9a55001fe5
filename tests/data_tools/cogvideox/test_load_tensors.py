"""load_tensors: files of moments that changed or cannot be used; tests of preparing compare the latents."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import wan_cache_latents
from dataset.cache.files import read_header
from dataset.cache.records import latent_record
from modules.errors import DatasetError, UserError
from tests.data_tools.cogvideox.making import NAMES, save, write_config, write_data
from tests.tiny.wan_encoders import vae22_tensors, vae_tensors


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moments") / "wan.pth"
    torch.save(vae_tensors(), path)
    return path


def cache(vae: Path, config: Path) -> None:
    words = ["--dataset_config", str(config), "--vae", str(vae), "--vae_dtype", "float32"]
    wan_cache_latents.main(words)


def test_another_run_keeps_what_is_right_and_makes_anew_what_has_changed(vae: Path, tmp_path: Path) -> None:
    root = write_data(tmp_path / "data", count=2)
    for name in NAMES[:2]:
        save(torch.zeros(32, 2, 4, 4), root / "video_latents" / f"{name}.pt")
    config = write_config(tmp_path, root, "load_tensors = true")
    cache(vae, config)
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    cache(vae, config)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == first

    save(torch.ones(32, 3, 4, 4), root / "video_latents" / f"{NAMES[1]}.pt")
    cache(vae, config)

    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert names == [
        f"{NAMES[0]}_00000-005_0032x0032_wan.safetensors",
        f"{NAMES[1]}_00000-009_0032x0032_wan.safetensors",
    ]
    assert (tmp_path / "cache" / names[0]).stat().st_mtime_ns == first[names[0]]

    clips = write_config(tmp_path, root, "target_frames = [5]")
    cache(vae, clips)  # the same names, but from the clips
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
    content: object, words: str, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_data(tmp_path / "data", count=2)
    good, bad = (root / "video_latents" / f"{name}.pt" for name in NAMES[:2])
    save(torch.zeros(32, 1, 4, 4), good)
    if isinstance(content, bytes):
        bad.write_bytes(content)
    else:
        torch.save(content, bad)

    with pytest.raises(UserError, match=words):
        cache(vae, write_config(tmp_path, root, "load_tensors = true"))

    assert "this would run" not in capsys.readouterr().out
    if "NaN" not in words:  # that one ends the run, as of clips
        assert [path.name[:5] for path in (tmp_path / "cache").iterdir()] == [NAMES[0]]


def test_another_vae_is_refused_by_name_before_anything_is_read(tmp_path: Path) -> None:
    torch.save(vae22_tensors(), tmp_path / "wan22.pth")
    root = write_data(tmp_path / "data", count=1)
    save(torch.zeros(32, 1, 4, 4), root / "video_latents" / f"{NAMES[0]}.pt")
    config = write_config(tmp_path, root, "load_tensors = true")
    with pytest.raises(DatasetError, match="has 32 channels, but this model's VAE has 96"):
        wan_cache_latents.main(["--dataset_config", str(config), "--vae", str(tmp_path / "wan22.pth")])
