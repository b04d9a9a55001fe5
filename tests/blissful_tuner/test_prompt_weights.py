"""Weights for parts of a prompt are read from its text."""

import pytest

from blissful_tuner.prompt_syntax import parse_weights
from modules.errors import OptionError
from tests.golden_cases import read_case

GOLDEN, _ = read_case("prompt_weights")
# that tool cut a prompt at "|", and took the first "(" of the text with the last ")" before a number
AS_THERE = {"a (red:1.5) car", "no weights", "(two words:1.2) (two words:1.4)", "cost (USD: 1.5)"}


def parts(text: str) -> tuple[str, list[tuple[str, float]]]:
    found, spans = parse_weights(text)
    return found, [(found[start:end], weight) for start, end, weight in spans]


@pytest.mark.parametrize(("text", "there"), [case for case in GOLDEN["cases"] if case[0] in AS_THERE])
def test_texts_and_weights_are_the_measured_ones(text: str, there: list[dict[str, object]]) -> None:
    found, weighted = parts(text)
    assert found == there[0]["prompt"]
    assert dict(weighted) == there[0]["weights"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(big dog:0.8) and (cat:1.25) | b", ("big dog and cat | b", [("big dog", 0.8), ("cat", 1.25)])),
        ("(two:1.2) (two:1.4)", ("two two", [("two", 1.2), ("two", 1.4)])),  # each its own
        ("a (red) car", ("a red car", [("red", 1.1)])),
        ("(up:+1.5)(down:-0.5)(none:0)", ("updownnone", [("up", 1.5), ("down", -0.5), ("none", 0.0)])),
        ("(c:1.) (d:.5)", ("c d", [("d", 0.5)])),  # 1 is no weight
        ("[red] car", ("[red] car", [])),
        ("(a:b) (c:1.5x) (d: 2) (:2) () ( )", ("(a:b) (c:1.5x) (d: 2) (:2) () ( )", [])),
        ("((inner:1.2):1.5)", ("(inner:1.5)", [("inner", 1.2)])),
        ("((both))", ("(both)", [("both", 1.1)])),
        ("open ( and ) close) (", ("open  and  close) (", [("and", 1.1)])),
        (r"\(plain\) (a \(b\):2)", ("(plain) a (b)", [("a (b)", 2.0)])),
        ("(ratio 4:3:1.2)", ("ratio 4:3", [("ratio 4:3", 1.2)])),
        ("(two\nlines:2)", ("two\nlines", [("two\nlines", 2.0)])),
        ("a ( red :2) car", ("a  red  car", [("red", 2.0)])),
        ("(猫:1.3)が歩く", ("猫が歩く", [("猫", 1.3)])),
        ("", ("", [])),
    ],
)
def test_what_has_a_weight(text: str, expected: tuple[str, list[tuple[str, float]]]) -> None:
    assert parts(text) == expected


@pytest.mark.parametrize("weight", ["101", "-5000", "9" * 400])
def test_a_weight_beyond_all_sense_is_refused(weight: str) -> None:
    with pytest.raises(OptionError, match=r"--prompt_weighting: .* more than 100"):
        parse_weights(f"a (red:{weight}) car")
