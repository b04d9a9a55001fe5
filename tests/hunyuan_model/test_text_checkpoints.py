"""Every published file of the two text encoders loads; everything else is refused with a clear message."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checkpoints.dialects import LoadPlan
from checkpoints.opening import Checkpoint, open_checkpoint
from encoders.clip_checkpoints import read_clip_text
from encoders.clip_layers import ClipText, load_clip_text
from encoders.language_models import LLAMA, build_language_model, load_language_model, read_language_model
from hunyuan_model.text_encoders import CLIP
from modules.errors import CheckpointError
from tests.manifests import TensorList, fit, manifest_names, tensor_list, write_hollow
from tests.tiny.hunyuan_encoders import (
    CLIP_VOCABULARY,
    LLAMA_LAYERS,
    clip_config_json,
    clip_text_config,
    clip_text_layouts,
    clip_text_tensors,
    llama_config,
    llama_config_json,
    llama_layouts,
    llama_tensors,
    save,
)

CPU = torch.device("cpu")
Read = Callable[[Checkpoint], LoadPlan[Any]]


def read_llama(checkpoint: Checkpoint, skip: int = 0) -> LoadPlan[Any]:
    return read_language_model(checkpoint, LLAMA, (-1 - skip,))


def load_full_llama(path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return load_language_model(path, LLAMA, CPU, dtype)


def load_clip(path: Path, dtype: torch.dtype = torch.float32) -> ClipText:
    return load_clip_text(path, CPU, dtype, CLIP)


def assert_equal(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    torch.testing.assert_close(network.state_dict(), tensors, rtol=0, atol=0)


# Published files

LLAMA_MANIFESTS = [name for name in manifest_names("llava-") if name != "llava-llama3-vision"]
CLIP_MANIFESTS = ["clip-l-text", "clip-vit-large-patch14-full"]


def fp8_list(tensors: TensorList) -> TensorList:
    """The list of ComfyUI's fp8 file beside that of the fp16 one."""
    found: TensorList = {"scaled_fp8": ("F8_E4M3", (0,))}
    for name, (dtype, shape) in tensors.items():
        is_fp8 = name.endswith("_proj.weight")
        found[name] = ("F8_E4M3" if is_fp8 else dtype, shape)
        if is_fp8:
            found[name.removesuffix(".weight") + ".scale_weight"] = ("F32", ())
    return found


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("manifest", [*LLAMA_MANIFESTS, "fp8"])
def test_published_language_models_fit_at_full_size(tmp_path: Path, manifest: str, skip: int) -> None:
    tensors = fp8_list(tensor_list("llava-llama3-single")) if manifest == "fp8" else tensor_list(manifest)
    path = write_hollow(tmp_path / "model.safetensors", tensors)
    config = read_config(path, partial(read_llama, skip=skip))
    network: Any = fit(path, partial(read_llama, skip=skip), build_language_model)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_width) == (
        32 - skip,
        32,
        8,
        128,
    )
    assert (config.vocabulary, config.dim, config.theta, config.eps) == (128320, 4096, 500000.0, 1e-5)
    one_layer = sum(tensor.numel() for tensor in network.layers[0].state_dict().values())
    assert sum(
        tensor.numel() for tensor in network.state_dict().values()
    ) == 7505186816 - skip * one_layer - 4096 * (skip > 0)


@pytest.mark.parametrize("manifest", CLIP_MANIFESTS)
def test_published_clips_fit_at_full_size(tmp_path: Path, manifest: str) -> None:
    network = fit(
        write_hollow(tmp_path / "model.safetensors", tensor_list(manifest)),
        partial(read_clip_text, naming=CLIP),
        ClipText,
    )
    assert sum(tensor.numel() for tensor in network.state_dict().values()) == 123060480
    assert isinstance(network, ClipText)
    assert network.encoder.layers[0].self_attn.num_heads == 12  # type: ignore[union-attr]


# Layouts


@pytest.mark.parametrize("layout", llama_layouts(llama_tensors()))
def test_every_llama_layout_gives_the_same_weights(tmp_path: Path, layout: str) -> None:
    tensors = llama_tensors()
    assert_equal(
        load_full_llama(save(tmp_path / "llava.safetensors", llama_layouts(tensors)[layout])), tensors
    )


@pytest.mark.parametrize("layout", clip_text_layouts(clip_text_tensors()))
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_every_clip_layout_gives_the_same_weights(tmp_path: Path, layout: str, suffix: str) -> None:
    tensors = clip_text_tensors()
    path = tmp_path / f"clip{suffix}"
    if suffix == ".bin":
        torch.save(clip_text_layouts(tensors)[layout], path)
    else:
        save(path, clip_text_layouts(tensors)[layout])
    assert_equal(load_clip(path), tensors)


# Dimensions


def heads(config: Any) -> tuple[int, int, int]:
    return config.num_heads, config.num_kv_heads, config.head_width


def read_config(path: Path, read: Read = read_llama) -> Any:
    with open_checkpoint(path) as checkpoint:
        return read(checkpoint).config


def write_config(folder: Path, content: object) -> None:
    (folder / "config.json").write_text(
        content if isinstance(content, str) else json.dumps(content), encoding="utf-8"
    )


def test_without_a_configuration_heads_have_128_channels(tmp_path: Path) -> None:
    path = save(tmp_path / "llava.safetensors", llama_tensors(config=llama_config(heads=4, kv_heads=2)))
    config = read_config(path)
    assert heads(config) == (4, 2, 128)
    assert (config.num_layers, config.ffn_dim, config.theta, config.eps) == (
        LLAMA_LAYERS,
        192,
        500000.0,
        1e-5,
    )


