"""A folder of a model from somebody else: a sentence and little memory, whatever its files say."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints.model_folders import check_settings, read_shapes
from data_tools.masks.words import load_prompt_finder
from modules.errors import CheckpointError
from tests.data_tools.masks.making import write_clipseg

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clipseg(tmp_path_factory.mktemp("models") / "clipseg")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def change(path: Path, *keys: str, value: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    part = content
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    path.write_text(json.dumps(content), encoding="utf-8")


def test_a_whole_folder_is_taken(folder: Path) -> None:
    assert load_prompt_finder(folder, ["a cat"], 0.5, "cpu").network.config.model_type == "clipseg"


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("text_config", "num_hidden_layers"), 1_000_000, "num_hidden_layers is 1,000,000"),
        (("vision_config", "num_hidden_layers"), 1e9, "num_hidden_layers is 1,000,000,000"),
        (("vision_config", "image_size"), 100_000, "image_size is 100,000"),
        (("vision_config", "image_size"), 4096, "network of .* parameters, but its weights have"),
        (("vision_config", "patch_size"), 1, "according to config.json, .* has the shape"),
        (("vision_config", "hidden_size"), 4096, "network of|has the shape"),
        (("text_config", "vocab_size"), 10**12, "vocab_size is 1,000,000,000,000"),
        (("text_config", "max_position_embeddings"), 4000, "has the shape"),
        (("vision_config", "num_attention_heads"), 4096, "num_attention_heads is 4,096"),
        (("reduce_dim",), 4000, "has the shape|network of"),
        (("text_config", "hidden_size"), float("nan"), "hidden_size is nan"),
        (("text_config", "hidden_size"), "many", "cannot load it"),
        (("text_config",), [], "cannot load it"),
    ],
)
def test_sizes_that_the_weights_do_not_show_are_refused(
    folder: Path, keys: tuple[str, ...], value: object, message: str
) -> None:
    change(folder / "config.json", *keys, value=value)
    with pytest.raises(CheckpointError, match=message):
        load_prompt_finder(folder, ["a cat"], 0.5, "cpu")


@pytest.mark.parametrize("size", [{"height": 100_000, "width": 100_000}, {"shortest_edge": 1025}, 1e12])
def test_a_processor_makes_no_picture_larger_than_networks_look_at(folder: Path, size: object) -> None:
    path = next(folder.glob("*processor_config.json"))
    change(path, "size", value=size)
    with pytest.raises(
        CheckpointError, match=r"processor_config.json: \w+ is .* but the longest side of an image is 1,024"
    ):
        load_prompt_finder(folder, ["a cat"], 0.5, "cpu")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "vocab.json", "x.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "{", "\xff", "9" * 5000])
def test_texts_that_are_no_settings_end_in_a_sentence(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
        load_prompt_finder(folder, ["a cat"], 0.5, "cpu")


@pytest.mark.parametrize("kind", [None, [], {}, 5, "x" * 10_000, "bert"])
def test_a_kind_that_is_none_is_refused(folder: Path, kind: object) -> None:
    change(folder / "config.json", "model_type", value=kind)
    with pytest.raises(CheckpointError, match="which finds no words in images") as caught:
        load_prompt_finder(folder, ["a cat"], 0.5, "cpu")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1, 4], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]},
        {"dtype": "F32"},
        [],
        5,
    ],
)
def test_weights_that_claim_what_they_do_not_hold_are_refused(entry: object, tmp_path: Path) -> None:
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(CheckpointError, match="is damaged"):
        read_shapes(tmp_path, "--model")


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it contains no weights"):
        check_settings(tmp_path, "--model")
