"""The records of cache files: what a tampered one may say without harm."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dataset.cache.files import Header
from dataset.cache.records import CHECK_KEY, RECORD_KEY, VERSION, _crc, identify, latent_record, text_records
from modules.errors import CacheError
from tests.dataset.making import make_image

WHOLE = {
    **{"encoder": {}, "options": {}, "files": [], "parts": 1, "crc32": {}},
    "clip": {"size": [32, 32], "kept_frames": 40, "complete": True},
}


def header(text: str) -> Header:
    """A header with this record and its right checksum: not damaged, but made by someone."""
    return Header(Path("a_wan.safetensors"), {RECORD_KEY: text, CHECK_KEY: _crc(text)}, ())


def record(**clip: Any) -> str:
    return json.dumps({"version": VERSION, "latents": {**WHOLE, "clip": {**WHOLE["clip"], **clip}}})


def test_a_record_that_is_whole_is_read() -> None:
    found = latent_record(header(record()))
    assert found is not None
    assert found.clip is not None
    assert found.clip.kept_frames == 40


@pytest.mark.parametrize("frames", [10**12, -1, 1.5, True, "40", None])
def test_a_clip_of_impossible_length_is_no_record(frames: Any) -> None:
    with pytest.raises(CacheError, match=r"a_wan\.safetensors: damaged, .*frames"):
        latent_record(header(record(kept_frames=frames)))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"version": ' + "[" * 80 + "]" * 80 + "}", "{", "1" + "0" * 5000]
)
def test_a_record_that_is_nested_or_broken_is_named(text: str) -> None:
    for read in (latent_record, text_records):
        with pytest.raises(CacheError, match=r"a_wan\.safetensors: damaged, its record cannot be read"):
            read(header(text))


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_folder_of_frames_may_have_names_in_bytes(tmp_path: Path) -> None:
    for folder in ("text", "bytes"):
        (tmp_path / folder).mkdir()
        make_image(tmp_path / folder / "a.png")
    (tmp_path / "bytes" / "a.png").rename(os.fsdecode(os.fsencode(tmp_path / "bytes") + b"/\xff.png"))

    assert identify(tmp_path / "bytes").sha256 != identify(tmp_path / "text").sha256