def test_the_configuration_beside_the_file_says_what_tensors_do_not(tmp_path: Path) -> None:
    narrow = llama_config(heads=8, kv_heads=2, head_width=32)
    path = save(tmp_path / "llava.safetensors", llama_tensors(config=narrow))
    write_config(tmp_path, {**llama_config_json(narrow), "rope_theta": 1e4, "rms_norm_eps": 1e-3})
    config = read_config(path)
    assert (heads(config), config.theta, config.eps) == ((8, 2, 32), 1e4, 1e-3)

    nested = {key: value for key, value in llama_config_json(narrow).items() if key != "rope_theta"}
    nested |= {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}  # as transformers 5 write it
    write_config(tmp_path, {"model_type": "llava", "text_config": nested})
    assert (heads(read_config(path)), read_config(path).theta) == ((8, 2, 32), 2e4)

    write_config(tmp_path, {"hidden_size": 128, "num_attention_heads": 16})  # by hand
    config = read_config(path)
    assert (heads(config), config.theta, config.eps) == ((16, 4, 16), 500000.0, 1e-5)


def test_what_a_configuration_leaves_out_is_the_default_of_transformers(tmp_path: Path) -> None:
    path = save(
        tmp_path / "llava.safetensors", llama_tensors(config=llama_config(heads=32, kv_heads=8, head_width=8))
    )
    write_config(tmp_path, {"model_type": "llama", "hidden_size": 128})
    config = read_config(path)
    assert (heads(config), config.theta, config.eps) == ((32, 8, 8), 1e4, 1e-6)


@pytest.mark.parametrize(
    "other", [{"model_type": "llama"}, {"model_type": "t5", "num_heads": 3}, clip_config_json(), {}]
)
def test_the_configuration_of_another_model_is_not_used(tmp_path: Path, other: dict[str, object]) -> None:
    path = save(tmp_path / "llava.safetensors", llama_tensors())
    write_config(tmp_path, other)
    assert heads(read_config(path)) == (2, 1, 128)


def test_clips_configuration_counts_too(tmp_path: Path) -> None:
    path = save(tmp_path / "clip.safetensors", clip_text_layouts(clip_text_tensors())["text"])
    assert read_config(path, partial(read_clip_text, naming=CLIP)) == clip_text_config()
    told = clip_config_json()
    assert isinstance(told["text_config"], dict)
    told["text_config"] |= {"num_attention_heads": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-3}
    write_config(tmp_path, told)
    config = read_config(path, partial(read_clip_text, naming=CLIP))
    assert (config.num_heads, config.activation, config.eps, config.vocabulary) == (
        4,
        "gelu",
        1e-3,
        CLIP_VOCABULARY,
    )
    load_clip(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "cannot be read as the configuration"),
        ("[1]", "cannot be read as the configuration"),
        ({"hidden_size": 128, "num_attention_heads": 7}, "says 7 heads"),
        ({"hidden_size": 128, "num_attention_heads": 0}, "says 0 heads"),
        ({"hidden_size": 128, "num_attention_heads": "many"}, "says many heads"),
        (
            {"hidden_size": 128, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rotary frequencies of type llama3",
        ),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(tmp_path: Path, content: object, message: str) -> None:
    path = save(tmp_path / "llava.safetensors", llama_tensors())
    write_config(tmp_path, content)
    with pytest.raises(CheckpointError, match=message):
        read_config(path)


def test_an_unknown_activation_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "clip.safetensors", clip_text_layouts(clip_text_tensors())["text"])
    write_config(tmp_path, {"hidden_size": 64, "num_attention_heads": 1, "hidden_act": "relu"})
    with pytest.raises(CheckpointError, match="activation relu"):
        load_clip(path)


# Files that do not fit


def test_the_vision_half_of_llava_is_no_language_model(tmp_path: Path) -> None:
    path = write_hollow(tmp_path / "vision.safetensors", tensor_list("llava-llama3-vision"))
    with pytest.raises(CheckpointError, match=r"not a Llama language model(.|\n)*to --text_encoder1"):
        load_full_llama(path)


def test_each_encoder_given_for_the_other_is_named(tmp_path: Path) -> None:
    llama = save(tmp_path / "llava.safetensors", llama_layouts(llama_tensors())["llava"])
    clip = save(tmp_path / "clip.safetensors", clip_text_layouts(clip_text_tensors())["both"])
    with pytest.raises(
        CheckpointError, match=r"looks like a language model \(--text_encoder1\)(.|\n)*to --text_encoder2"
    ):
        load_clip(llama)
    with pytest.raises(
        CheckpointError, match=r"looks like a CLIP text encoder \(--text_encoder2\)(.|\n)*to --text_encoder1"
    ):
        load_full_llama(clip)


def test_tensors_of_an_unknown_network_beside_it_are_named(tmp_path: Path) -> None:
    tensors = {**llama_layouts(llama_tensors())["causal"], "surplus.weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"1 tensors of an unknown network, such as surplus\.weight"):
        load_full_llama(save(tmp_path / "llava.safetensors", tensors))


def test_a_clip_of_fewer_positions_is_refused(tmp_path: Path) -> None:
    tensors = clip_text_tensors()
    tensors["embeddings.position_embedding.weight"] = tensors["embeddings.position_embedding.weight"][:64]
    with pytest.raises(CheckpointError, match="takes 64 tokens, but 77 are needed"):
        load_clip(save(tmp_path / "clip.safetensors", clip_text_layouts(tensors)["text"]))
