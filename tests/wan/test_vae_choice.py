"""Which of the two VAEs a file is decides what is cached; the other one is refused before anything loads."""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import wan_cache_latents
import wan_train_network
from modules.contract.requests import Request
from modules.errors import CacheError, CheckpointError, DatasetError, OptionError
from tests.tiny.project import write_clips, write_dataset
from tests.tiny.wan_dit import tiny_state, write_dit
from tests.tiny.wan_encoders import vae22_tensors, vae_tensors
from wan.configs import TASKS
from wan.family import Wan
from wan.files import WanFiles
from wan.vae import load_vae

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vaes")
    paths = {version: folder / f"{version}.safetensors" for version in ("2.1", "2.2")}
    save_file(vae_tensors(), paths["2.1"])
    save_file(vae22_tensors(), paths["2.2"])
    return paths


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A dataset of one clip, of 80 x 80 pixels in steps of 16 and of 64 x 96 in steps of 32."""
    write_clips(tmp_path / "clips", count=1, frames=9, width=96, height=96)
    return write_dataset(tmp_path, size=80, frames="5")


def cache(dataset: Path, vae: Path, *more: str) -> None:
    words = ["--dataset_config", str(dataset), "--vae", str(vae), "--device", "cpu", *more]
    wan_cache_latents.main([*words, "--vae_dtype", "float32"])


def cached(dataset: Path) -> list[Path]:
    return sorted((dataset.parent / "cache").glob("*_wan.safetensors"))


def test_the_5b_vae_caches_its_own_latents_in_steps_of_32_pixels(clips: Path, vaes: dict[str, Path]) -> None:
    cache(clips, vaes["2.2"])

    (path,) = cached(clips)
    assert path.name == "clip 0_00000-005_0064x0096_wan.safetensors"
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["latents_2x6x4_float32"]
        latents = file.get_tensor("latents_2x6x4_float32")
    assert latents.shape == (48, 2, 6, 4)
    pixels = torch.cat(list(load_vae(vaes["2.2"], CPU, torch.float32).decode(latents[None])), dim=2)
    assert pixels.shape == (1, 3, 5, 96, 64)


def test_the_other_vae_makes_the_caches_again(clips: Path, vaes: dict[str, Path]) -> None:
    cache(clips, vaes["2.2"])
    cache(clips, vaes["2.1"])

    (path,) = cached(clips)
    assert path.name == "clip 0_00000-005_0080x0080_wan.safetensors"
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["latents_2x10x10_float32"]


def test_a_check_shows_the_sizes_of_the_given_vae(
    clips: Path, vaes: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for vae, size in ((["--vae", str(vaes["2.2"])], "64x96"), ([], "80x80")):
        with pytest.raises(SystemExit):
            wan_cache_latents.main(["--dataset_config", str(clips), "--check", *vae])
        assert size in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--i2v"], ["--clip", "clip.safetensors"]])
def test_image_conditions_are_refused_for_the_5b_vae(
    clips: Path, vaes: dict[str, Path], words: list[str]
) -> None:
    with pytest.raises(OptionError, match=rf"{words[0]}: --vae .*TI2V-5B.*Leave out {words[0]}\."):
        cache(clips, vaes["2.2"], *words)


def test_control_videos_are_refused_for_the_5b_vae(clips: Path, vaes: dict[str, Path]) -> None:
    (clips.parent / "control").mkdir()
    write_clips(clips.parent / "control", count=1, frames=9, width=96, height=96)
    dataset = write_dataset(
        clips.parent, size=80, frames="5", more=f'control_directory = "{clips.parent.as_posix()}/control"'
    )
    with pytest.raises(DatasetError, match="TI2V-5B takes no control videos"):
        cache(dataset, vaes["2.2"])
    assert not cached(dataset)


@pytest.mark.parametrize(
    ("task", "kind", "version", "given", "wanted"),
    [
        ("t2v-14B", "t2v", "2.2", "Wan2.2 TI2V-5B", "Wan2.1_VAE.pth"),
        ("ti2v-5B", "ti2v", "2.1", "Wan2.1 and Wan2.2 A14B", "Wan2.2_VAE.pth"),
    ],
)
def test_a_task_refuses_the_vae_of_other_latents(
    tmp_path: Path, vaes: dict[str, Path], task: str, kind: str, version: str, given: str, wanted: str
) -> None:
    dit = write_dit(tmp_path, tiny_state(kind))
    family = Wan(WanFiles(dit=dit, vae=vaes[version], task=TASKS[task]))
    named = rf"is the Wan{version} VAE \(of {given}: .*--task {task} needs (.|\n)*Give {wanted}.* to --vae"
    for check in (family.check_given_files, lambda: family.prepare(Request("cat", seed=1))):
        with pytest.raises(CheckpointError, match=named):
            check()
    (right,) = set(vaes) - {version}
    Wan(WanFiles(dit=dit, vae=vaes[right], task=TASKS[task])).check_given_files()


def train(dataset: Path, task: str, kind: str, *more: str) -> None:
    dit = write_dit(dataset.parent, tiny_state(kind))
    words = ["--task", task, "--dit", str(dit), "--dataset_config", str(dataset), "--sdpa"]
    words += ["--output_dir", str(dataset.parent / "out"), "--output_name", "x", "--network_dim", "2"]
    wan_train_network.main([*words, *more])


@pytest.mark.parametrize("more", [[], ["--plan"], ["--check"]], ids=["train", "plan", "check"])
def test_a_training_refuses_caches_of_the_other_vae_before_anything_loads(
    clips: Path, vaes: dict[str, Path], capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    cache(clips, vaes["2.2"])
    (clips.parent / "cache" / "clip 0_wan_te.safetensors").touch()  # not opened before latents are
    found = r"its latents have 48 channels, this model's have 16"
    if more == ["--check"]:
        with pytest.raises(SystemExit):
            train(clips, "t2v-A14B", "t2v", *more)
        assert re.search(found, capsys.readouterr().out)
        return
    again = r"(.|\n)*python wan_cache_latents.py --dataset_config .*--vae WAN_2.1_VAE_FILE\n"
    with pytest.raises(CacheError, match=found + again):
        train(clips, "t2v-A14B", "t2v", *more)
    with pytest.raises(CheckpointError, match="--task t2v-A14B needs the Wan2.1 VAE"):  # the reason for it
        train(clips, "t2v-A14B", "t2v", "--vae", str(vaes["2.2"]), *more)


def test_caches_of_both_vaes_in_one_folder_are_found(clips: Path, vaes: dict[str, Path]) -> None:
    cache(clips, vaes["2.1"])
    cache(clips, vaes["2.2"], "--keep_cache")
    assert len(cached(clips)) == 2
    (clips.parent / "cache" / "clip 0_wan_te.safetensors").touch()
    for task, kind, channels in (("t2v-A14B", "t2v", 48), ("ti2v-5B", "ti2v", 16)):
        with pytest.raises(CacheError, match=rf"have {channels} channels(.|\n)*a cache_directory of its own"):
            train(clips, task, kind)
