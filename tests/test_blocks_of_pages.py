"""Each block of each page is read by what reads it for a user: data sets, prompts, lists, code, commands.

tests/test_walked_pages.py gives the commands to their scripts. What nothing reads is in
tests/data/page_blocks.toml, with its reason.
"""

import ast
import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dataset.config import load_dataset_config
from generation.prompt_lines import SECTIONED_GENERATION_OPTIONS, parse_generation_line
from generation.sample_lines import find_sample_option, parse_sample_line
from ltx_2.options import apply_conditioning_config
from tests.commands import ROOT
from tests.ltx_2.test_options import read_own
from tests.pages import FENCE, LISTED, PROGRAM, SHOWN, lines_of
from tests.test_docs import EXEMPT, PAGES
from training.features.leco_file import read_pairs
from training.features.slider_file import read_sliders

OPTION = re.compile(r" --(\w+)")  # in a line of a prompt


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int  # of the fence, from 1
    kind: str
    lines: tuple[str, ...]

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"

    @property
    def name(self) -> str:
        """Return the name of the file that the block is; empty if it says none."""
        shown = SHOWN.match(self.lines[0])
        return shown[1] if shown else ""


def blocks_of(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page."""
    kind, start, lines = None, 0, list[str]()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = FENCE.match(line)
        if fence is None:
            lines.append(line)
        elif kind is None:
            kind, start, lines = fence[1], number, []
        else:
            yield Block(page, start, kind, tuple(lines))
            kind = None


def is_exempt(block: Block) -> bool:
    """Return whether the data file names a block."""
    first = block.lines[0].strip()
    return any(row["page"] == block.page.stem and row["first"] == first for row in EXEMPT["block"])


def is_ours(line: str) -> bool:
    """Return whether a line starts a program of ours, or one that the data file names."""
    return bool(PROGRAM.match(line)) or any(line.startswith(row["begins"]) for row in EXEMPT["line"])


def read_block(block: Block, folder: Path) -> str:
    """Read a block with our readers. Returns what is wrong; their errors are raised."""
    text = "\n".join([*block.lines, ""])
    match block.kind:
        case "bash" | "sh":
            wrong = [line for line in lines_of(block.lines) if not is_ours(line)]
            return f"no program of ours: {wrong[0]}" if wrong else ""
        case "toml":
            return read_toml(text, folder)
        case "json":
            json.loads(text.strip().rstrip(","))
        case "jsonl":
            records = [json.loads(line) for line in block.lines]
            return "" if all("caption" in record for record in records) else "a line without a caption"
        case "python":
            ast.parse(text)
        case "text" if block.name:
            for line in block.lines[1:]:
                read_line(line)
        case "text":
            return read_text(block)
        case _:
            return "its language is not named behind the fence"
    return ""


def read_toml(text: str, folder: Path) -> str:
    """Read a file of a data set, with the least that one needs, of sliders or of LECO's prompts."""
    content = tomllib.loads(text)
    path = folder / "block.toml"
    if "sliders" in content:
        path.write_text(text, encoding="utf-8")
        read_sliders(path)
        return ""
    if "prompts" in content:
        path.write_text(text, encoding="utf-8")
        read_pairs(path)
        return ""
    if content.keys() & {"video", "audio"}:  # conditions of LTX-2
        path.write_text(text, encoding="utf-8")
        words = "--ltx2_mode", "av", "--ltx2_conditioning_config", str(path)
        apply_conditioning_config(read_own("ltx2_train_network", *words))
        return ""
    if "datasets" not in content:
        return "neither a data set nor sliders"
    path.write_text(text, encoding="utf-8")
    load_dataset_config(path)
    return ""


def read_text(block: Block) -> str:
    """Read lines of prompts, or a list of files with what each is."""
    if all(LISTED.match(line) for line in block.lines):
        return ""
    if not any(OPTION.search(line) for line in block.lines):
        return "neither a list of files nor lines of prompts"
    for line in block.lines:
        read_line(line)
    return ""


def read_line(line: str) -> None:
    """Read a line of a file of prompts: of a training, or of the script with the most options."""
    if all(find_sample_option(word) is not None for word in OPTION.findall(line)):
        parse_sample_line(line)
    else:
        parse_generation_line(line, SECTIONED_GENERATION_OPTIONS)


ALL = [block for page in PAGES for block in blocks_of(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_of_a_page_is_read_by_what_reads_it_for_a_user(
    page: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = []
    for block in blocks_of(page):
        if not is_exempt(block):
            error = read_block(block, tmp_path)
            wrong += [f"{block.place}: {error}"] if error else []

    assert not wrong, "\n".join(wrong)
    assert [record.getMessage() for record in caplog.records] == []


def test_the_list_of_blocks_that_nothing_reads_has_no_row_without_a_block() -> None:
    rows = {(row["page"], row["first"]) for row in EXEMPT["block"]}

    assert rows == {(block.page.stem, block.lines[0].strip()) for block in ALL if is_exempt(block)}
    lines = [line for block in ALL if block.kind in ("bash", "sh") for line in lines_of(block.lines)]
    for row in EXEMPT["line"]:
        assert any(line.startswith(row["begins"]) for line in lines), row
    for row in EXEMPT["not_run"]:
        assert any(row["command"] in line for line in lines), row
    assert all(row["reason"] for rows in EXEMPT.values() for row in rows)


@pytest.mark.parametrize(
    ("kind", "lines", "problem"),
    [
        ("", ["python x.py"], "its language is not named behind the fence"),
        ("bash", ["rm -r output"], "no program of ours: rm -r output"),
        ("text", ["something else"], "neither a list of files nor lines of prompts"),
        ("toml", ["[training]"], "neither a data set nor sliders"),
        ("jsonl", ['{"image_path": "a.png"}'], "a line without a caption"),
    ],
)
def test_a_block_that_nothing_reads_is_found(
    kind: str, lines: list[str], problem: str, tmp_path: Path
) -> None:
    assert read_block(Block(ROOT / "README.md", 1, kind, tuple(lines)), tmp_path) == problem
