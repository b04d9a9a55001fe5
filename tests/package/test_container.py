"""The container, its compose file and the environment of conda: what they name is there, and they agree."""

import json
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from modules.environment import TORCH
from tests.commands import ROOT
from tests.package.test_uv import ADDRESSES
from tests.test_command_line import parser_of

DOCKERFILE = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
LINES = [line.split(maxsplit=1) for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]["reelsmith"]
START = ROOT / "tools" / "start_page.sh"


def of(instruction: str) -> list[str]:
    return [words for name, words in LINES if name == instruction]


def page_options() -> list[str]:
    """The options with which the container opens the page."""
    (line,) = re.findall(r"(?m)^exec (.*)$", START.read_text(encoding="utf-8"))
    words = shlex.split(line)
    assert words[:3] == ["python", "/opt/reelsmith/reelsmith.py", "browser"]
    return words[3:-1]


def test_the_image_copies_files_that_exist_and_installs_the_tested_torch() -> None:
    for words in of("COPY"):
        *sources, target = words.split()
        assert target == "/opt/reelsmith/"
        assert all((ROOT / source).exists() for source in sources)
    assert ADDRESSES["pytorch-cu130"] in DOCKERFILE
    assert f"--build-arg TORCH_INDEX={ADDRESSES['pytorch-cpu']}" in DOCKERFILE
    assert any(f"pip install --no-cache-dir {TORCH} " in words for words in of("RUN"))
    assert of("ENTRYPOINT") == ['["sh", "/opt/reelsmith/tools/start_page.sh"]']


def test_the_page_is_on_one_port_behind_its_word_and_nobody_is_root(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = parser_of("tools/run_browser.py", monkeypatch)
    known = {flag for action in parser._actions for flag in action.option_strings}
    folder, *words = page_options()
    assert known.issuperset(word for word in words if word.startswith("--"))
    assert words[-1] == "--no_open"
    values = dict(zip(words[:-1:2], words[1:-1:2], strict=True))
    assert values == {"--host": "0.0.0.0", "--port": "8765", "--token": "$token", "--models": "/models"}
    assert of("EXPOSE") == [values["--port"]]
    assert f"('127.0.0.1', {values['--port']})" in of("HEALTHCHECK")[0]
    assert [folder, values["--models"]] == json.loads(of("VOLUME")[0])
    assert of("USER") == ["1000:1000"]
    last_run = max(place for place, (name, _) in enumerate(LINES) if name == "RUN")
    assert last_run < [name for name, _ in LINES].index("USER")


def test_the_container_is_well_if_the_port_answers() -> None:
    (words,) = of("HEALTHCHECK")
    python, *arguments = json.loads(words.partition("CMD")[2])
    assert python == "python"
    with socket.create_server(("127.0.0.1", 0)) as page:
        port = page.getsockname()[1]
        asked = [word.replace("8765", str(port)) for word in arguments]
        assert subprocess.run([sys.executable, *asked]).returncode == 0
    assert subprocess.run([sys.executable, *asked], capture_output=True).returncode == 1


def test_compose_gives_what_the_image_asks_for() -> None:
    volumes = json.loads(of("VOLUME")[0])
    assert [mount.partition(":")[2] for mount in COMPOSE["volumes"]] == volumes
    assert COMPOSE["ports"] == ["127.0.0.1:8765:8765"]  # no other machine
    assert (ROOT / COMPOSE["build"]["context"] / "Dockerfile").is_file()
    assert COMPOSE["shm_size"] == "8gb"
    for mount in COMPOSE["volumes"]:  # what users put there is no part of the next image
        ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
        assert mount.partition(":")[0].removeprefix("./") in ignored


@pytest.mark.skipif(sys.platform == "win32", reason="a script of a Unix shell")
def test_the_word_is_made_once_and_nobody_else_can_read_it(tmp_path: Path) -> None:
    """The start of the container, in a folder in place of /data, with the page's options printed."""
    text = START.read_text(encoding="utf-8").replace("/data", str(tmp_path)).replace("exec python", "echo")
    words = []
    for _ in range(2):
        done = subprocess.run(["sh", "-c", text, "sh", "--work"], capture_output=True, text=True, check=True)
        words.append((tmp_path / "token.txt").read_text(encoding="utf-8"))
    assert len(words[0].strip()) > 16
    assert words[0] == words[1]
    assert (tmp_path / "token.txt").stat().st_mode & 0o077 == 0
    assert done.stdout.endswith(f"--token {tmp_path}/token.txt --models /models --no_open --work\n")


def test_conda_gets_a_supported_python_and_our_requirements() -> None:
    content = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *conda, pip = content["dependencies"]
    assert conda == ["python=3.12", "pip"]
    assert pip["pip"] == [TORCH, "-r requirements.txt"]
