"""Where the two tokenizers are found, and that every form of them gives the tokens of transformers."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from encoders.text_encoder import FileTextEncoder
from encoders.tokenizers import TextTokenizer
from hunyuan_model.text_encoders import CLIP, LLAMA_TOKENIZER, clip_text_encoder, find_pad
from modules.checkpoints.tokenizers import TokenizerFiles
from modules.errors import CheckpointError
from tests.tiny.hunyuan_encoders import LLAMA_SPECIAL, save, write_clip_tokenizer, write_llama_tokenizer

LLAMA_FILES = LLAMA_TOKENIZER.files
TEXTS = (
    "a small rabbit runs through tall grass; two dogs & a cat, 7:30!",
    "",
    "  DON'T   stop\n\n\nnow\t",
    "日本 Ünïcödé 🐇",
    "<|endoftext|> rabbit <|eot_id|>",
    "rabbit " * 300,
)


def loaded(encoder: FileTextEncoder[torch.nn.Module]) -> TextTokenizer:
    tokenizer = encoder.source.load(encoder.tokenizer, encoder.path, "the encoder")
    encoder.check_tokenizer(tokenizer)
    return tokenizer


def load_llama(path: Path | None, model: Path) -> TextTokenizer:
    return LLAMA_TOKENIZER.load(path, model, "Llama")


def load_clip(path: Path | None, model: Path) -> TextTokenizer:
    return loaded(clip_text_encoder(model, tokenizer=path))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A single-file encoder without a tokenizer anywhere near; tokenizers lie in `tokens` and `clip
    tokens`.
    """
    write_llama_tokenizer(tmp_path / "tokens")
    write_clip_tokenizer(tmp_path / "clip tokens")
    return save(tmp_path / "models" / "one" / "model.safetensors", {"a": torch.ones(1)})


@pytest.mark.parametrize("adds_begin", [True, False])
def test_llamas_tokens_equal_those_of_transformers(model: Path, adds_begin: bool) -> None:
    folder = model.parents[2] / "tokens"
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    write_llama_tokenizer(folder, adds_begin)  # a file may leave the begin token to the class that reads it
    ours = load_llama(folder, model)
    for text in TEXTS:
        assert ours.read(text).ids == theirs(text)["input_ids"]
    assert ours.read("").ids == [0]
    assert find_pad(ours) == theirs.pad_token_id == LLAMA_SPECIAL.index("<pad>")


@pytest.mark.parametrize("form", ["vocab.json", "tokenizer.json"])
def test_clips_tokens_equal_those_of_transformers(model: Path, form: str) -> None:
    folder = model.parents[2] / "clip tokens"
    theirs = CLIPTokenizer.from_pretrained(folder)
    if form == "tokenizer.json":
        theirs.save_pretrained(folder)
        (folder / "merges.txt").unlink(missing_ok=True)
    ours = load_clip(folder, model)
    for text in TEXTS:
        assert ours.read(text).cut(77).ids == theirs(text, truncation=True, max_length=77)["input_ids"]
    assert len(ours.read(TEXTS[-1]).cut(77).ids) == 77


@pytest.mark.parametrize(
    ("told", "pad"), [({"content": "<|eot_id|>"}, 4), ("<image>", 5), (None, 6), ("unknown", 6)]
)
def test_the_pad_token_is_the_one_its_configuration_names(model: Path, told: object, pad: int) -> None:
    folder = model.parents[2] / "tokens"
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": told}), encoding="utf-8")
    assert find_pad(load_llama(folder, model)) == pad


def test_a_tokenizer_needs_no_configuration(model: Path) -> None:
    folder = model.parents[2] / "tokens"
    (folder / "tokenizer_config.json").unlink()
    assert find_pad(load_llama(folder / "tokenizer.json", model)) == LLAMA_SPECIAL.index("<pad>")


