"""The checklist of a folder on the page New: grades, remedies, and rows that go when they are mended."""

from pathlib import Path
from urllib.parse import quote, urlencode

import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

from browser.folders.folders import MediaFolder
from browser.jobs.jobs import Job
from browser.pages.new.checklist import BAD, GOOD, WARN, CheckRow, make_checklist
from browser.pages.new.command_output import REPAIR_CAPTIONS, OutputLine, read_output_lines
from modules.installation import TELLS_KINDS
from modules.line_kinds import CAPTIONS, FAULT, KINDS, MEND, NEXT, WARNING
from modules.pages.language import show
from project.files import write_project
from project.new_options import NewOptions
from tests.browser.serving import serve_runs
from tests.chromium import open_page
from tests.data_tools.report.making import save_image

NAMES = ["a.png", "b.png", "bad.png"]
ASKS = (
    "a.png: without a caption in a .txt file next to it, which `run` refuses. A model (Qwen/X, 4.4 GB to "
    "download) writes them, in the folder /x:"
)
COMMAND = "python tools/caption_dataset.py --model 'x y'"
PRINTED = f"""/x: 2 pictures. wan t2v-1.3B at 64x64, on a CPU (--memory 12: a card of 12 GiB)
fault> left out: /x/bad.png is not an image that can be read, or it is damaged
warning> a.png, b.png: tiny, below 256 pixels: the model would learn their blur
64x64: the size of a typical file, a.png (64x64). Every file keeps its own shape, at this area (resolution)
warning> captions that are not UTF-8: a.txt: read as Windows-1252
captions> {ASKS}
  {COMMAND}
red_hat: the model's own tags have spaces (red hat). To convert yours, run this in the folder /x:
  python tools/tag.py . --rename 'red_hat'
fault> 1 cannot be read and has no caption, which ends a run: delete each, or move it away:
  bad.png
mend> First fix the problems listed above. Then reelsmith run /x checks, caches and trains
"""


def content_of(uncaptioned: int = 0) -> MediaFolder:
    return MediaFolder(Path("x"), 3, 0, 0, uncaptioned, None, is_described=True, num_unreadable=1)


def lines_of(folder: Path) -> list[OutputLine]:
    log = folder / "x.log"
    log.write_text(PRINTED, encoding="utf-8")
    return read_output_lines(Job(0, "reelsmith new x", str(folder), log), NAMES)


def name_row(row: CheckRow) -> tuple[str, str]:
    return row.grade, show(row.text) if row.line is None else row.line.text[:20]


def test_the_worst_rows_come_first_and_no_fault_stands_twice(tmp_path: Path) -> None:
    listed = make_checklist(content_of(2), lines_of(tmp_path), unreadable=["bad.png"])

    assert [name_row(row) for row in listed.rows] == [
        (BAD, "1 file cannot be read: bad.png"),
        (WARN, "2 files have no caption"),
        (WARN, "a.png, b.png: tiny, "),
        (WARN, "captions that are no"),
        (WARN, "red_hat: the model's"),
        (GOOD, "3 images"),
    ]
    assert [row.asks_for_captions for row in listed.rows] == [False, True, False, False, False, False]
    assert [item.remedy for item in listed.rows[4].details] == ["run"]
    assert listed.rows[0].files_to_leave_out == ["bad.png"]


@pytest.mark.parametrize("text", ["a.png: tiny, below 256 pixels", "a.png: in words of next year"])
def test_the_kind_of_a_line_makes_it_a_row_and_its_wording_does_not(text: str) -> None:
    def grade(kind: str) -> list[str]:
        return [row.grade for row in make_checklist(None, [OutputLine(text, kind=kind)]).rows]

    assert grade(WARNING) == [WARN]
    assert grade("") == grade(CAPTIONS) == grade(NEXT) == grade(MEND) == []


