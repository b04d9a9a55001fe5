"""What the page New makes of the lines that `new` and `run --check` print."""

from pathlib import Path

import pytest

from browser.command_output import find_command, read_changes, read_output_lines
from browser.jobs import Job

NAMES = ["a.png", "aa.png", "b c.mp4", "bad.png"]


def job(folder: Path, text: str) -> Job:
    log = folder / "x.log"
    log.write_text(text, encoding="utf-8")
    return Job(0, "reelsmith new x", str(folder), log)


@pytest.mark.parametrize(
    ("line", "names", "remedy", "left_out"),
    [
        (
            "left out: /x/bad.png is no image that can be read, or it is damaged",
            ("bad.png",),
            "out",
            ("bad.png",),
        ),
        ("  bad.png", ("bad.png",), "out", ("bad.png",)),
        ("aa.png, b c.mp4: tiny, below 256 pixels", ("aa.png", "b c.mp4"), "", None),
        ("captions that are not UTF-8: a.txt: read as Windows-1252", (), "repair", None),
        ("a.png = aa.png: equal copies, learned more often", ("a.png", "aa.png"), "out", ("aa.png",)),
        ("  python tools/caption_dataset.py --model 'x y'", (), "run", None),
        ("python tools/caption_dataset.py is not indented", (), "", None),
        ("x.heic: left out, this kind is not read; convert them to PNG", (), "", None),
    ],
)
def test_lines_have_files_and_remedies(
    line: str, names: tuple[str, ...], remedy: str, left_out: tuple[str, ...] | None, tmp_path: Path
) -> None:
    [message] = read_output_lines(job(tmp_path, f"{line}\n"), NAMES)

    assert (message.text, message.names, message.remedy) == (line.strip(), names, remedy)
    if left_out is not None:
        assert message.left_out == left_out


def test_only_a_printed_command_can_be_run(tmp_path: Path) -> None:
    text = "x\n  python tools/a.py 'b c'\n  reelsmith new x --trigger_word WORD --overwrite\n"
    lines = read_output_lines(job(tmp_path, text))
    assert find_command(lines, "python tools/a.py 'b c'") == ["python", "tools/a.py", "b c"]
    assert find_command(lines, "python tools/a.py") is None
    assert find_command(lines, "x") is None
    assert [line.needs_word for line in lines] == [False, False, True]
    assert find_command(lines, lines[2].text) is None


def test_changes_are_told_from_what_is_said(tmp_path: Path) -> None:
    log = job(tmp_path, "a line\n--- run.toml\n+++ run.toml as it would be\n@@ -1 +1 @@\n-a\n+b\n")
    assert [line.text for line in read_output_lines(log)] == ["a line"]
    assert read_changes(log)[0] == "--- run.toml"
    assert read_changes(log)[-2:] == ["-a", "+b"]
    assert read_changes(None) == []
    assert read_output_lines(None) == []
