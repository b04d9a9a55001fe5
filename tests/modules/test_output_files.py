"""Names that files are written under."""

import os
from pathlib import Path

import pytest

from modules.errors import OptionError
from modules.option_values import read_literals
from modules.output_files import check_output_file, check_output_name, refuse_replacing


@pytest.mark.parametrize(
    "name",
    [
        *("", " ", ".", "..", " . ", "...", "a/b", "/", "../x", "a\\b", "x" * 161, "\u00fc" * 81),
        *("a\nb", "a\tb", "\x1b[31mx", "x\u202ey", "x.safetensors", "x.Safetensors"),
    ],
)
def test_a_name_that_names_no_file_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match=r"^--output_name '.*': .*\. Give a name") as refused:
        check_output_name("--output_name", name)

    assert len(str(refused.value)) < 250
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("name", ["x", "it's \u00fc", ".hidden", "a.b", "v1.0", "con", "x" * 160, "\u732b"])
def test_other_names_are_taken(name: str) -> None:
    check_output_name("--output_name", name, is_windows=False)


@pytest.mark.parametrize("name", ["con", "NUL", "aux.old", "com1", "a:b", "what?", "a*"])
def test_what_windows_reserves_is_refused_there(name: str) -> None:
    with pytest.raises(OptionError, match="Windows takes no file of that name"):
        check_output_name("--output_name", name, is_windows=True)


@pytest.mark.parametrize("sign", ["x", "(", "-", "[", "9", "1+", "{1:"])
def test_an_argument_of_any_length_is_text_or_one_short_message(sign: str) -> None:
    with pytest.raises(OptionError, match="10,000 characters are the most") as refused:
        read_literals("--optimizer_args", ["a=" + sign * 100_000])
    assert len(str(refused.value)) < 250

    assert read_literals("--optimizer_args", ["a=" + (sign * 9_000)[:9_000]]).keys() == {"a"}


def test_a_file_is_not_replaced_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "x.safetensors"
    check_output_file("--output", file)
    assert not caplog.text
    file.touch()

    check_output_file("--output", file)

    assert f"--output {file} is there already: it will be replaced" in caplog.text


@pytest.mark.parametrize("kind", ["its name", "a relative path", "a link", "a hard link", "a linked folder"])
def test_a_file_that_is_read_is_not_replaced_by_any_way_to_it(kind: str, tmp_path: Path) -> None:
    original, other = tmp_path / "folder" / "x.safetensors", tmp_path / "other"
    original.parent.mkdir()
    original.touch()
    if kind == "a link":
        other.symlink_to(original)
    elif kind == "a hard link":
        os.link(original, other)
    elif kind == "a linked folder":
        other.symlink_to(original.parent, target_is_directory=True)
        other = other / original.name
    else:
        other = original if kind == "its name" else original.parent / ".." / "folder" / original.name

    with pytest.raises(OptionError, match="would be lost. Give a new name"):
        refuse_replacing("--output", other, [original])
