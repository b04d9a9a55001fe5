"""Files are paired by their names, also if one has é as one character and the other as two."""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from dataset.config import load_dataset_config
from dataset.listing import find_sources
from dataset.sources.left_out import TableFolders
from dataset.sources.media_source import MediaSource
from modules.paths import find_spelling
from tests.dataset.making import make_clip, make_image

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@pytest.fixture(params=[(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)], ids=["composed", "decomposed"])
def names(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """Two spellings of one name. Disks that take both for one file have nothing to pair."""
    own, other = request.param
    (tmp_path / own).touch()
    if (tmp_path / other).exists():
        pytest.skip("this disk takes both spellings for one name")
    return own, other


def find_only(folder: Path, media: str, keys: str) -> MediaSource:
    """Return the source of the only image or clip in `folder`/`media`."""
    path = folder / "data.toml"
    text = f'[[datasets]]\n{media} = "{folder / "own"}"\ncache_directory = "{folder / "cache"}"\n{keys}\n'
    path.write_text(text, encoding="utf-8")
    (source,) = find_sources(load_dataset_config(path).datasets[0])
    return source


def test_a_caption_is_read_and_not_reported_as_left_out(tmp_path: Path, names: tuple[str, str]) -> None:
    own, other = names
    (tmp_path / "own").mkdir()
    make_image(tmp_path / "own" / f"{own}.png")
    (tmp_path / "own" / f"{other}.txt").write_text("a cat", encoding="utf-8")

    source = find_only(tmp_path, "image_directory", 'caption_extension = ".txt"')

    assert source.caption == "a cat"
    assert source.caption_path == tmp_path / "own" / f"{other}.txt"
    config = load_dataset_config(tmp_path / "data.toml")
    assert TableFolders(config).left_out_files(config.datasets[0]) is None


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("control_directory", lambda source: source.control[0]),
        ("mask_directory", lambda source: source.mask),
        ("worse_directory", lambda source: source.rejected),
    ],
)
@pytest.mark.parametrize("ending", ["", "_0"])
def test_an_image_finds_the_files_of_other_folders(
    key: str, found: Callable[[MediaSource], Path], ending: str, tmp_path: Path, names: tuple[str, str]
) -> None:
    if ending and key != "control_directory":
        pytest.skip("only control images have numbers")
    own, other = names
    for folder in ("own", "other"):
        (tmp_path / folder).mkdir()
    make_image(tmp_path / "own" / f"{own}.png")
    wanted = make_image(tmp_path / "other" / f"{other}{ending}.png", colour=(255, 255, 255))

    source = find_only(tmp_path, "image_directory", f'{key} = "{tmp_path / "other"}"')

    assert found(source) == wanted


@pytest.mark.parametrize(
    ("key", "suffix", "found"),
    [
        ("control_directory", ".mp4", lambda source: source.control[0]),
        ("control_directory", ".gif", lambda source: source.control[0]),
        ("mask_directory", ".png", lambda source: source.mask),
        ("audio_directory", ".wav", lambda source: source.audio[0]),
        ("reference_directory", "_0.png", lambda source: source.references[0]),
        ("control_mask_directory", ".png", lambda source: source.control_mask),
        ("reference_audio_directory", ".wav", lambda source: source.reference_audio),
    ],
)
def test_a_clip_finds_the_files_of_other_folders(
    key: str, suffix: str, found: Callable[[MediaSource], Path], tmp_path: Path, names: tuple[str, str]
) -> None:
    own, other = names
    for folder in ("own", "other"):
        (tmp_path / folder).mkdir()
    make_clip(tmp_path / "own" / f"{own}.mp4", 3)
    wanted = tmp_path / "other" / f"{other}{suffix}"
    wanted.touch()  # listing opens none of them

    source = find_only(tmp_path, "video_directory", f'{key} = "{tmp_path / "other"}"')

    assert found(source) == wanted


def test_a_line_of_a_list_names_its_file(tmp_path: Path, names: tuple[str, str]) -> None:
    own, other = names
    image = make_image(tmp_path / f"{own}.png")
    row = {"image_path": str(tmp_path / f"{other}.png"), "caption": "a"}
    (tmp_path / "list.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    path = tmp_path / "data.toml"
    keys = {"image_jsonl_file": tmp_path / "list.jsonl", "cache_directory": tmp_path / "cache"}
    lines = [f'{key} = "{value}"\n' for key, value in keys.items()]
    path.write_text(f"[[datasets]]\n{''.join(lines)}", encoding="utf-8")

    (source,) = find_sources(load_dataset_config(path).datasets[0])

    assert source.path == image


def test_a_name_that_exists_stays(tmp_path: Path, names: tuple[str, str]) -> None:
    own, other = names
    assert find_spelling(tmp_path / other) == tmp_path / own
    (tmp_path / other).touch()
    assert find_spelling(tmp_path / other) == tmp_path / other
    assert find_spelling(tmp_path / "none é") == tmp_path / "none é"
