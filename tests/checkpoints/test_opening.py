"""Model files as users name them, and what they are by the names of their tensors."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints.kinds import describe_file_kind
from checkpoints.model_files import find_model_folder, read_once
from checkpoints.opening import (
    Checkpoint,
    checkpoint_paths,
    list_tensor_sources,
    open_checkpoint,
)
from modules.errors import CheckpointError, DownloadError, UserError
from tests.manifests import manifest_names, tensor_list
from tests.modules.making import tensors, write


def write_shards(folder: Path, suffix: str = ".safetensors") -> list[Path]:
    names = list(tensors())
    parts = [{name: tensors()[name] for name in names[number::3]} for number in range(3)]
    return [
        write(folder / f"model-{number:05d}-of-00003{suffix}", part) for number, part in enumerate(parts, 1)
    ]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_open_as_one_whatever_of_them_is_named(tmp_path: Path, suffix: str) -> None:
    shards = write_shards(tmp_path, suffix)
    index = tmp_path / f"model{suffix}.index.json"
    places = {name: shards[number % 3].name for number, name in enumerate(tensors())}
    index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")

    for path in (shards[0], shards[-1], index, tmp_path):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.tensors.keys() == tensors().keys()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shards = write_shards(tmp_path)
    shards[1].unlink()

    with pytest.raises(
        CheckpointError, match=r"1 of its 3 files are not next to it: model-00002-of-00003\.s"
    ):
        open_checkpoint(shards[0])


def test_a_folder_without_a_single_model_asks_for_the_file(tmp_path: Path) -> None:
    write(tmp_path / "vae.pth", tensors())
    write(tmp_path / "text.pth", tensors())

    with pytest.raises(CheckpointError, match=r"model files: text\.pth, vae\.pth\)\. Pass the path"):
        checkpoint_paths(tmp_path)


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"weight_map": {"a": 5}}', '{"weight_map": {"a": ""}}', "[" * 100_000]
)
def test_a_broken_index_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "m.index.json").write_text(content)

    with pytest.raises(CheckpointError, match="not an index of model files|not next to it"):
        open_checkpoint(tmp_path / "m.index.json")


def test_a_path_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such file or folder"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_a_prefix_is_cut_only_where_every_name_has_it(tmp_path: Path) -> None:
    content = {"module.model.a": torch.ones(1), "module.model.b": torch.ones(1), "module.c": torch.ones(1)}

    with open_checkpoint(write(tmp_path / "a.safetensors", content)) as checkpoint:
        assert checkpoint.without_prefix("module.", "model.").tensors.keys() == {"model.a", "model.b", "c"}


def _comfy_quant(kind: str) -> Tensor:
    return torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("extra", "metadata", "message"),
    [
        ({"0.weight.absmax": torch.ones(1)}, {}, "it has 0.weight.absmax"),
        ({"0.weight_scale_2": torch.ones(1)}, {}, "nvfp4: it has 0.weight_scale_2"),
        ({"0.weight_scale": torch.ones(4, 2, dtype=torch.uint8)}, {}, "mxfp8: it has 0.weight_scale"),
        ({"0.weight_scale": torch.ones(2, 2)}, {}, "fp8 in blocks"),
        ({"0.weight": torch.ones(4, 2, dtype=torch.int8)}, {}, "int8: 0.weight has this dtype"),
        ({"0.weight.SCB": torch.ones(4)}, {}, "int8 of bitsandbytes"),
        ({"0.qweight": torch.ones(4, 2, dtype=torch.int32)}, {}, "GPTQ or AWQ"),
        ({"0.wscales": torch.ones(4, 2)}, {}, "SVDQuant"),
    ],
)
def test_other_quantisations_are_refused(
    tmp_path: Path, extra: dict[str, Tensor], metadata: dict[str, str], message: str
) -> None:
    path = write(tmp_path / "a.safetensors", tensors() | extra, metadata=metadata)

    with open_checkpoint(path) as found, pytest.raises(CheckpointError, match=f"not supported.*{message}"):
        list_tensor_sources(found)


# how the manifest's name begins -> a part of what its file is called
KINDS = {
    "swinir": "SwinIR",
    "realesrgan": "Real-ESRGAN",
    "esrgan-x4-mid": "an ESRGAN or BSRGAN",
    "esrgan-x4-old": "old names",
    "gimmvfi-r": "GIMM-VFI R,",
    "gimmvfi-f": "GIMM-VFI F,",
    "raft": "RAFT,",
    "flowformer": "FlowFormer,",
    "gfpgan": "GFPGAN",
    "fibo-2": "a Fibo 2.0 transformer",
    "anima-dit-diffusers": "a transformer of Cosmos-Predict2 or Anima in diffusers layout",
    "anima-dit": "an Anima transformer",
    "anima-text-conditioner": "Anima's adapter",
    "codeformer": "CodeFormer",
    "retinaface": "RetinaFace",
    "parsenet": "ParseNet",
    "taehv": "TAEHV",
    "taew": "TAEHV",
    "wan2.1-vae": "Wan2.1 VAE",
    "wan2.2-vae": "VAE of Wan2.2",
    "wan": "Wan transformer",
    "umt5": "T5 encoder",
    "byt5": "T5 encoder",
    "t5xxl": "T5 encoder",
    "clip-l-text": "CLIP text",
    "clip-vit-large": "CLIP text",
    "clip": "CLIP image",
    "sigclip": "SigLIP",
    "hunyuanvideo1.5-vae": "the VAE of HunyuanVideo 1.5",
    "hunyuanvideo1.5-dit": "a HunyuanVideo 1.5 transformer",
    "hunyuanvideo-vae": "VAE",
    "hunyuanvideo-t2v-dit-diffusers": "a transformer in diffusers",
    "hunyuanvideo": "HunyuanVideo transformer",
    "skyreels-v1-i2v-diffusers": "a transformer in diffusers",
    "skyreels-v1-t2v-diffusers": "a transformer in diffusers",
    "skyreels": "HunyuanVideo transformer",
    "framepack": "FramePack transformer",
    "chroma1": "Chroma",
    "flux1-ae": "a VAE for images",
    "flux1-dev-dit-diffusers": "a transformer in diffusers",
    "flux1": "FLUX",
    "flux3-klein-base-dit-diffusers": "a FLUX 3 transformer in diffusers",
    "flux3-klein-dit-diffusers": "a FLUX 3 transformer in diffusers",
    "flux3": "FLUX 3 transformer",
    "flux2-vae-diffusers": "the autoencoder of FLUX.2",
    "flux2-vae": "the autoencoder of FLUX.2",
    "flux2": "FLUX.2 transformer",
    "lumina2": "Lumina-Image-2.0 transformer",
    "sd1.5": "a Stable Diffusion checkpoint",
    "sdxl-base-1.0": "a Stable Diffusion checkpoint",
    "qwen-image-layered": "Qwen-Image-Layered",
    "qwen-image-2.1-dit": "a Qwen-Image-2.1 transformer",
    "qwen-image-2.1-vae": "the VAE of Qwen-Image-2.1",
    "qwen-image": "Qwen-Image transformer",
    "z-image": "Z-Image transformer",
    "krea2-dit-diffusers": "a Krea 2 transformer in diffusers",
    "krea2-dit": "Krea 2 transformer",
    "qwen2.5-vl": "Qwen2.5 language model",
    "qwen3-vl": "Qwen3-VL model",
    "qwen3": "Qwen3 language model",
    "gemma2": "Gemma language model",
    "gemma3": "Gemma language model",
    "hunyuanimage": "HunyuanImage",
    "ltx2.3-dit": "an LTX-2 transformer",
    "ltx2.3": "LTX-2",
    "ltx2.5-dit": "an LTX-2 transformer",
    "ltx2.5-text": "Gemma language model",
    "ltx2.5": "LTX-2",
    "ernie-image-dit": "an ERNIE-Image transformer",
    "hidream-o1": "a HiDream-O1-Image network",
    "ideogram4-dit": "an Ideogram 4 transformer",
    "kandinsky5": "a Kandinsky 5 transformer",
    "kandinsky6": "a Kandinsky 6 transformer",
    "ministral": "language model",
    "moss-image-dit": "a MOSS-Image transformer",
    "moss-image-text-encoder": "a Qwen3.5 model",
    "moss-image-vae": "the autoencoder of FLUX.2",
    "minimax-h3-dit-pruned": "a pruned MiniMax-H3 transformer",
    "minimax-h3-dit": "a MiniMax-H3 transformer",
    "minimax-h3-video-vae": "MiniMax-H3's video VAE",
    "minimax-h3-audio-vae": "MiniMax-H3's audio VAE",
    "llava-llama3-vision": "CLIP image",
    "llava": "language model",
}


@pytest.mark.parametrize("manifest", manifest_names(""))
def test_every_published_file_is_named_right(manifest: str) -> None:
    expected = next(text for start, text in KINDS.items() if manifest.startswith(start))

    assert expected in str(describe_file_kind(tensor_list(manifest)))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.x"], "Stable Diffusion"),
        (["down_blocks.0.resnets.0.time_emb_proj.weight", "first_stage_model.x"], "Stable Diffusion"),
        (["input_blocks.0.0.weight", "zero_convs.0.0.weight"], "a ControlNet ("),
        (["control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"], "a ControlNet ("),
        (["input_blocks.0.0.weight", "controlnet_down_blocks.0.weight"], "a ControlNet ("),
    ],
)
def test_networks_of_stable_diffusion_are_named(names: list[str], words: str) -> None:
    assert words in str(describe_file_kind(names))


def names(checkpoint: Checkpoint) -> list[str]:
    return list(checkpoint.tensors)


def written(path: Path, *tensors: str) -> Path:
    return write(path, {name: torch.zeros(1) for name in tensors})


def test_a_file_is_opened_once_and_again_where_it_has_changed(tmp_path: Path) -> None:
    reads: list[Path] = []

    def noted(checkpoint: Checkpoint) -> list[str]:
        reads.append(checkpoint.path)
        return list(checkpoint.tensors)

    path = written(tmp_path / "a.safetensors", "one")
    assert read_once(path, noted) == read_once(path, noted) == ["one"]
    assert reads == [path]
    written(path, "one", "two")
    assert read_once(path, noted) == ["one", "two"]


def test_a_relative_path_means_the_file_in_the_present_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("one", "two"):
        written(tmp_path / folder / "model.safetensors", folder)
        monkeypatch.chdir(tmp_path / folder)
        assert read_once(Path("model.safetensors"), names) == [folder]


def test_a_damaged_file_is_named_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.safetensors").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match=r"^model\.safetensors"):
        read_once(Path("model.safetensors"), names)


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert find_model_folder("--model", str(tmp_path), ("*.json",)) == tmp_path


@pytest.mark.parametrize(
    "name", ["nowhere", "a/b/c", "./a", "C:\\models/a", "~nobody-here/model", "x" * 300, "owner/file"]
)
def test_what_is_neither_a_folder_nor_a_repository_is_refused_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "owner" / "file", "a")

    with pytest.raises(UserError, match="--model .*(no such|no file|Windows path)"):
        find_model_folder("--model", name, ())


def test_a_repository_is_not_fetched_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(DownloadError, match="--model nobody/no-such-model: .*HF_HUB_OFFLINE"):
        find_model_folder("--model", "nobody/no-such-model", ("*.json",))


def test_an_index_of_more_files_than_any_model_is_refused_before_they_are_looked_for(tmp_path: Path) -> None:
    index = tmp_path / "m.index.json"
    names = {f"a{number}": f"s{number}.safetensors" for number in range(10_001)}
    index.write_text(json.dumps({"weight_map": names}), encoding="utf-8")

    with pytest.raises(CheckpointError, match="names 10,001 files"):
        open_checkpoint(index)
