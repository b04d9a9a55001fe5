"""Commands that pages show can be typed in any folder."""

import html
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlencode

import pytest

from browser.jobs.command_lines import format_cd, format_command
from modules.installation import EXTENSIONS, program_words
from tests.browser.serving import python_of, serve_runs
from tests.browser.test_new_page import describe, write_images
from tests.chromium import open_page, wait_until
from tests.commands import QUIET


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["reelsmith", "run", "/a b"], f"{python_of('reelsmith.py')} run '/a b'"),
        (["reelsmith", "download", "--to", "x"], f"{python_of('reelsmith.py')} download --to x"),
        (["python", "tools/compare.py", "x"], f"{python_of('tools/compare.py')} x"),
        (
            ["accelerate", "launch", "--num_processes", "2", "wan_train_network.py"],
            f"accelerate launch --num_processes 2 {shlex.join(program_words(Path('wan_train_network.py')))}",
        ),
        (["python", "/own/script.py"], "python /own/script.py"),
    ],
)
def test_a_command_has_the_path_of_its_script(words: list[str], line: str) -> None:
    assert format_command(words) == line
    assert format_command(words, Path("/my set")) == f"cd '/my set' && {line}"


def test_a_command_names_the_extensions_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXTENSIONS, "glow")
    front = f"{python_of('reelsmith.py')} --extensions glow"

    assert format_command(["reelsmith", "run", "/a b"]) == f"{front} run '/a b'"
    assert format_command(["python", "tools/compare.py", "x"]) == f"{front} compare x"


def test_a_folder_stands_before_a_command_of_relative_paths() -> None:
    assert format_cd(None) == ""
    assert format_cd(Path("/it's")) == "cd '/it'\"'\"'s' && "
    assert format_cd(Path("/it's"), in_powershell=True) == "cd '/it''s'; "
    assert format_cd(Path("set")) == f"cd {shlex.quote(str(Path.cwd() / 'set'))} && "


@pytest.mark.slow
def test_the_shown_commands_of_a_folder_run_in_a_terminal_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "roots" / "my set"
    write_images(folder, 2, captions=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with serve_runs(tmp_path / "roots") as served:
        describe(served, folder)
        page = served.ask(f"/new?{urlencode({'folder': str(folder)})}").text
    codes = re.findall(r"<code[^>]*>(.*?)</code>", re.sub("<!--.*?-->", "", page), re.DOTALL)
    checks = {html.unescape(code) for code in codes if code.endswith("--check")}
    [check] = {code for code in checks if "reelsmith.py" in code}

    words = f'python() {{ "{sys.executable}" "$@"; }}; {check}'
    process = subprocess.run(["bash", "-c", words], cwd=elsewhere, env=QUIET, capture_output=True, text=True)

    assert process.returncode == 0, process.stderr
    assert [*elsewhere.iterdir()] == []


def test_the_commands_that_write_and_try_captions_follow_what_is_typed(tmp_path: Path) -> None:
    folder = tmp_path / "roots" / "my set"
    write_images(folder, 2)
    with serve_runs(tmp_path / "roots") as served:
        describe(served, folder)
        with open_page(f"{served.url}/new?{urlencode({'folder': str(folder)})}") as page:
            page.get_by_role("button", name="Captions by a model").click()
            assert page.locator("#try_line").inner_text().endswith(" --try_on 3")
            page.get_by_label("Question").fill("What <b>is</b> it?")
            wait_until(page, "document.querySelector('#caption_line').textContent.includes('What')")
            line = page.locator("#caption_line").inner_text()
            assert line.startswith(f"cd '{folder}' && {python_of('tools/caption_dataset.py')} ")
            assert line.endswith("--prompt 'What <b>is</b> it?'")
            wait_until(page, "document.querySelector('#try_line').textContent.includes('What')")
            assert page.locator("#try_line").inner_text() == f"{line} --try_on 3"
            page.get_by_label("Written by").fill("http://localhost:1")
            wait_until(page, "document.querySelector('#caption_line').textContent.includes('a space')")
            assert page.problems == []
