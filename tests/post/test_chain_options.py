"""Command lines of one tool and of several: what each option belongs to, and what is refused."""

from pathlib import Path

import pytest

from modules.errors import OptionError
from post.chain_options import read_asked, read_chain
from post.options import FacefixOptions, InterpolationOptions

BASE = ("--model", "x.pth", "--input", str(Path(__file__)))


def read(*words: str) -> object:
    return read_chain("upscaler", "", [*BASE, *words])


@pytest.mark.parametrize("word", ["--then=facefix", "--then facefix"])
def test_each_tool_has_its_own_options(word: str) -> None:
    words = f"--scale 4 --seed 1 {word} --model faces --only_center --then gimmvfi model=vfi factor=3 seed=2"

    chain = read_chain("upscaler", "", [*BASE, *words.split()])

    (_, first), (_, second), (_, third) = chain.tools
    assert isinstance(second, FacefixOptions)
    assert isinstance(third, InterpolationOptions)
    assert (first.network.seed, second.network.seed, third.network.seed) == ("1", None, "2")
    assert (second.network.model, second.only_center, third.factor) == (Path("faces"), True, 3)
    assert (chain.added, chain.needs_video) == ("SWINIR_GFPGAN_VFI", True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--then"], r"^--then: the name of a tool is missing\. Give upscaler"),
        (["--then", "facefx"], r"^--then facefx: facefx is no tool.*Did you mean facefix\?"),
        (["--then", "facefix", "--codec", "h264"], r"^--then facefix: --codec holds for the whole run"),
        (
            ["--then", "facefix", "model=x", "codec=h264"],
            r"--codec holds for the whole run\. Write it before",
        ),
        (["--then", "facefix", "model=x", "-y"], r"-y holds for the whole run"),
        (["--then", "facefix", "--model="], r"^--then facefix: --model is empty"),
    ],
)
def test_what_cannot_be_in_a_chain_is_refused_by_name(words: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read(*words)


def test_a_model_that_is_not_named_is_looked_for_among_the_downloads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match="--then facefix: no model is given.*\n.*--task gfpgan"):
        read("--then", "facefix")
    file = Path("models", "facefix", "GFPGANv1.4.pth")
    file.parent.mkdir(parents=True)
    file.touch()

    assert read("--then", "facefix").tools[1][1].network.model == file


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--the", "facefix"], "write --then in full"),
        (["--then", "facefix", "--modl", "x"], "--then facefix: error: Unknown option --modl"),
    ],
)
def test_mistakes_of_typing_name_the_tool(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        read(*words)

    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_the_help_of_a_later_tool_needs_nothing_of_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        read_chain("GIMMVFI", "", ["--then", "upscaler", "--help"])

    said = capsys.readouterr().out
    assert end.value.code == 0
    assert "--scale" in said
    assert "--factor" not in said
    assert "--codec" not in said


def test_metadata_tell_a_tool_and_its_settings_but_no_folder() -> None:
    texts = ("upscaler --model '/home/me/my model.pth' scale=2 --then gimmvfi model=vfi", "facefix model=y")

    said = read_asked(texts, "--post").in_words

    first, second, third = said.split(" --then ")
    assert first.startswith("upscaler 'model=my model.pth' dtype=fp32 ")
    assert "scale=2.0" in first
    assert second.startswith("GIMMVFI model=vfi ")
    assert third.startswith("facefix model=y ")
    assert "home" not in said
