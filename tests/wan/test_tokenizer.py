"""Where the tokenizer is found, and that every form of it gives the same tokens."""

import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from modules.errors import CheckpointError
from tests.tiny.wan_encoders import T5_FILE, sentencepiece_model, t5_hf_tensors, t5_tensors, write_tokenizer
from wan.t5 import MAX_TOKENS, TOKENIZER, WanTextEncoder


def reader(path: Path | None, checkpoint: Path) -> Callable[[str], list[int]]:
    """Text to the ids of the tokens that umT5 reads."""
    tokenizer = TOKENIZER.load(path, checkpoint, "umT5")
    return lambda text: tokenizer.read(text).cut(MAX_TOKENS).ids


TEXT = "a small rabbit runs through tall grass; two dogs & a cat, 7:30!"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint without a tokenizer beside it, and a tokenizer elsewhere."""
    (tmp_path / "model").mkdir()
    torch.save(t5_tensors(), tmp_path / "model" / T5_FILE)
    write_tokenizer(tmp_path / "tokens")
    return tmp_path


def test_tokens_equal_those_of_transformers(folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(str(folder / "tokens"))
    ours = reader(folder / "tokens", folder / "model" / T5_FILE)
    for text in (TEXT, "", "rabbit " * 600, "日本語"):
        assert (
            ours(text) == theirs(text, truncation=True, max_length=512, add_special_tokens=True)["input_ids"]
        )


@pytest.mark.parametrize(
    "given", ["tokens", "tokens/tokenizer.json", "tokens/spiece.model", "release", "only spiece"]
)
def test_a_folder_and_each_of_its_files_give_the_same_tokens(folder: Path, given: str) -> None:
    shutil.copytree(folder / "tokens", folder / "release" / "google" / "umt5-xxl")
    (folder / "only spiece").mkdir()
    shutil.copy(folder / "tokens" / "spiece.model", folder / "only spiece")
    expected = reader(folder / "tokens", folder / "model" / T5_FILE)(TEXT)
    tokenize = reader(folder / given, folder / "model" / T5_FILE)
    assert tokenize(TEXT) == expected
    assert expected[-1] == 1  # the end token
    assert tokenize("") == [1]
    assert len(tokenize("rabbit " * 600)) == 512
    assert tokenize("rabbit " * 600)[-1] == 1


@pytest.mark.parametrize("place", ["model/google/umt5-xxl", "tokenizer", "model"])
def test_a_tokenizer_beside_the_checkpoint_is_found(folder: Path, place: str) -> None:
    write_tokenizer(folder / place)
    checkpoint = folder / "model" / T5_FILE
    assert TOKENIZER.find(None, checkpoint) == (folder / place / "tokenizer.json", False)
    assert len(TOKENIZER.identity(None, checkpoint)) == 32


def test_the_tokenizer_inside_a_comfy_file_is_used(folder: Path) -> None:
    path = folder / "umt5.safetensors"
    blob = torch.frombuffer(bytearray(sentencepiece_model()), dtype=torch.uint8)
    save_file({**t5_hf_tensors(t5_tensors()), "spiece_model": blob}, path)
    expected = reader(folder / "tokens", path)(TEXT)
    assert TOKENIZER.find(None, path) == (None, True)
    assert reader(None, path)(TEXT) == expected


def test_what_the_option_names_comes_before_what_lies_beside(folder: Path) -> None:
    write_tokenizer(folder / "model" / "google" / "umt5-xxl")
    assert (
        TOKENIZER.find(folder / "tokens", folder / "model" / T5_FILE)[0]
        == folder / "tokens" / "tokenizer.json"
    )


def test_without_a_network_the_error_names_the_option(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "empty"))
    with pytest.raises(CheckpointError, match="--t5_tokenizer"):
        reader(None, folder / "model" / T5_FILE)


def test_a_folder_without_a_tokenizer_is_refused_with_what_it_holds(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=f"it holds {T5_FILE}"):
        TOKENIZER.find(folder / "model", folder / "model" / T5_FILE)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        TOKENIZER.find(folder / "nowhere", folder / "model" / T5_FILE)


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
def test_a_damaged_tokenizer_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"neither json nor a model")
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
        reader(folder / name, folder / "model" / T5_FILE)


@pytest.mark.parametrize("given", ["tokenizer.json", "spiece.model"])
def test_tokens_are_counted_and_what_is_read_ends_where_the_encoder_stops(folder: Path, given: str) -> None:
    place = folder / "tokens" / given
    count = WanTextEncoder(folder / "model" / T5_FILE, place).token_counter()
    tokenize = reader(place, folder / "model" / T5_FILE)
    long = " ".join(f"rabbit {number}" for number in range(600))

    assert (count(TEXT).tokens, count(TEXT).is_cut) == (len(tokenize(TEXT)), False)
    assert count(long).tokens > count(long).limit == 512
    assert len(tokenize(long[: count(long).kept])) == 512
    assert tokenize(long[: count(long).kept]) == tokenize(long)
    assert long.endswith(count(long).cut_text)