def test_new_tells_the_kinds_of_its_lines_to_the_page_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for index in range(3):
        save_image(folder / f"p{index}.png", index, (32, 24), None)
    (folder / "alone.txt").write_text("of no file", encoding="utf-8")
    (folder / "bad.png").write_bytes(b"no image")
    options = NewOptions.from_defaults(
        folder=folder, family="wan", task="t2v-1.3B", memory=12, models=tmp_path, overwrite=True
    )
    printed = []
    for is_told in (False, True):
        if is_told:
            monkeypatch.setenv(TELLS_KINDS, "1")
        write_project(options)
        printed.append(capsys.readouterr().out)

    log = tmp_path / "x.log"
    log.write_text(printed[1], encoding="utf-8")
    lines = read_output_lines(
        Job(0, "reelsmith new", str(folder), log), [path.name for path in folder.iterdir()]
    )
    assert "> " not in printed[0].replace("-> ", "")
    assert {line.text for line in lines} <= {line.strip() for line in printed[0].splitlines()}
    kinds = {kind: [line.text for line in lines if line.kind == kind] for kind in KINDS}
    assert sorted(text.split(":")[0] for text in kinds[WARNING]) == ["alone.txt", "p0.png, p1.png, p2.png"]
    assert len(kinds[CAPTIONS]) == 2
    assert len(kinds[MEND]) == 1  # the broken file is to be mended first
    assert kinds[NEXT] == []
    assert all("bad.png" in text or "cannot be read" in text for text in kinds[FAULT])
    assert [row.grade for row in make_checklist(None, lines).rows] == [BAD, WARN, WARN]


def test_each_line_is_a_row_or_stands_behind_the_list(tmp_path: Path) -> None:
    lines = lines_of(tmp_path)
    listed = make_checklist(content_of(), lines, unreadable=["bad.png"])
    shown = [line.text for row in listed.rows if row.line for line in (row.line, *row.details)]

    assert sorted([*shown, *(line.text for line in listed.details)]) == sorted(line.text for line in lines)
    assert COMMAND in [line.text for line in listed.details]


@pytest.mark.parametrize(
    ("mended", "gone"),
    [
        ({REPAIR_CAPTIONS}, "captions that are no"),
        ({"python tools/tag.py . --rename 'red_hat'"}, "red_hat: the model's"),
    ],
)
def test_what_is_mended_is_no_row(mended: set[str], gone: str, tmp_path: Path) -> None:
    before = make_checklist(content_of(), lines_of(tmp_path), unreadable=["bad.png"])
    after = make_checklist(content_of(), lines_of(tmp_path), unreadable=["bad.png"], applied_remedies=mended)

    assert {name_row(row) for row in before.rows} - {name_row(row) for row in after.rows} == {(WARN, gone)}


@pytest.mark.parametrize(("name", "is_left"), [("bad ü.png", False), ("sub/bad ü.png", True)])
def test_a_fault_goes_with_the_file_that_it_lists(name: str, is_left: bool, tmp_path: Path) -> None:
    """Files of folders inside are not among the names, so nobody knows whether they are gone."""
    log = tmp_path / "x.log"
    log.write_text(f"fault> 1 cannot be read, which ends a run:\n  {name}\n", encoding="utf-8")
    lines = read_output_lines(Job(0, "reelsmith new x", str(tmp_path), log), ["a.png", "b.png"])

    assert [row.grade for row in make_checklist(None, lines).rows] == [BAD] * is_left


def test_a_broken_file_of_a_large_folder_is_a_fault_by_its_line(tmp_path: Path) -> None:
    listed = make_checklist(content_of(), lines_of(tmp_path))

    assert [name_row(row) for row in listed.rows if row.grade == BAD] == [(BAD, "left out: /x/bad.png")]


def test_the_word_stands_for_captions_and_a_folder_without_files_has_no_rows() -> None:
    (counts, captions) = make_checklist(content_of(1), [], trigger_word="ohwx").rows
    assert (captions.grade, show(captions.text)) == (GOOD, "1 file has no caption: ohwx stands for it")
    assert counts.grade == GOOD
    assert [show(row.text) for row in make_checklist(content_of(), []).rows][1] == "each has a caption"
    assert make_checklist(None, []).rows == []


def test_rows_go_when_the_folder_is_mended(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for index in range(2):
        save_image(folder / f"p{index}.png", index, (32, 24), None)
    (folder / "bad.png").write_bytes(b"no image")
    with (
        serve_runs(tmp_path) as served,
        open_page(f"{served.url}/new?{urlencode({'folder': str(folder)})}") as page,
    ):
        rows = page.locator(".checklist")
        rows.get_by_text("1 file cannot be read: bad.png").wait_for()
        rows.get_by_text("3 files have no caption").wait_for()
        rows.get_by_role("button", name="Leave it out").click()
        rows.get_by_text("2 files have no caption").wait_for()
        assert rows.locator(".bad").count() == 0
        rows.get_by_role("link", name="Type a trigger word").click()
        assert page.evaluate("document.activeElement.id") == "trigger"
        for index in range(2):
            (folder / f"p{index}.txt").write_text("a square", encoding="utf-8")
        page.get_by_text("each has a caption").wait_for()
        assert page.problems == []
        text = served.ask(f"/new/progress?folder={quote(str(folder))}").text
    assert text.count('<li class="good">') == 2
