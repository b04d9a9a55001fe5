"""One of several alternatives is taken of a prompt."""

import pytest

from blissful_tuner.prompt_syntax import choose_alternatives, unescape


def first(text: str) -> str:
    return unescape(choose_alternatives(text, lambda weights: 0))


def last(text: str) -> str:
    return unescape(choose_alternatives(text, lambda weights: len(weights) - 1))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a {red|blue} car", ("a red car", "a blue car")),
        ("a {red |} car", ("a red car", "a  car")),
        ("{a|{b|c}} {d|e}", ("a d", "c e")),
        ("{{a|b} {c|d}|e}", ("a c", "e")),
        ("{2::a|0.5:: b |c}", ("a", "c")),
        ("{one} {} | } { {x|y", ("{one} {} | } { {x|y",) * 2),  # plain text
        ("{ {a|b}", ("{ a", "{ b")),
        ("{in {a|b}}", ("{in a}", "{in b}")),
        (r"\{a|b\} {a\|b|c}", ("{a|b} a|b", "{a|b} c")),
        ("{1:a|x::b}", ("1:a", "x::b")),  # no weights
    ],
)
def test_what_is_chosen_from(text: str, expected: tuple[str, str]) -> None:
    assert (first(text), last(text)) == expected


def test_weights_are_handed_on_and_nothing_is_drawn_in_what_is_not_chosen() -> None:
    asked = []

    def choose(weights: list[float]) -> int:
        asked.append(weights)
        return 0

    choose_alternatives("{2::a|.5::{b|c}|d} {e|f}", choose)
    assert asked == [[2.0, 0.5, 1.0], [1.0, 1.0]]
