"""wan_cache_latents.py --i2v makes what I2V-A14B is trained on; a cache made with --clip serves it too."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import wan_cache_latents
import wan_cache_text_encoder_outputs
import wan_train_network
from tests.tiny.project import write_clips, write_dataset
from tests.tiny.wan import write_tiny_wan


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips, each with a control clip, and a tiny I2V-A14B; texts are cached."""
    folder = tmp_path_factory.mktemp("i2v-A14B")
    write_tiny_wan(folder / "model", "i2v-2.2", experts=2)
    write_clips(folder / "clips", count=2)
    write_clips(folder / "control", count=2)
    for name in ("clip", "i2v", "flf2v"):
        dataset = write_dataset(folder, frames="5", more=f'control_directory = "{folder.as_posix()}/control"')
        text = dataset.read_text(encoding="utf-8").replace("/cache", f"/cache_{name}")
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
        words = [
            "--dataset_config",
            str(folder / f"{name}.toml"),
            "--t5",
            str(folder / "model/t5.safetensors"),
        ]
        wan_cache_text_encoder_outputs.main(words)
    return folder


def cache(project: Path, name: str, *switches: str) -> dict[str, dict[str, Tensor]]:
    """Cache latents with these switches; the tensors of each cache file."""
    vae = ["--vae", str(project / "model/vae.safetensors"), "--vae_dtype", "float32"]
    wan_cache_latents.main(["--dataset_config", str(project / f"{name}.toml"), *vae, *switches])
    files = sorted((project / f"cache_{name}").glob("*_wan.safetensors"))
    return {file.name: load_file(file) for file in files}


def test_the_condition_equals_that_of_a_cache_with_image_features(project: Path) -> None:
    with_features = cache(project, "clip", "--clip", str(project / "model/clip.safetensors"))
    without = cache(project, "i2v", "--i2v")

    assert len(without) == 2
    assert without.keys() == with_features.keys()
    for file, tensors in without.items():
        assert {re.sub(r"_\d.*|_float.*", "", key) for key in tensors} == {
            *("latents", "latents_control", "latents_image")
        }
        (image,) = (key for key in tensors if key.startswith("latents_image"))
        assert tensors[image].shape[0] == 20
        for key, tensor in tensors.items():
            assert torch.equal(tensor, with_features[file][key]), key


def test_two_frames_are_known_with_flf2v(project: Path) -> None:
    for tensors in cache(project, "flf2v", "--i2v", "--flf2v").values():
        (image,) = (tensor for key, tensor in tensors.items() if key.startswith("latents_image"))
        mask = image[:4].amax(dim=(2, 3))
        assert mask.tolist() == [[1, 0], [1, 0], [1, 0], [1, 1]], "the first frame and the last"
        assert not any(key.startswith("clip") for key in tensors)


def test_caching_again_encodes_nothing_and_another_kind_is_noticed(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache(project, "i2v", "--i2v")
    files = sorted((project / "cache_i2v").glob("*_wan.safetensors"))
    times = [file.stat().st_mtime_ns for file in files]
    cache(project, "i2v", "--i2v")
    assert [file.stat().st_mtime_ns for file in files] == times

    for switches, found in (
        (["--i2v"], "2 files are valid, 0 items need"),
        ([], "0 files are valid, 2 items"),
    ):
        with pytest.raises(SystemExit):
            cache(project, "i2v", *switches, "--check")
        assert found in capsys.readouterr().out


@pytest.mark.parametrize(("name", "switches"), [("clip", ["--clip"]), ("i2v", ["--i2v"])])
def test_either_cache_trains_the_model(project: Path, name: str, switches: list[str]) -> None:
    clip = [str(project / "model/clip.safetensors")] if "--clip" in switches else []
    cache(project, name, *switches, *clip)

    (weights,) = train(project, name, "i2v-A14B", project / "model")

    assert any(tensor.abs().max() > 0 for key, tensor in weights.items() if "lora_up" in key)


@pytest.mark.parametrize("task", ["t2v-A14B-FC", "i2v-A14B-FC"])
def test_fun_control_is_trained_on_the_same_caches(project: Path, tmp_path: Path, task: str) -> None:
    """That of t2v also takes them; the image is left out."""
    cache(project, "i2v", "--i2v")
    write_tiny_wan(tmp_path / "model", "fun-control-2.2")

    (weights,) = train(project, "i2v", task, tmp_path / "model")

    assert any(tensor.abs().max() > 0 for key, tensor in weights.items() if "lora_up" in key)


def train(project: Path, name: str, task: str, model: Path) -> list[dict[str, Tensor]]:
    """One step of a LoRA; the weights that were saved."""
    out = project / f"out {name} {task}"
    words = ["--task", task, "--dit", str(model / "dit.safetensors"), "--sdpa", "--max_train_steps", "1"]
    words += ["--dataset_config", str(project / f"{name}.toml"), "--output_dir", str(out)]
    words += [
        "--network_module",
        "networks.lora_wan",
        "--network_dim",
        "2",
        "--max_data_loader_n_workers",
        "0",
    ]
    wan_train_network.main([*words, "--output_name", "lora", "--learning_rate", "1e-2", "--seed", "1"])
    return [load_file(out / "lora.safetensors")]
