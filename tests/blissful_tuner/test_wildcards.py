"""Wildcards draw lines of files by the seed."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest

from blissful_tuner.options import PLAIN_PROMPTS, PromptOptions
from blissful_tuner.prompt_syntax import expand_texts
from modules.errors import OptionError
from tests.golden_cases import read_case

GOLDEN, _ = read_case("wildcards")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The recorded files in a folder `cards`."""
    for name, content in GOLDEN["files"].items():
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


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=range(len(GOLDEN["cases"])))
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
    [
        "/etc/x",
        "../x",
        "sub/../../x",
        "C:/x",
        "C:x",
        r"sub\tree",
        "a//b",
        "./color",
        "a\x07b",
        "x/",
        "~/..",
    ],
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
