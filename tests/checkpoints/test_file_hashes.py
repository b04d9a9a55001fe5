"""Hashes of a model's file, and the file next to it that keeps them."""

import hashlib
import os
from pathlib import Path

from checkpoints.file_hashes import full_hash, short_hash


def test_the_short_hash_is_of_64_kib_behind_the_first_mib(tmp_path: Path) -> None:
    data = os.urandom(1 << 20) + bytes(range(256)) * 300
    (tmp_path / "model.safetensors").write_bytes(data)

    expected = hashlib.sha256(data[1 << 20 :][: 1 << 16]).hexdigest()[:8]
    assert short_hash(tmp_path / "model.safetensors") == expected


def test_a_hash_is_kept_until_the_file_changes(tmp_path: Path) -> None:
    model, entry = tmp_path / "model.safetensors", tmp_path / ".model.safetensors.sha256"
    model.write_bytes(b"weights")
    assert full_hash(model) == hashlib.sha256(b"weights").hexdigest()
    kept = entry.read_text(encoding="utf-8")
    entry.write_text(f"{kept[:-65]}{'0' * 64}\n", encoding="utf-8")
    assert full_hash(model) == "0" * 64  # the file is not read

    model.write_bytes(b"other weights")
    assert full_hash(model) == hashlib.sha256(b"other weights").hexdigest()
    entry.write_text("anything", encoding="utf-8")
    assert full_hash(model) == hashlib.sha256(b"other weights").hexdigest()


def test_a_folder_that_cannot_be_written_is_no_reason_to_end(tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"weights")
    (tmp_path / ".model.safetensors.sha256").mkdir()  # a file cannot take its place

    assert full_hash(model) == hashlib.sha256(b"weights").hexdigest()
