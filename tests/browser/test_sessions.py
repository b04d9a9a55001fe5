"""A process that the page Generate drives does no more than the page asks for, whatever a file says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from browser.jobs.sessions import find_session, limit_session
from modules.errors import OptionError
from modules.installation import DRIVEN, ROOT, program_environment, program_words
from modules.run_limits import FOLDERS_VARIABLE

POCKET = ROOT / "pocket"
MODEL = [f"--{name}={POCKET / name}.safetensors" for name in ("dit", "vae", "t5")]
GENERATE = ["python", "wan_generate_video.py", "--task", "t2v-1.3B"]


def test_the_command_that_the_page_writes_is_started(tmp_path: Path) -> None:
    words = [*GENERATE, "--interactive", "--save_path", "generated"]

    command, program = find_session(words, tmp_path)

    assert command.script == "wan_generate_video"
    assert program == [sys.executable, *program_words(Path("wan_generate_video.py")), *words[2:]]


OTHERS = (
    [],
    ["rm", "-r", "/", "--interactive"],
    ["sh", "-c", "id", "--interactive"],
    [sys.executable, "-c", "import os", "--interactive"],
    ["python", "-c", "import os", "--interactive"],
    ["python", "evil.py", "--interactive"],
    ["python", "../evil.py", "--interactive"],
    ["python", "tools/compare.py", "--interactive"],
    ["python", "run_project.py", ".", "--interactive"],
    ["python", "wan_train_network.py", "--network_module", "evil", "--interactive"],
    ["python", "gen_img.py", "--from_module", "evil.py", "--interactive"],
    ["reelsmith", "run", ".", "--interactive"],
    ["reelsmith", "generate", "wan", "--interactive"],
    ["accelerate", "launch", "--config_file", "x", "wan_generate_video.py", "--interactive"],
    ["python", "wan_generate_video.py", "--prompt", "no requests are read"],
    ["python", "wan_generate_video.py", "--interactive", 3],
    [["python"], {"a": 1}],
)


@pytest.mark.parametrize("words", OTHERS, ids=[" ".join(map(str, words))[:30] for words in OTHERS])
def test_any_other_command_of_a_file_is_refused(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('started')", encoding="utf-8")

    with pytest.raises(OptionError):
        find_session(words, tmp_path)


@pytest.mark.parametrize("place", ["../out", "/tmp", "~", "link", "link/inner", "a\0b", "", "."])
def test_results_stay_below_the_folder_that_is_shown(place: str, tmp_path: Path) -> None:
    top = tmp_path / "root"
    top.mkdir()
    (tmp_path / "out").mkdir()
    if sys.platform != "win32":
        (top / "link").symlink_to(tmp_path / "out")
    path = top / place if place in ("../out", "link", "link/inner") else Path(place)

    with pytest.raises(OptionError, match="lies outside of"):
        limit_session(path, top / "queue", top)


@pytest.mark.parametrize("place", ["reelsmith-queue", "Reelsmith-Queue/logs", "a/../reelsmith-queue/x"])
def test_no_results_go_among_the_files_of_the_queue(place: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no results go into the queue's folder"):
        limit_session(tmp_path / place, tmp_path / "reelsmith-queue" / "making", tmp_path)


def test_a_session_may_write_its_results_and_previews(tmp_path: Path) -> None:
    variables = limit_session(tmp_path / "generated", tmp_path / "queue" / "making", tmp_path)

    assert json.loads(variables[FOLDERS_VARIABLE]) == [
        str(tmp_path / "generated"),
        str(tmp_path / "queue" / "making"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--save_merged_model", "--save_mer"])
def test_no_option_writes_elsewhere(option: str, tmp_path: Path) -> None:
    """Shortened names of options count too: the script itself refuses the value."""
    target = tmp_path / "elsewhere.safetensors"
    top = tmp_path / "root"
    top.mkdir()
    words = [*GENERATE, *MODEL, option, str(target), "--interactive", "--save_path", str(top / "generated")]
    _, program = find_session(words, top)
    limits = limit_session(top / "generated", top / "queue", top)

    done = subprocess.run(
        program,
        cwd=top,
        env=program_environment(**limits, **{DRIVEN: "1"}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
    )

    assert done.returncode != 0
    assert "is outside of" in done.stderr or "ambiguous" in done.stderr or "not an option" in done.stderr
    assert not target.exists()


@pytest.mark.slow
def test_a_limited_session_makes_a_clip(tmp_path: Path) -> None:
    words = [*GENERATE, *MODEL, "--sample_solver", "vanilla", "--interactive"]
    words += ["--save_path", str(tmp_path / "generated")]
    _, program = find_session(words, tmp_path)
    limits = limit_session(tmp_path / "generated", tmp_path / "queue", tmp_path)
    options = {"w": "32", "h": "32", "f": "5", "s": "1", "d": "1"}

    done = subprocess.run(
        program,
        cwd=tmp_path,
        env=program_environment(**limits, **{DRIVEN: "1"}),
        input=json.dumps({"prompt": "a red circle", "options": options}) + "\n",
        capture_output=True,
        encoding="utf-8",
    )

    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [event["event"] for event in events][-2:] == ["made", "ready"], done.stderr
    assert Path(events[-2]["file"]).parent == tmp_path / "generated"
