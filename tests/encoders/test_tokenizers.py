"""Where tokenizers are found, that every form gives the tokens of transformers, and what is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerFast

from encoders.text_encoder import FileTextEncoder, TextTokenizer
from hunyuan_model.text_encoders import CLIP, LLAMA_TOKENIZER, HunyuanClip, LlavaTextEncoder, find_pad
from modules.errors import CheckpointError
from tests.tiny.hunyuan_encoders import LLAMA_SPECIAL, save, write_clip_tokenizer, write_llama_tokenizer
from tests.tiny.wan_encoders import sentencepiece_model, t5_hf_tensors, t5_tensors, write_tokenizer
from wan.t5 import MAX_TOKENS, TOKENIZER, WanTextEncoder

TEXTS = (
    "a small rabbit runs through tall grass; two dogs & a cat, 7:30!",
    "",
    "  DON'T   stop\n\n\nnow\t 日本 Ünïcödé 🐇",
    "<|endoftext|> rabbit <|eot_id|>",
    "rabbit " * 600,
)


@dataclass(frozen=True)
class Kind:
    """The tokenizer of one encoder."""

    encoder: Callable[..., FileTextEncoder[Any]]  # of a model's file, and a tokenizer
    write: Callable[[Path], None]
    places: tuple[str, ...]  # relative to the model's folder
    file: str  # that is written
    repository: str  # as a message names it

    def load(self, path: Path | None, model: Path) -> TextTokenizer:
        """As the encoder loads it."""
        encoder = self.encoder(model, tokenizer=path)
        tokenizer = encoder.source.load(path, model, "the encoder")
        if encoder.check_tokenizer is not None:
            encoder.check_tokenizer(tokenizer)
        return tokenizer


KINDS = {
    "umT5": Kind(
        *(WanTextEncoder, write_tokenizer, ("google/umt5-xxl", "../tokenizer", "."), "tokenizer.json"),
        repository="--t5_tokenizer the folder google/umt5-xxl of Wan-AI",
    ),
    "Llama": Kind(
        *(LlavaTextEncoder, write_llama_tokenizer, (".", "tokenizer", "../tokenizer"), "tokenizer.json"),
        repository="--text_encoder1_tokenizer the folder tokenizer of hunyuanvideo-community",
    ),
    "CLIP-L": Kind(
        *(HunyuanClip, write_clip_tokenizer, (".", "tokenizer_2", "../tokenizer_2"), "vocab.json"),
        repository="--text_encoder2_tokenizer the files of openai/clip-vit-large-patch14",
    ),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A single-file encoder without a tokenizer anywhere near."""
    return save(tmp_path / "models" / "one" / "model.safetensors", {"a": torch.ones(1)})


@pytest.fixture
def tokens(tmp_path: Path, kind: Kind) -> Path:
    """A tokenizer elsewhere."""
    kind.write(tmp_path / "tokens")
    return tmp_path / "tokens"


def test_umt5s_tokens_equal_those_of_transformers(tmp_path: Path, model: Path) -> None:
    write_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    for given in ("tokenizer.json", "spiece.model"):
        ours = TOKENIZER.load(tmp_path / given, model, "umT5")
        for text in (TEXTS[0], "", TEXTS[-1]):
            expected = theirs(text, truncation=True, max_length=MAX_TOKENS, add_special_tokens=True)
            assert ours.read(text).cut(MAX_TOKENS).ids == expected["input_ids"]


