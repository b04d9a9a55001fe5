"""A tokenizer whose library panics is one message, when it is read and when it is used."""

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints.tokenizers import TokenizerFiles
from encoders.clip_l import load_clip_words
from encoders.language_encoder import qwen_tokenizer
from encoders.text_encoder import TokenizerSource
from modules.errors import CheckpointError
from tests.encoders.test_language_models import tiny_tokenizer

PANIC = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "zz", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}
NO_UNKNOWN = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
FILES = TokenizerFiles("--text_encoder_tokenizer", ("tokenizer.json",), "tokenizer", "a/b", (".",))
SOURCES = {
    "qwen": qwen_tokenizer("--text_encoder_tokenizer", "a/b"),
    "own": TokenizerSource(FILES),
    "ending": TokenizerSource(FILES, begin="<|im_start|>", end="<|im_end|>"),
}


def write(folder: Path, **changes: Any) -> Path:
    content = json.loads(tiny_tokenizer().to_str()) | changes
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("changes", [{"post_processor": PANIC}, {"model": NO_UNKNOWN, "pre_tokenizer": None}])
def test_a_tokenizer_that_fails_with_a_text_is_one_message(
    source: TokenizerSource, changes: dict[str, Any], tmp_path: Path
) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(
        CheckpointError, match="cannot be read as a tokenizer .* Pass --text_encoder_tokenizer"
    ):
        source.load(path, tmp_path, "a test").read("some text")


def test_so_is_that_of_clip(tmp_path: Path) -> None:
    content = json.loads(tiny_tokenizer().to_str())
    added = [
        {"id": 500 + i, "content": one, "special": True}
        for i, one in enumerate(("<|startoftext|>", "<|endoftext|>"))
    ]
    default = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    path = write(
        tmp_path,
        model=NO_UNKNOWN,
        added_tokens=[*content["added_tokens"], *({**default, **one} for one in added)],
    )
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
        load_clip_words(FILES, path).tokenize("some text")


def test_a_whole_tokenizer_reads(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert SOURCES["own"].load(path, tmp_path, "a test").read("some text").ids
