"""What becomes of an answer, and of a caption that is edited."""

import pytest

from data_tools.captions.options import WordingOptions
from data_tools.captions.wording import clean_answer, reword, reword_lines
from dataset.sources.captions import complete_captions
from tests.dataset.making import make_table

PLAIN = WordingOptions.usual()
AROUND = WordingOptions.usual(
    trigger_word="zxc", caption_prefix="A video of", caption_suffix="in 4k.", replace=(), replace_regex=()
)


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ("  a cat\n\n walks. \r\n", "a cat walks."),
        ('"a cat walks"', "a cat walks"),
        ("a cat<|im_end|></s>", "a cat"),
        ("<think>what\nis it</think> a cat", "a cat"),
        ("<think>what is it", ""),
        (" \n<|endoftext|>", ""),
        ("a\0cat \ud800", "acat"),
        ("\x1b[1;31ma red\x1b[0m cat\x9b2J", "a red cat"),
        ("\x1b]0;title\x07a \x1b]8;;http://host\x1b\\cat\x1b]8;;\x1b\\ walks\x1b", "a cat walks"),
        ("a\u2028cat\x85 \u202ewalks\u2069", "a cat walks"),
        ("2 < 3 and <b> stays", "2 < 3 and <b> stays"),
    ],
)
def test_an_answer_becomes_one_line(answer: str, caption: str) -> None:
    assert clean_answer(answer) == caption


def test_words_are_put_in_as_the_keys_of_a_table_do_and_not_twice(tmp_path) -> None:  # type: ignore[no-untyped-def]
    table = make_table(
        tmp_path, "image_directory", trigger_word="zxc", caption_prefix="A video of", caption_suffix="in 4k."
    )
    for caption in ("a cat", "the zxc dog", ""):
        (by_table,) = complete_captions([caption], table)

        assert reword(caption, AROUND) == by_table
        assert reword(by_table, AROUND) == by_table


def test_texts_are_replaced_in_order_before_words_are_put_in() -> None:
    wording = WordingOptions.usual(
        trigger_word="cat",
        replace=(("dog", "cat"), ("cat runs", "bird")),
        replace_regex=((r"(\w+)s\b", r"\1S"), ("x", "")),
    )

    assert reword("dog runs", wording) == "cat, bird"
    assert reword("two dogs x", wording) == "cat, two catS"


def test_each_line_of_several_captions_is_edited() -> None:
    assert reword_lines("a cat\n\n a dog ", AROUND, True) == (
        "A video of zxc, a cat in 4k.\nA video of zxc, a dog in 4k."
    )
    assert reword_lines("a cat\n\na dog", AROUND, False) == "A video of zxc, a cat\n\na dog in 4k."
    assert reword_lines("a\n\nb", PLAIN, False) == "a\n\nb"