@pytest.mark.parametrize(
    ("files", "source", "place"),
    [
        (LLAMA_FILES, "tokens", "models/one"),
        (LLAMA_FILES, "tokens", "models/one/tokenizer"),
        (LLAMA_FILES, "tokens", "models/tokenizer"),
        (CLIP.tokenizer, "clip tokens", "models/one"),
        (CLIP.tokenizer, "clip tokens", "models/one/tokenizer_2"),
        (CLIP.tokenizer, "clip tokens", "models/tokenizer_2"),
    ],
)
@pytest.mark.parametrize("given", ["file", "folder"])
def test_a_tokenizer_beside_the_encoder_is_found(
    model: Path, files: TokenizerFiles, source: str, place: str, given: str
) -> None:
    root = model.parents[2]
    assert files.find(None, model) is None
    shutil.copytree(root / source, root / place, dirs_exist_ok=True)
    found = files.find(None, model if given == "file" else model.parent)
    assert found is not None
    assert found.parent == root / place


def test_a_loose_tokenizer_of_the_other_encoder_is_not_taken(model: Path) -> None:
    root = model.parents[2]
    shutil.copy(root / "tokens" / "tokenizer.json", model.parent)
    assert LLAMA_FILES.find(None, model) == model.parent / "tokenizer.json"
    assert CLIP.tokenizer.find(None, model) is None


def test_what_the_option_names_comes_before_what_lies_beside(model: Path) -> None:
    root = model.parents[2]
    write_llama_tokenizer(model.parent / "tokenizer")
    assert LLAMA_FILES.find(root / "tokens", model) == root / "tokens" / "tokenizer.json"
    shutil.copytree(root / "clip tokens", root / "release" / "tokenizer_2")
    assert CLIP.tokenizer.find(root / "release", model) == root / "release" / "tokenizer_2" / "vocab.json"


def test_without_a_network_the_error_names_the_option(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(model.parent / "empty"))
    with pytest.raises(
        CheckpointError, match=r"--text_encoder1_tokenizer the folder tokenizer of hunyuanvideo-community"
    ):
        load_llama(None, model)
    with pytest.raises(
        CheckpointError, match=r"--text_encoder2_tokenizer the files of openai/clip-vit-large-patch14"
    ):
        load_clip(None, model)


@pytest.mark.parametrize(("source", "name"), [("tokens", "tokenizer.json"), ("clip tokens", "vocab.json")])
def test_the_hubs_copy_is_used_where_there_is_no_other(
    model: Path, source: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the hub's cache laid out as the library lays it out."""
    files = LLAMA_FILES if source == "tokens" else CLIP.tokenizer
    root = model.parents[2]
    cache = root / "hub" / f"models--{files.repository.replace('/', '--')}"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    snapshot = cache / "snapshots" / ("0" * 40) / files.folder
    snapshot.mkdir(parents=True)
    if files is CLIP.tokenizer:
        CLIPTokenizer.from_pretrained(root / source).save_pretrained(root / source)
    shutil.copy(root / source / "tokenizer.json", snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root / "hub"))
    load = load_llama if files is LLAMA_FILES else load_clip
    assert load(None, model).read(TEXTS[0]) == load(root / source, model).read(TEXTS[0])


@pytest.mark.parametrize(
    ("files", "load"),
    [(LLAMA_FILES, load_llama), (CLIP.tokenizer, load_clip)],
)
def test_what_is_no_tokenizer_is_refused(model: Path, files: TokenizerFiles, load: object) -> None:
    with pytest.raises(CheckpointError, match=rf"{files.option}.*it holds model\.safetensors"):
        load(model.parent, model)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load(model.parent / "nowhere", model)  # type: ignore[operator]
    for name in files.names:
        (model.parent / name).write_bytes(b"not json")
        with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
            load(model.parent / name, model)  # type: ignore[operator]


def test_a_tokenizer_of_the_wrong_kind_is_refused_for_clip(model: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not put a text between <\|startoftext\|>"):
        load_clip(model.parents[2] / "tokens", model)
    vocabulary = model.parents[2] / "clip tokens" / "vocab.json"
    names = json.loads(vocabulary.read_text(encoding="utf-8"))
    del names["<|startoftext|>"]
    vocabulary.write_text(json.dumps(names), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"it has no <\|startoftext\|>"):
        load_clip(vocabulary, model)
