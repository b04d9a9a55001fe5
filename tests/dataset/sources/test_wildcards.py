"""Choices in captions."""

import random

import pytest

from dataset.sources.wildcards import fill_wildcards


@pytest.mark.parametrize(
    ("text", "outcomes"),
    [
        ("a {b} c", {"a b c"}),
        ("{a|b} {c|d}", {"a c", "a d", "b c", "b d"}),
        ("{ohwx, {red|blue} coat|ohwx}, hat", {"ohwx, red coat, hat", "ohwx, blue coat, hat", "ohwx, hat"}),
        ("{{a|b} c|d}", {"a c", "b c", "d"}),
        ("{a|b {c|d}}", {"a", "b c", "b d"}),
        ("{a|{b|{c|d}}}", {"a", "b", "c", "d"}),
        ("{{a|b}}", {"{a|b}"}),
        ("{{a {b|c} d}}", {"{a b d}", "{a c d}"}),
        ("{a|{{b|c}}}", {"a", "{b|c}"}),
        ("{{{a|b}}}", {"{a}", "{b}"}),
        ("{{ a", {"{ a"}),
        ("a|b", {"a|b"}),
        ("", {""}),
    ],
)
def test_choices_are_drawn_from_the_inside_out(text: str, outcomes: set[str]) -> None:
    drawn = [fill_wildcards(text, random.Random(seed)) for seed in range(60)]

    assert {filled.text for filled in drawn} == outcomes
    assert not any(filled.has_lone_brace for filled in drawn)


@pytest.mark.parametrize("text", ["a { b", "a } b", "{a|b", "a|b}", "{{a|b} c", "{a|b}} c"])
def test_a_brace_without_its_partner_is_noticed(text: str) -> None:
    assert fill_wildcards(text, random.Random(0)).has_lone_brace


def test_the_time_of_deep_nests_is_bounded() -> None:
    text = "{a" * 100_000 + "}b" * 100_000

    assert fill_wildcards(text, random.Random(0)).has_lone_brace
