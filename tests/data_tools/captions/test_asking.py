"""The frames that are shown, the caption in an answer, and what becomes of a caption that is edited."""

from pathlib import Path

import pytest
from PIL import Image

from data_tools.captions.asking import caption_in, choose_frames, read_shown, reword, reword_lines
from data_tools.captions.options import WordingOptions
from dataset.sources.captions import complete_captions
from tests.dataset.making import frame_numbers, make_clip, make_frames, make_image, make_table


@pytest.mark.parametrize(
    ("num_frames", "wanted", "chosen"),
    [(81, 3, (13, 40, 67)), (4, 8, (0, 1, 2, 3)), (9, 1, (4,)), (10, 5, (1, 3, 5, 7, 9)), (0, 8, ())],
)
def test_frames_are_the_middles_of_equal_parts(num_frames: int, wanted: int, chosen: tuple[int, ...]) -> None:
    assert choose_frames(num_frames, wanted) == chosen


@pytest.mark.parametrize("suffix", [".mkv", ""])
def test_clips_of_all_kinds_are_sampled_alike(suffix: str, tmp_path: Path) -> None:
    make = make_clip if suffix else make_frames  # a Matroska header has no count
    path = make(tmp_path / f"clip{suffix}", 12)

    assert frame_numbers(read_shown(path, False, 3, 10**6)) == [2, 6, 10]


def test_animations_and_images_are_read_and_large_frames_scaled_down(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 32), (40 * index,) * 3) for index in range(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)

    (frame,) = read_shown(make_image(tmp_path / "b.png", (200, 100)), True, 8, 5000)
    assert frame.shape == (50, 100, 3)
    assert [frame.shape for frame in read_shown(tmp_path / "a.gif", False, 2, 10**6)] == [(32, 64, 3)] * 2


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
        ("a\0cat \ud800", "acat"),
        ("\x1b[1;31ma red\x1b[0m cat\x9b2J", "a red cat"),
        ("\x1b]0;title\x07a \x1b]8;;http://host\x1b\\cat\x1b]8;;\x1b\\ walks\x1b", "a cat walks"),
        ("a\u2028cat\x85 \u202ewalks\u2069", "a cat walks"),
        ("2 < 3 and <b> stays", "2 < 3 and <b> stays"),
    ],
)
def test_an_answer_becomes_one_line(answer: str, caption: str) -> None:
    assert caption_in(answer, False) == caption


def test_words_are_put_in_as_the_keys_of_a_table_do_and_not_twice(tmp_path: Path) -> None:
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
