"""Normalisers that lengthen texts without measure are refused; those of real tokenizers are not."""

import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from modules.checkpoints.tokenizers import MAX_BYTES, TokenizerFiles, check_sentencepiece
from modules.errors import CheckpointError
from tests.tiny.wan_encoders import sentencepiece_model

FILES = TokenizerFiles("--tokenizer", ("tokenizer.json",), "", "nobody/nothing", ("."))


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*inner: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(inner)}


def write(path: Path, normaliser: dict[str, Any] | None) -> Path:
    content = json.loads(Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")).to_str())
    path.write_text(json.dumps({**content, "normalizer": normaliser}), encoding="utf-8")
    return path


def field(number: int, content: bytes) -> bytes:
    """One entry of a protobuf message."""
    length, groups = len(content), bytearray()
    while True:
        groups.append(length & 0x7F | (0x80 if length > 0x7F else 0))
        length >>= 7
        if not length:
            return bytes([number << 3 | 2]) + bytes(groups) + content


HARMLESS = {
    "none": None,
    "CLIP's": sequence({"type": "NFC"}, replace(" ", Regex=r"\s+"), {"type": "Lowercase"}),
    "Llama 2's": sequence({"type": "Prepend", "prepend": "▁"}, replace("▁", String=" ")),
}
HARMFUL = {
    "a long replacement": replace("x" * 1000, String="a"),
    "by a regular expression": replace("x" * 1000, Regex="."),
    "many short ones": sequence(*[replace("aa", String="a")] * 40),
    "nested": sequence(sequence(replace("x" * 100, String="a")), replace("y" * 100, String="x")),
    "a long beginning": {"type": "Prepend", "prepend": "x" * 1000},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_normaliser_of_a_real_tokenizer_is_taken(name: str, tmp_path: Path) -> None:
    FILES.read(write(tmp_path / "tokenizer.json", HARMLESS[name]))


@pytest.mark.parametrize("name", HARMFUL)
def test_a_normaliser_that_lengthens_without_measure_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json .*its normaliser makes \d+ characters of one, 256"
    ):
        FILES.read(write(tmp_path / "tokenizer.json", HARMFUL[name]))


def test_a_table_of_characters_that_lengthens_without_measure_is_refused(tmp_path: Path) -> None:
    charsmap = (4).to_bytes(4, "little") + bytes(4) + b"short\0" + b"x" * 5000 + b"\0"
    table = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}

    with pytest.raises(CheckpointError, match="makes 5000 characters of one"):
        FILES.read(write(tmp_path / "tokenizer.json", table))
    with pytest.raises(ValueError, match="makes 5000 characters of one"):
        check_sentencepiece(field(1, b"piece") + field(3, field(1, b"name") + field(2, charsmap)))


def test_a_sentencepiece_model_is_taken_unless_it_is_damaged() -> None:
    model = sentencepiece_model()
    check_sentencepiece(model)

    for damaged in (model + b"\x0a", b"\x1a\xff\xff", b"\x07", b"\xff" * 10_000_000):
        with pytest.raises(ValueError, match="field"):
            check_sentencepiece(damaged)


def test_a_large_vocabulary_is_gone_through_quickly() -> None:
    model = field(1, b"0123456789") * 256_000 + field(3, field(2, bytes(4) + b"a\0"))
    started = time.perf_counter()

    check_sentencepiece(model)

    assert time.perf_counter() - started < 1


def test_a_file_larger_than_any_tokenizer_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(10 << 30)

    for read in (FILES.read, FILES.read_bytes):
        with pytest.raises(CheckpointError, match=f"it has 10240 MiB, {MAX_BYTES >> 20} are the most"):
            read(tmp_path / "tokenizer.json")
