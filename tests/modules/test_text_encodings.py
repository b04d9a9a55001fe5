"""The encodings of caption files as other programs write them."""

import random

import pytest

from modules.text_encodings import guess_encoding, guess_encodings

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
