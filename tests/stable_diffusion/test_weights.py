import random

import pytest

from stable_diffusion.tokenizers import MOST, Part, cut_into_chunks, cut_text, parse_weights

UP, DOWN = 1.1, 1 / 1.1


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("a cat, 8k: sharp", [("a cat, 8k: sharp", 1)]),
        ("a (red) car", [("a ", 1), ("red", UP), (" car", 1)]),
        ("[old]", [("old", DOWN)]),
        ("(x:1.3)", [("x", 1.3)]),
        ("(x: 0.5 )", [("x", 0.5)]),
        ("(x:.5) (y:-1.) (z:+2)", [("x", 0.5), (" ", 1), ("y", -1), (" ", 1), ("z", 2)]),
        ("((a))", [("a", UP * UP)]),
        ("[[a]]", [("a", DOWN * DOWN)]),
        ("[(a)] b", [("a b", 1)]),
        ("(a (b:2) [c]:3)", [("a ", 3), ("b", 6), (" ", 3), ("c", 3 * DOWN)]),
        ("((a:0) b)", [("a", 0), (" b", UP)]),
        (r"a \(b\) \[c\] \\", [("a (b) [c] \\", 1)]),
        (r"(a \) b:1.5)", [("a ) b", 1.5)]),
        (r"back\slash \{x\}", [(r"back\slash \{x\}", 1)]),
        ("(a (b", [("a ", UP), ("b", UP * UP)]),
        ("[a", [("a", DOWN)]),
        ("a) b] :1.3)", [("a) b] :1.3)", 1)]),
        ("(a:b)", [("a:b", UP)]),
        ("(a:1.2.3)", [("a:1.2.3", UP)]),
        ("[a:1.3]", [("a:1.3", DOWN)]),
        ("(a [b) c]", [("a ", UP), ("b", UP * DOWN), (" c", DOWN)]),
        ("() [] (:1.3)", [("  ", 1)]),
        (f"(a:{'9' * 400})", [("a", MOST)]),
    ],
)
def test_weights_are_read(text: str, parts: list[tuple[str, float]]) -> None:
    found = parse_weights(text)
    assert [part.text for part in found] == [text for text, _ in parts]
    assert [part.weight for part in found] == pytest.approx([weight for _, weight in parts])
    assert not any(part.begins_chunk for part in found)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a BREAK b", [Part("a "), Part(" b", begins_chunk=True)]),
        ("(a BREAK b:2)", [Part("a ", 2), Part(" b", 2, begins_chunk=True)]),
        ("BREAK a", [Part(" a", begins_chunk=True)]),
        ("a BREAK", [Part("a ")]),
        ("BREAKFAST break a_BREAK", [Part("BREAKFAST break a_BREAK")]),
    ],
)
def test_break_begins_a_chunk(text: str, parts: list[Part]) -> None:
    assert list(parse_weights(text)) == parts


def test_a_nested_weight_is_the_product_of_all_around_it() -> None:
    """Trees of brackets, written out and read again."""
    source = random.Random(3)

    def write(depth: int, weight: float) -> tuple[str, list[tuple[str, float]]]:
        text, expected = "", []
        for _ in range(source.randint(1, 4)):
            if depth == 0 or source.random() < 0.4:
                word = "".join(source.choices("abc de,:", k=source.randint(1, 5)))
                text, expected = text + word, [*expected, (word, weight)]
                continue
            number = round(source.uniform(0.2, 2), 2)
            start, end, factor = source.choice(
                [("(", ")", UP), ("[", "]", DOWN), ("(", f":{number})", number)]
            )
            inner, parts = write(depth - 1, weight * factor)
            if end == ")" and inner[-1] in ":.":
                inner, parts = inner + "z", [*parts, ("z", weight * factor)]
            text, expected = text + start + inner + end, expected + parts
        return text, expected

    for _ in range(300):
        text, expected = write(4, 1.0)
        found = [(letter, part.weight) for part in parse_weights(text) for letter in part.text]
        wanted = [(letter, weight) for word, weight in expected for letter in word]
        assert [letter for letter, _ in found] == [letter for letter, _ in wanted], text
        assert [weight for _, weight in found] == pytest.approx([weight for _, weight in wanted]), text


def test_no_text_is_an_error_and_one_without_marks_is_itself() -> None:
    source = random.Random(4)
    for _ in range(3000):
        text = "".join(source.choices([*r"()[]:\1.9-+a é", "BREAK", " BREAK "], k=source.randint(0, 30)))
        for part in parse_weights(text):
            assert part.text
            assert abs(part.weight) <= MOST
        plain = "".join(source.choices(r":1.9-+a éß,;{}|$", k=source.randint(1, 30)))
        assert parse_weights(plain) == (Part(plain),)


def test_a_weight_has_an_end() -> None:
    assert parse_weights("(a" * 200)[-1].weight == MOST


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