@pytest.mark.parametrize("adds_begin", [True, False])
def test_llamas_tokens_equal_those_of_transformers(tmp_path: Path, model: Path, adds_begin: bool) -> None:
    write_llama_tokenizer(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    write_llama_tokenizer(tmp_path, adds_begin)  # a file may leave the begin token to the class that reads it
    ours = LLAMA_TOKENIZER.load(tmp_path, model, "Llama")
    for text in TEXTS:
        assert ours.read(text).ids == theirs(text)["input_ids"]
    assert find_pad(ours) == theirs.pad_token_id == LLAMA_SPECIAL.index("<pad>")


@pytest.mark.parametrize("form", ["vocab.json", "tokenizer.json"])
def test_clips_tokens_equal_those_of_transformers(tmp_path: Path, model: Path, form: str) -> None:
    write_clip_tokenizer(tmp_path)
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    if form == "tokenizer.json":
        theirs.save_pretrained(tmp_path)
        (tmp_path / "merges.txt").unlink(missing_ok=True)
    ours = KINDS["CLIP-L"].load(tmp_path, model)
    for text in TEXTS:
        assert ours.read(text).cut(77).ids == theirs(text, truncation=True, max_length=77)["input_ids"]


@pytest.mark.parametrize(
    ("told", "pad"), [({"content": "<|eot_id|>"}, 4), ("<image>", 5), (None, 6), ("unknown", 6)]
)
def test_the_pad_token_is_the_one_its_configuration_names(
    tmp_path: Path, model: Path, told: object, pad: int
) -> None:
    write_llama_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": told}), encoding="utf-8")
    assert find_pad(LLAMA_TOKENIZER.load(tmp_path, model, "Llama")) == pad


def test_a_tokenizer_beside_the_encoder_is_found(model: Path, kind: Kind, tokens: Path) -> None:
    source = kind.encoder(model).source
    assert source.find(None, model) == (None, False)
    for place in kind.places:
        folder = (model.parent / place).resolve()
        shutil.copytree(tokens, folder, dirs_exist_ok=True)
        for given in (model, model.parent):
            assert source.find(None, given) == (folder / kind.file, False)
        for file in tokens.iterdir():
            (folder / file.name).unlink()


def test_what_the_option_names_comes_before_what_lies_beside(model: Path, kind: Kind, tokens: Path) -> None:
    shutil.copytree(tokens, (model.parent / kind.places[0]).resolve(), dirs_exist_ok=True)
    shutil.copytree(tokens, tokens.parent / "release" / kind.places[1].removeprefix("../"))
    source = kind.encoder(model).source
    assert source.find(tokens, model)[0] == tokens / kind.file
    if not kind.places[1].startswith(".."):
        inside = tokens.parent / "release" / kind.places[1] / kind.file
        assert source.find(tokens.parent / "release", model)[0] == inside


def test_a_loose_tokenizer_of_another_encoder_is_not_taken(tmp_path: Path, model: Path) -> None:
    write_llama_tokenizer(tmp_path)
    shutil.copy(tmp_path / "tokenizer.json", model.parent)
    assert LLAMA_TOKENIZER.find(None, model)[0] == model.parent / "tokenizer.json"
    assert CLIP.tokenizer.find(None, model) is None


def test_the_tokenizer_inside_a_comfy_file_is_used(tmp_path: Path) -> None:
    path = tmp_path / "umt5.safetensors"
    blob = torch.frombuffer(bytearray(sentencepiece_model()), dtype=torch.uint8)
    save_file({**t5_hf_tensors(t5_tensors()), "spiece_model": blob}, path)
    write_tokenizer(tmp_path / "tokens")
    expected = TOKENIZER.load(tmp_path / "tokens", path, "umT5").read(TEXTS[0])
    assert TOKENIZER.find(None, path) == (None, True)
    assert TOKENIZER.load(None, path, "umT5").read(TEXTS[0]) == expected


def test_without_a_network_the_error_names_the_option(
    model: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(model.parent / "empty"))
    with pytest.raises(CheckpointError, match=kind.repository):
        kind.load(None, model)


def test_the_hubs_copy_is_used_where_there_is_no_other(
    model: Path, kind: Kind, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the hub's cache laid out as the library lays it out."""
    files = kind.encoder(model).source.files
    cache = tokens.parent / "hub" / f"models--{files.repository.replace('/', '--')}"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    snapshot = cache / "snapshots" / ("0" * 40) / files.folder
    snapshot.mkdir(parents=True)
    if files is CLIP.tokenizer:
        CLIPTokenizer.from_pretrained(tokens).save_pretrained(tokens)
    shutil.copy(tokens / "tokenizer.json", snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tokens.parent / "hub"))
    assert kind.load(None, model).read(TEXTS[0]) == kind.load(tokens, model).read(TEXTS[0])


def test_what_is_no_tokenizer_is_refused(model: Path, kind: Kind) -> None:
    files = kind.encoder(model).source.files
    with pytest.raises(CheckpointError, match=rf"{files.option}.*it contains model\.safetensors"):
        kind.load(model.parent, model)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        kind.load(model.parent / "nowhere", model)
    for name in files.names:
        (model.parent / name).write_bytes(b"neither json nor a model")
        with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
            kind.load(model.parent / name, model)


def test_a_tokenizer_of_the_wrong_kind_is_refused_for_clip(tmp_path: Path, model: Path) -> None:
    write_llama_tokenizer(tmp_path / "llama")
    write_clip_tokenizer(tmp_path / "clip")
    with pytest.raises(CheckpointError, match=r"does not put a text between <\|startoftext\|>"):
        KINDS["CLIP-L"].load(tmp_path / "llama", model)
    vocabulary = tmp_path / "clip" / "vocab.json"
    names = json.loads(vocabulary.read_text(encoding="utf-8"))
    del names["<|startoftext|>"]
    vocabulary.write_text(json.dumps(names), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"it has no <\|startoftext\|>"):
        KINDS["CLIP-L"].load(vocabulary, model)
