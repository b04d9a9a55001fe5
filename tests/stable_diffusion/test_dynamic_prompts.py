"""Variants in prompts, by table and by their properties."""

from random import Random

import pytest

from modules.errors import OptionError
from stable_diffusion.prompt_lines import MOST_VARIANTS, enumerates, expand

# prompt -> all texts that it may stand for
CHOICES = {
    "a cat": {"a cat"},
    "a {red|green} cat": {"a red cat", "a green cat"},
    "{only}": {"only"},
    "{a|}": {"a", ""},
    "{2$$a|b|c}": {"a, b", "a, c", "b, c"},
    "{1-2$$a|b}": {"a", "b", "a, b"},
    "{-1$$a|b}": {"", "a", "b"},
    "{2-$$a|b|c}": {"a, b", "a, c", "b, c", "a, b, c"},
    "{2$$ and $$a|b|c}": {"a and b", "a and c", "b and c"},
    "{2$$$$a|b}": {"ab"},
    "{9$$a|b}": {"a, b"},
    "{a|{b|{c|d}}}": {"a", "b", "c", "d"},
    "{2$$ and $$a|{b|c}}": {"a and b", "a and c"},
    r"\{a|b\} {c|d}": {"{a|b} c", "{a|b} d"},
    r"{\{a\}|b}": {"{a}", "b"},
    "{a|b": {"{a|b"},
    "a|b}": {"a|b}"},
    r"(a\:{b|c})": {r"(a\:b)", r"(a\:c)"},
}


@pytest.mark.parametrize("prompt", CHOICES)
def test_each_choice_comes_up_and_nothing_else(prompt: str) -> None:
    texts = [expand(prompt, Random(seed)) for seed in range(80)]

    assert all(len(found) == 1 for found in texts)
    assert {found[0] for found in texts} == CHOICES[prompt]
    assert not enumerates(prompt)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("{e$$a|b} cat", ["a cat", "b cat"]),
        ("{E$$a|b}", ["a", "b"]),
        ("{e$$a|b} {e$$c|d}", ["a c", "a d", "b c", "b d"]),
        ("{e$$2$$a|b|c}", ["a, b", "a, c", "b, c"]),
        ("{e$$1-2$$ + $$a|b}", ["a", "b", "a + b"]),
        ("{e$$a|{e$$b|c}}", ["a", "b", "c"]),
        ("{e$$a|a|b}", ["a", "b"]),
        (r"{e$$\{a\}|b}", ["{a}", "b"]),
    ],
)
def test_all_combinations_are_made_in_order(prompt: str, expected: list[str]) -> None:
    assert expand(prompt, Random(1)) == expected
    assert enumerates(prompt)


def test_the_same_seed_chooses_the_same_in_each_combination() -> None:
    for seed in range(20):
        red, blue = expand("{e$$red|blue} {cat|dog|cow} in {2$$ and $$a|b|c}", Random(seed))
        assert red.removeprefix("red") == blue.removeprefix("blue")
        assert expand("{e$$red|blue} {cat|dog|cow} in {2$$ and $$a|b|c}", Random(seed)) == [red, blue]


def test_more_combinations_than_any_run_makes_are_an_error() -> None:
    many = "{e$$" + "|".join(map(str, range(101))) + "}"
    with pytest.raises(OptionError, match=f"more than {MOST_VARIANTS:,} variants. Leave some out"):
        expand(many * 2, Random(0))
    with pytest.raises(OptionError, match="variants"):
        expand("{e$$1-40$$" + "a|" * 60 + "}", Random(0))
    assert expand("{" + "9" * 30 + "$$a|b}", Random(0))[0] in {"9" * 30 + "$$a", "b"}


@pytest.mark.parametrize("prompt", ["a", r"\{e$$a|b}", "{ee|b}", "e$$a", "{2$$e|f}"])
def test_a_prompt_without_the_letter_makes_one_picture_each(prompt: str) -> None:
    assert not enumerates(prompt)
