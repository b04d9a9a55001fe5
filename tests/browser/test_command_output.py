"""What the page New makes of the lines that `new` and `run --check` print."""

from pathlib import Path

import pytest

from browser.jobs.jobs import Job
from browser.pages.new.command_output import find_command, read_changes, read_output_lines
from data_tools.report.findings import repair_captions
from dataset.options import GUESS
from modules.pages.language import Language, speaking
from modules.pages.page import SHEET
from tests.chromium import open_page
from tests.data_tools.report.test_check import config_of

NAMES = ["a.png", "aa.png", "b c.mp4", "bad.png"]


def job(folder: Path, text: str) -> Job:
    log = folder / "x.log"
    log.write_text(text, encoding="utf-8")
    return Job(0, "reelsmith new x", str(folder), log)


@pytest.mark.parametrize(
    ("line", "names", "remedy", "files_to_leave_out"),
    [
        (
            "left out: /x/bad.png is not an image that can be read, or it is damaged",
            ("bad.png",),
            "out",
            ("bad.png",),
        ),
        ("  bad.png", ("bad.png",), "out", ("bad.png",)),
        ("aa.png, b c.mp4: tiny, below 256 pixels", ("aa.png", "b c.mp4"), "", None),
        ("captions that are not UTF-8: a.txt: read as Windows-1252", (), "repair", None),
        ("a.png = aa.png: equal copies, which are trained", ("a.png", "aa.png"), "out", ("aa.png",)),
        ("  python tools/caption_dataset.py --model 'x y'", (), "run", None),
        ("python tools/caption_dataset.py is not indented", (), "", None),
        ("x.heic: left out, this kind is not read; convert them to PNG", (), "", None),
    ],
)
def test_lines_have_files_and_remedies(
    line: str, names: tuple[str, ...], remedy: str, files_to_leave_out: tuple[str, ...] | None, tmp_path: Path
) -> None:
    [message] = read_output_lines(job(tmp_path, f"{line}\n"), NAMES)

    assert (message.text, message.names, message.remedy) == (line.strip(), names, remedy)
    if files_to_leave_out is not None:
        assert message.files_to_leave_out == files_to_leave_out


@pytest.mark.parametrize(
    ("line", "pieces"),
    [
        ("aa.png, b c.mp4: tiny", [("", 0), ("aa.png", 1), (", ", 0), ("b c.mp4", 1), (": tiny", 0)]),
        ("aa.png and a.png", [("", 0), ("aa.png", 1), (" and ", 0), ("a.png", 1), ("", 0)]),
        (
            "left out: /x/bad.png is bad.png",
            [("left out: /x/", 0), ("bad.png", 1), (" is bad.png", 0)],
        ),
        ("no file", [("no file", 0)]),
    ],
)
def test_each_file_of_a_line_is_linked_once_where_the_line_names_it(
    line: str, pieces: list[tuple[str, int]], tmp_path: Path
) -> None:
    [message] = read_output_lines(job(tmp_path, f"{line}\n"), NAMES)
    assert message.pieces == pieces
    assert "".join(piece.text for piece in message.pieces) == line


def test_each_caption_is_named_that_was_converted_or_could_not_be(tmp_path: Path) -> None:
    text = "ein Käse, eine Tür und schöne Grüße".encode("cp1252")
    config = config_of(tmp_path, {"a": text, "b": text, "c": b"\xff\xfe\x00\xd8"})
    (tmp_path / "b.txt.bak").touch()
    lines = repair_captions(config, GUESS)
    assert len(lines) == 4

    messages = read_output_lines(job(tmp_path, "\n".join(lines)), ["a.png", "b.png", "c.png"])

    assert [message.text for message in messages if message.is_about_repair] == [
        line.strip() for line in lines
    ]


def test_a_file_is_linked_in_a_translated_line_too(tmp_path: Path) -> None:
    line = "a.png, b c.mp4: tiny, below 256 pixels: the model would learn their blur"
    form = "%(names)s: tiny, below %(pixels)s pixels: the model would learn their blur"
    [message] = read_output_lines(job(tmp_path, f"{line}\n"), NAMES)
    with speaking(Language("zh", {form: "小图片%(names)s低于%(pixels)s像素"})):
        assert message.pieces == [
            ("小图片", False),
            ("a.png", True),
            (", ", False),
            ("b c.mp4", True),
            ("低于256像素", False),
        ]


