"""Captions that nothing reads, or that are learned otherwise than they are meant: what is said of them."""

from pathlib import Path

import pytest

from dataset.config import DatasetConfig
from dataset.listing import find_sources
from dataset.sources.left_out import TableFolders
from dataset.sources.remarks import (
    BACKSLASH,
    LONE_BRACE,
    NOT_DRAWN,
    UNVARIED,
    find_caption_warnings,
    find_cut_captions,
    unvaried_captions,
)
from dataset.subsets import folders_config
from dataset.table import DatasetTable
from tests.dataset.making import given, load, make_image, subset_table
from tests.dataset.toy_family import ToyText

TABLE = '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "FOLDER/pics"\n'


def pictures(folder: Path, *names: str) -> Path:
    place = folder / "pics"
    place.mkdir(exist_ok=True)
    for name in names:
        make_image(place / name)
    return place


def said(config: DatasetConfig) -> str:
    return TableFolders(config).left_out_files(config.datasets[0]) or ""


def test_captions_of_another_usual_suffix_are_named_with_the_key_that_reads_them(tmp_path: Path) -> None:
    place = pictures(tmp_path, "a.png", "b.png", "c.png")
    for name in ("a.txt", "b.txt", "c.caption", "c.txt"):
        (place / name).write_text("red", encoding="utf-8")

    default = said(load(tmp_path, TABLE))
    right = said(load(tmp_path, TABLE + 'caption_extension = ".txt"'))

    assert ".txt (2): captions of images without another one" in default
    assert default.endswith('which caption_extension = ".txt" reads')
    assert right == ""


def test_of_folders_without_a_file_the_option_is_named(tmp_path: Path) -> None:
    place = tmp_path / "1_man"
    place.mkdir()
    make_image(place / "a.png")
    (place / "a.txt").write_text("red", encoding="utf-8")
    config = folders_config(given("--train_data_dir", tmp_path, "--resolution", "64"))

    assert said(config).endswith("which --caption_extension .txt reads")


@pytest.mark.parametrize(
    ("picture", "caption"),
    [
        ("a.png", "a.png.txt"),
        ("cat.png", "Cat.txt"),
    ],
)
def test_captions_under_another_name_are_named_with_their_picture(
    tmp_path: Path, picture: str, caption: str
) -> None:
    place = pictures(tmp_path, picture)
    if (place / caption).exists():
        pytest.skip("the file system takes the names as equal")
    (place / caption).write_text("red", encoding="utf-8")
    if (place / f"{Path(picture).stem}.txt").exists():
        pytest.skip("the file system takes the names as equal")

    text = said(load(tmp_path, TABLE + 'caption_extension = ".txt"'))

    assert f"{caption} of {picture}, which reads {Path(picture).stem}.txt; rename them" in text


def table_of(folder: Path, caption: str, **keys: object) -> DatasetTable:
    place = pictures(folder, "a.png")
    (place / "a.txt").write_text(caption, encoding="utf-8")
    return subset_table(folder, caption_extension=".txt", **keys)


@pytest.mark.parametrize(
    ("caption", "keys", "kinds"),
    [
        ("a {red|blue} coat", {}, [NOT_DRAWN]),
        ("a {red|blue} coat", {"enable_wildcard": True}, []),
        ("a {red|blue coat", {"enable_wildcard": True}, [LONE_BRACE]),
        (r"miku \(vocaloid\)", {}, [BACKSLASH]),
        ("miku (vocaloid)", {}, []),
        ('{"short_description": "a, b"}', {"shuffle_caption": True}, [UNVARIED]),
        ('{"short_description": "a, b"}', {"caption_tag_dropout_rate": 0.1}, [UNVARIED]),
        ('{"short_description": "a, b"}', {"enable_wildcard": True}, []),
        ('{"short_description": "a {b|c}"}', {"enable_wildcard": True}, [UNVARIED]),
        ('{"short_description": "a, b"}', {}, []),
        ("{a, b", {"shuffle_caption": True}, []),
    ],
)
def test_marks_that_are_learned_as_text_are_named(
    tmp_path: Path, caption: str, keys: dict[str, object], kinds: list[str]
) -> None:
    sources = find_sources(table_of(tmp_path, caption, **keys))

    remarks = find_caption_warnings(sources)

    assert [remark.kind for remark in remarks] == kinds
    assert all(caption in remark.text and "a.txt" in remark.text for remark in remarks)


def test_tokens_of_captions_that_vary_are_those_of_the_whole_texts(tmp_path: Path) -> None:
    """The toy's encoder reads four words."""
    keys = {"enable_wildcard": True, "shuffle_caption": True, "trigger_word": "ohwx"}
    sources = find_sources(table_of(tmp_path, "a {b|b} c\nd e f g", **keys))

    remarks, _ = find_cut_captions(sources, {"t5": ToyText().token_counter()})

    assert list(unvaried_captions(sources[0])) == ["ohwx, a b c", "ohwx, d e f g"]
    assert [remark.kind for remark in remarks] == ["have a caption longer than t5 reads"]
    assert "5 tokens, t5 reads 4; lost: g" in remarks[0].text


def test_files_of_onetrainer_next_to_a_picture_are_no_pictures(tmp_path: Path) -> None:
    place = pictures(tmp_path, "a.png", "a-masklabel.png", "a-condlabel.png", "B-MaskLabel.PNG")
    (place / "a.txt").write_text("red", encoding="utf-8")
    text = TABLE + 'caption_extension = ".txt"\n'

    plain = load(tmp_path, text)
    masked = load(tmp_path, f'{text}mask_directory = "{place.as_posix()}"')

    (source,) = find_sources(plain.datasets[0])
    assert (source.path.name, source.mask) == ("a.png", None)
    (source,) = find_sources(masked.datasets[0])
    assert source.mask == place / "a-masklabel.png"
    assert f'mask_directory = "{place.as_posix()}" uses' in said(plain)
    assert "-condlabel.png (1): conditioning images of OneTrainer" in said(plain)
    assert "masklabel" not in said(masked)
