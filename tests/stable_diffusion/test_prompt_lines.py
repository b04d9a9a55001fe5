"""Options in prompt lines of gen_img.py."""

import logging
from random import Random
from typing import Any

import pytest

from modules.errors import OptionError
from stable_diffusion.lines import LINE_OPTIONS, MOST_VARIANTS, enumerates, expand, read_line, split_seeds

READ: dict[str, dict[str, Any]] = {
    "a cat": {},
    "a cat --n ugly, bad --w 512 --h 768": {"negative_prompt": "ugly, bad", "W": 512, "H": 768},
    "a cat --W 512 --S 30": {"W": 512, "steps": 30},
    "a cat --s 30": {"steps": 30},
    "a cat --d 1,2, 3 --l 7.5 --nl -1 --t 0.5": {
        "seeds": (1, 2, 3),
        "scale": 7.5,
        "negative_scale": -1.0,
        "strength": 0.5,
    },
    "a cat --nl none --am 1,0.5,-2": {"negative_scale": None, "network_mul": (1.0, 0.5, -2.0)},
    "a cat --c a clip text --f name": {"clip_prompt": "a clip text", "file_name": "name"},
    "a cat --ow 10 --oh 20 --nw 30 --nh 40 --ct 5 --cl 6": {
        "original_width": 10,
        "original_height": 20,
        "original_width_negative": 30,
        "original_height_negative": 40,
        "crop_top": 5,
        "crop_left": 6,
    },
    "a cat --dsd1 3 --dst1 600 --dsd2 none --dst2 400 --dsr 0.4": {
        "ds_depth_1": 3,
        "ds_timesteps_1": 600,
        "ds_depth_2": None,
        "ds_timesteps_2": 400,
        "ds_ratio": 0.4,
    },
    "a cat --glt 700 --glr 0.6 --gls 0.1 --gle 2 --glsn 0.9 --glus 3,0.5,0.5,1": {
        "gradual_latent_timesteps": 700,
        "gradual_latent_ratio": 0.6,
        "gradual_latent_ratio_step": 0.1,
        "gradual_latent_every_n_steps": 2,
        "gradual_latent_s_noise": 0.9,
        "gradual_latent_unsharp_params": "3,0.5,0.5,1",
    },
    "a cat --steps 7 --strength 0.3": {"steps": 7, "strength": 0.3},
}


@pytest.mark.parametrize("line", READ)
def test_lines_are_read(line: str) -> None:
    assert read_line(line) == {"prompt": "a cat", **READ[line]}


def test_every_letter_of_the_guide_is_there() -> None:
    guide = "n w h s d l nl t am c f ow oh nw nh ct cl dsd1 dst1 dsd2 dst2 dsr glt glr gls gle glsn glus"
    assert set(guide.split()) == set(LINE_OPTIONS)
    assert {letter for line in READ for letter in LINE_OPTIONS if f"--{letter} " in line} == set(LINE_OPTIONS)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a --w wide", "--w: 'wide' is not a whole number"),
        ("a --d 1,x", "--d: 'x' is not a whole number"),
        ("a --d 99999999999999999999999", "--d: a seed has at most 64 bits"),
        ("a --am 1,two", "--am: 'two' is not a number"),
        ("a --f ../b", "--f '../b': give a file's name"),
        ("a --f /tmp/b", "give a file's name"),
        ("a --f ..", "give a file's name"),
        ("a --f \x1b[31mred", "--f '\\x1b[31mred': give a file's name"),
        ("a --f a\tb", "give a file's name"),
        ("a --f left\u202egnp", "give a file's name"),
        ("a --f \x9b31m", "give a file's name"),
        ("a --f " + "字" * 100, "the name has 300 bytes"),
        ("a --f " + "n" * 300, "the name has 300 bytes"),
        ("a --glus 2,1,1", "--glus: "),
    ],
)
def test_what_cannot_be_read_is_named(line: str, words: str) -> None:
    with pytest.raises(OptionError) as caught:
        read_line(line)
    assert words in str(caught.value)


def test_an_unknown_option_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert read_line("a cat --zz 3 --s 4", "line 2") == {"prompt": "a cat", "steps": 4}
    assert "line 2 'a cat --zz 3 --s 4': the unknown option --zz 3 is ignored" in caplog.text


@pytest.mark.parametrize(
    ("line", "seeds"), [("a", None), ("a --d 5", (5,)), ("a {b --d 1|c} --D 7,8 --n x", (1,))]
)
def test_seeds_are_found_before_variants_are_chosen(line: str, seeds: tuple[int, ...] | None) -> None:
    if "{" in line:
        with pytest.raises(OptionError, match="not a whole number"):
            split_seeds(line)
    else:
        assert split_seeds(line) == seeds


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