def test_a_linked_file_stands_within_its_line(tmp_path: Path) -> None:
    files = [f'<a href="#captions" class="find">{name}</a>' for name in ("a.png", "b.png")]
    line = f"<li>tiny: {', '.join(files)}</li>"
    page_path = tmp_path / "page.html"
    page_path.write_text(f'<style>{SHEET}</style><ul class="lines said">{line}</ul>', encoding="utf-8")
    with open_page(page_path) as page:
        tops = page.evaluate(
            "[...document.querySelectorAll('a')].map((link) => link.getBoundingClientRect().top)"
        )
    assert tops[0] == tops[1]


def test_only_a_printed_command_can_be_run(tmp_path: Path) -> None:
    text = "x\n  python tools/a.py 'b c'\n  reelsmith new x --trigger_word WORD --overwrite\n"
    lines = read_output_lines(job(tmp_path, text))
    assert find_command(lines, "python tools/a.py 'b c'") == ["python", "tools/a.py", "b c"]
    assert find_command(lines, "python tools/a.py") is None
    assert find_command(lines, "x") is None
    assert [line.needs_trigger_word for line in lines] == [False, False, True]
    assert find_command(lines, lines[2].text) is None


def test_changes_are_told_from_what_is_said(tmp_path: Path) -> None:
    log = job(tmp_path, "a line\n--- run.toml\n+++ run.toml as it would be\n@@ -1 +1 @@\n-a\n+b\n")
    assert [line.text for line in read_output_lines(log)] == ["a line"]
    assert read_changes(log)[0] == "--- run.toml"
    assert read_changes(log)[-2:] == ["-a", "+b"]
    assert read_changes(None) == []
    assert read_output_lines(None) == []


@pytest.mark.parametrize(
    ("line", "text", "kind"),
    [
        (
            "/x/conditioning: left out, as a LoRA does not use control images. 2 of 2 images have one there. "
            "--train lllite trains a ControlNet-LLLite on such pairs (docs/control.md)",
            "/x/conditioning: left out, as a LoRA does not use control images. 2 of 2 images have one there",
            "lllite",
        ),
        (
            "/x: a ControlNet-LLLite learns from its pairs with conditioning. --train lora trains a LoRA "
            "without them",
            "/x: a ControlNet-LLLite learns from its pairs with conditioning",
            "lora",
        ),
    ],
)
def test_another_kind_of_run_is_a_button_and_no_option(
    line: str, text: str, kind: str, tmp_path: Path
) -> None:
    (shown,) = read_output_lines(job(tmp_path, line))
    assert (shown.text, shown.remedy, shown.other_kind) == (text, "train", kind)


@pytest.mark.parametrize(
    ("line", "tasks"),
    [
        (
            "x: left out. A folder of this name contains source images of edits, and it does not edit, "
            "--task edit-2511 does. To train on it, rename it",
            ("edit-2511",),
        ),
        (
            "Error: x has no sound, and LTX-2 learns sound. Use clips that have some, or take --task v, "
            "which is trained on pictures and movement only.",
            ("v",),
        ),
        (
            "--task t2v-14B: the network has 28 GB, and a card of 12 GiB holds a part of it. Smaller: "
            "--task t2v-1.3B (text to video), --task ti2v-5B (text, image to video)",
            ("t2v-1.3B", "ti2v-5B"),
        ),
        (
            "Z-Image turbo was distilled to few steps, and plain training unlearns them. Train on the base. "
            "--task turbo-adapter downloads an adapter and trains with it",
            ("turbo-adapter",),
        ),
        ("--task 1.5 is taken: text to image. Others: 2.1, xl", ()),
    ],
)
def test_another_version_is_a_button(line: str, tasks: tuple[str, ...], tmp_path: Path) -> None:
    [shown] = read_output_lines(job(tmp_path, f"{line}\n"))
    assert (shown.other_tasks, shown.remedy) == (tasks, "task" if tasks else "")
