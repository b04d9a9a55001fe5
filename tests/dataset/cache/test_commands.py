"""Cache folders remember how their caches were made, and nothing that is not true any more."""

import contextlib
import json
from pathlib import Path

import pytest

from dataset.cache.commands import NAME, recall_options, remember_options
from dataset.config import DatasetConfig, load_dataset_config
from modules.repeated_options import RepeatedOption
from protocols.families import FAMILIES
from wan.options import WanTextCachingOptions, WanTextOptions

WAN = FAMILIES["wan"]


def write_config(folder: Path) -> DatasetConfig:
    (folder / "clips").mkdir()
    (folder / "cache").mkdir()
    text = '[[datasets]]\nvideo_directory = "clips"\ncache_directory = "cache"\nresolution = [64, 64]\n'
    (folder / "data.toml").write_text(text, encoding="utf-8")
    return load_dataset_config(Path("data.toml"))


def recall(folder: Path = Path("cache")) -> list[RepeatedOption]:
    return recall_options([folder], "wan", WAN)


@pytest.fixture
def remembered(tmp_path: Path) -> Path:
    (tmp_path / "t5.pth").write_bytes(b"")
    own = WanTextCachingOptions(text=WanTextOptions(t5=Path("t5.pth"), text_encoder_form="nf4"))
    with contextlib.chdir(tmp_path):
        typed = {"t5": "--t5", "text_encoder_form": "--text_encoder_form"}
        remember_options(write_config(tmp_path), "wan", "TextCaching", own, typed)
    return tmp_path


def test_a_path_is_named_as_it_was_typed_or_whole_from_another_folder(remembered: Path) -> None:
    with contextlib.chdir(remembered):
        here = [(option.flag, option.value) for option in recall()]
    there = [(option.flag, option.value) for option in recall(remembered / "cache")]

    assert here == [("--t5", Path("t5.pth")), ("--text_encoder_form", "nf4")]
    assert there == [("--t5", remembered / "t5.pth"), ("--text_encoder_form", "nf4")]


def test_a_file_that_is_gone_is_not_named(remembered: Path) -> None:
    (remembered / "t5.pth").unlink()

    assert [option.name for option in recall(remembered / "cache")] == ["text_encoder_form"]


@pytest.mark.parametrize(
    "change",
    [
        {"value": "nf4\x1b[2J"},
        {"value": ["nf4", {"a": 1}]},
        {"value": True},
        {"value": "x" * 20_000},
        {"value": ["nf4", "--network_module", "theirs"]},
        {"value": 4},
    ],
)
def test_what_a_hostile_file_says_is_left_out(remembered: Path, change: dict[str, object]) -> None:
    path = remembered / "cache" / NAME
    content = json.loads(path.read_text(encoding="utf-8"))
    content["families"]["wan"]["TextCaching"]["options"] |= {
        "text_encoder_form": {"flag": "--x; rm", **change},
        "output_dir": {"flag": "--output_dir", "value": "/"},
    }
    path.write_text(json.dumps(content), encoding="utf-8")

    assert [option.name for option in recall(remembered / "cache")] == ["t5"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version": 1}', '{"version": 1, "families": {"wan": 3}}'])
def test_a_damaged_file_tells_nothing(remembered: Path, text: str) -> None:
    (remembered / "cache" / NAME).write_text(text, encoding="utf-8")

    assert recall(remembered / "cache") == []
