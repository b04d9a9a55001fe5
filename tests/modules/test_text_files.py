"""Texts that a user names: regular files, bounded in size and depth, in the encodings of other programs."""

import os
import random
import time
from pathlib import Path

import pytest

from modules.text_encodings import guess_encoding, guess_encodings
from modules.text_files import (
    MAX_DEPTH,
    bad_character,
    parse_json,
    parse_toml,
    read_lines,
    read_text,
    require_regular_file,
)


def test_a_text_is_read_without_its_mark_and_with_plain_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffa cät\r\nb\rc\n".encode())

    assert read_text(tmp_path / "a.txt") == "a cät\nb\nc\n"
    assert list(read_lines(tmp_path / "a.txt")) == ["a cät", "b", "c"]


def test_a_text_may_have_as_many_bytes_as_allowed_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * (1 << 20))
    assert len(read_text(tmp_path / "a.txt", 1 << 20)) == 1 << 20

    (tmp_path / "a.txt").write_text("x" * ((1 << 20) + 1))
    with pytest.raises(OSError, match="larger than 1 MiB"):
        read_text(tmp_path / "a.txt", 1 << 20)


def test_a_line_may_have_as_many_characters_as_allowed_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 100 + "\n" + "y" * 100)
    assert [len(line) for line in read_lines(tmp_path / "a.txt", 100)] == [100, 100]

    with pytest.raises(OSError, match="line 1 has more than 99 characters"):
        list(read_lines(tmp_path / "a.txt", 99))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_only_regular_files_and_links_to_them_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")

    require_regular_file(tmp_path / "link")
    assert read_text(tmp_path / "link") == "text"
    for name, reason in {
        "pipe": "named pipe",
        "zero": "device",
        ".": "Is a directory",
        "a\0b": "no file name",
    }.items():
        with pytest.raises(OSError, match=reason):
            read_text(tmp_path / name)
        with pytest.raises(OSError, match=reason):
            list(read_lines(tmp_path / name))
    with pytest.raises(FileNotFoundError):
        require_regular_file(tmp_path / "dangling")


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 900, 200_000])
def test_what_is_nested_too_deeply_is_an_error_of_its_own(depth: int) -> None:
    nested = "[" * depth + "]" * depth
    for parse, text in (
        (parse_json, nested),
        (parse_json, '{"a":' * depth + "1" + "}" * depth),
        (parse_toml, f"a = {nested}"),
        (parse_toml, ".".join(["a"] * (depth + 1)) + " = 1"),
        (parse_toml, "[" + " . ".join(['"a"'] * (depth + 1)) + "]"),
    ):
        with pytest.raises(ValueError, match="nested more than 64 levels deep"):
            parse(text)


def test_what_is_nested_as_deeply_as_allowed_is_read() -> None:
    depth = MAX_DEPTH - 1
    assert parse_json("[" * depth + "]" * depth) != []
    assert parse_toml("a = " + "[" * (depth - 1) + "]" * (depth - 1)) != {}
    assert parse_toml('a = "' + "x. " * 200 + '"') == {"a": "x. " * 200}


def test_long_texts_without_depth_are_read_quickly() -> None:
    started = time.monotonic()

    parse_toml('a = "' + "x" * 1_000_000 + '"\nb = "' + '\\"' * 100_000 + '"')

    assert time.monotonic() - started < 5


def test_characters_that_no_text_can_hold_are_told() -> None:
    assert bad_character("a cät 🐈\u200d\n\t") is None
    assert "NUL" in str(bad_character("a\0b"))
    assert "ud800" in str(bad_character("a\ud800b"))


CAPTIONS = {
    "cp1252": "ein roter Käfer fährt über die Straße",
    "cp1250": "dziewczyna w żółtej sukience idzie przez łąkę",
    "cp1251": "девушка в красном платье идёт по улице",
    "koi8_r": "девушка в красном платье идёт по улице",
    "cp1253": "ένα κορίτσι με κόκκινο φόρεμα περπατά",
    "cp932": "赤いドレスを着た女性が街を歩いている",
    "euc_jp": "赤いドレスを着た女性が街を歩いている",
    "gb18030": "一个穿红裙子的女孩在街上走",
    "big5": "一個穿紅裙子的女孩在街上走",
    "cp949": "빨간 드레스를 입은 여자가 거리를 걷고 있다",
    "utf-16": "a red car",
    "utf-16-le": "a red car",
    "utf-16-be": "a red car",
    "utf-32": "a red car",
}


@pytest.mark.parametrize("encoding", CAPTIONS)
def test_the_encoding_of_a_caption_is_found(encoding: str) -> None:
    guess = guess_encoding(CAPTIONS[encoding].encode(encoding))

    assert guess is not None
    assert (guess.text, guess.is_sure) == (CAPTIONS[encoding], True)


def test_a_word_that_may_be_of_two_encodings_is_not_sure() -> None:
    guess = guess_encoding("naïve".encode("cp1252"))

    assert guess is not None
    assert (guess.text, guess.is_sure) == ("naïve", False)


def test_captions_of_one_folder_are_judged_together() -> None:
    texts = ["naïve", "un café à Paris, l’été", "des élèves français très fatigués", "ça va"]

    found = guess_encodings([text.encode("cp1252") for text in texts])

    assert [(one.text, one.is_sure) for one in found if one is not None] == [(text, True) for text in texts]


def test_a_caption_of_another_encoding_than_the_others_is_judged_alone() -> None:
    contents = [CAPTIONS[name].encode(name) for name in ("cp1251", "cp1251", "gb18030", "utf-16")]

    assert [one and one.text for one in guess_encodings(contents)] == [
        CAPTIONS[name] for name in ("cp1251", "cp1251", "gb18030", "utf-16")
    ]


def test_damaged_utf_8_is_called_so_and_never_sure() -> None:
    guess = guess_encoding("schöne Grüße über alle Maßen".encode() + b"\xc3")

    assert guess is not None
    assert (guess.name, guess.is_sure) == ("damaged UTF-8", False)


@pytest.mark.parametrize("size", [10, 100, 3000])
def test_random_bytes_are_no_sure_text(size: int) -> None:
    dice = random.Random(size)

    guesses = [guess_encoding(dice.randbytes(size)) for _ in range(30)]

    assert not any(guess is not None and guess.is_sure for guess in guesses)
