"""Weights, alternatives and wildcards in a prompt are read from its text."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest

from blissful_tuner.options import PLAIN_PROMPTS, PromptOptions
from blissful_tuner.prompt_syntax import choose_alternatives, expand_texts, parse_weights, unescape
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


CARDS, _ = read_case("wildcards")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The recorded files in a folder `cards`."""
    for name, content in CARDS["files"].items():
        write(tmp_path / "cards", name, content)
    return tmp_path / "cards"


def write(folder: Path, name: str, content: str) -> None:
    path = folder / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def options(folder: Path | None, alternatives: bool = False) -> PromptOptions:
    return replace(PLAIN_PROMPTS, prompt_wildcards=folder, prompt_alternatives=alternatives)


def expand(folder: Path | None, text: str, seed: int = 1, alternatives: bool = False) -> str:
    found = expand_texts({"prompt": text}, options(folder, alternatives), seed)["prompt"]
    assert found is not None
    return found


def possible(text: str) -> set[str]:
    """Every result that a text can have with the recorded files."""
    lines = {
        "color": ["red", "blue", "green"],
        "animal": ["cat", "dog", "tiny fox", "huge fox"],
        "size": ["tiny", "huge"],
        "sub/tree": ["oak", "pine"],
        "badw": ["x:heavy"],  # no number, so it is text
    }
    parts = re.split(r"__(\S+?)__", text)
    choices = [[part] if index % 2 == 0 else lines[part] for index, part in enumerate(parts)]
    return {"".join(picked) for picked in itertools.product(*choices)}


@pytest.mark.parametrize("case", CARDS["cases"], ids=range(len(CARDS["cases"])))
def test_recorded_prompts_have_possible_results_or_are_refused(folder: Path, case: dict[str, object]) -> None:
    """Not the recorded ones: there one draw served all occurrences, and their order was not defined."""
    text, there = str(case["prompt"]), case["result"]
    if isinstance(there, dict) and text != "__badw__":
        with pytest.raises(OptionError, match="--prompt"):
            expand(folder, text)
    else:
        found = [expand(folder, text, seed) for seed in range(40)]
        assert set(found) <= possible(text)
        assert len(set(found)) == 1 or len(set(found)) > len(possible(text)) / 3
        assert len(possible(text)) == 1 or len(set(found)) > 1


def test_what_a_seed_draws_is_settled_for_good(folder: Path) -> None:
    """Prompts in files that were made stay what they are: a change here changes what a seed means."""
    assert expand(folder, "__color__ __animal__ __color__ __size__", 42) == "blue cat red tiny"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("16:9 screen", "16:9 screen"),
        ('"ratio 16:9"', "ratio 16:9"),
        ('"ratio 16:9":2', "ratio 16:9"),
        ("a: b : 3", "a: b"),
        ("(red:1.4):2", "(red:1.4)"),
        ('say "hi"', 'say "hi"'),
    ],
)
def test_a_weight_stands_behind_the_last_colon(folder: Path, line: str, text: str) -> None:
    write(folder, "one", f"# what follows\n\n  {line}  \n")
    assert expand(folder, "__one__") == text


def test_wildcards_and_alternatives_may_hold_one_another(folder: Path) -> None:
    write(folder, "pair", "{left|left} __one__")
    write(folder, "one", "hand")
    assert expand(folder, "{__pair__|__pair__}!", alternatives=True) == "left hand!"
    assert expand(folder, "__pair__") == "{left|left} hand"  # braces are text without the switch
    assert expand(None, "{__pair__|__pair__}", alternatives=True) == "__pair__"


@pytest.mark.parametrize(
    "key",
    ["/etc/x", "../x", "sub/../../x", "C:/x", "C:x", r"sub\tree", "a//b", "./color", "a\x07b", "x/", "~/.."],
)
def test_paths_out_of_the_folder_are_no_wildcards(folder: Path, key: str) -> None:
    (folder.parent / "x.txt").write_text("secret", encoding="utf-8")
    with pytest.raises(OptionError, match="does not name a file in --prompt_wildcards"):
        expand(folder, f"__{key}__")


def test_links_that_leave_the_folder_are_refused(folder: Path) -> None:
    (folder.parent / "x.txt").write_text("secret", encoding="utf-8")
    (folder / "link.txt").symlink_to(folder.parent / "x.txt")
    (folder / "out").symlink_to(folder.parent, target_is_directory=True)
    (folder / "inside.txt").symlink_to(folder / "size.txt")
    (folder / "circle.txt").symlink_to(folder / "circle.txt")
    for key in ("link", "out/x"):
        with pytest.raises(OptionError, match="is a link that leads out of"):
            expand(folder, f"__{key}__")
    with pytest.raises(OptionError, match="not there"):
        expand(folder, "__circle__")
    assert expand(folder, "__inside__") in {"tiny", "huge"}
    (folder.parent / "home").symlink_to(folder, target_is_directory=True)
    assert expand(folder.parent / "home", "__size__") in {"tiny", "huge"}  # the folder itself may be a link
