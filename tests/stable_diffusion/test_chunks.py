import pytest

from stable_diffusion.tokenizers import (
    cut_into_chunks,
    cut_text,
    parse_weights,
)


def tokenize(text: str) -> list[int]:
    """A token for each word: its length."""
    return [len(word) for word in text.split()]


def sizes(text: str) -> list[int]:
    return [len(chunk.ids) for chunk in cut_into_chunks(parse_weights(text), tokenize)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [0]),
        ("a " * 75, [75]),
        ("a " * 76, [75, 1]),
        ("a BREAK b", [1, 1]),
        ("BREAK b", [1]),
        ("a BREAK BREAK  BREAK b BREAK ", [1, 1]),
        ("a " * 75 + "BREAK b", [75, 1]),
        ("a " * 80 + "BREAK b", [75, 5, 1]),
    ],
)
def test_break_and_the_75th_token_end_a_chunk(text: str, expected: list[int]) -> None:
    assert sizes(text) == expected


@pytest.mark.parametrize(
    ("text", "most", "rest"),
    [
        ("a " * 75, 1, ""),
        ("a " * 73 + "b (c d:2) e", 1, "d e"),
        ("a " * 75 + "(b c:1.5) d", 1, "b c d"),
        ("a BREAK b c", 1, "b c"),
        ("a BREAK b BREAK c", 2, "c"),
    ],
)
def test_what_is_cut_is_named(text: str, most: int, rest: str) -> None:
    assert cut_text(parse_weights(text), tokenize, most) == rest
