"""Every command that a guide prints is taken as it stands, or refused with a reason; nothing is computed."""

import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest

import protocols.families
import stable_diffusion.run  # noqa: F401
from tests.commands import ROOT
from tests.faults.messages import assert_one_message, run_here

FILE = ROOT / "tests" / "data" / "printed_commands.txt"
LINES = [line for line in FILE.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
OUTPUTS = re.compile(r"(\./)?(out|results)")  # what commands write begins so
CONTENTS = {".toml": '[[datasets]]\nvideo_directory = "clips"\nresolution = [64, 64]\n'}


class WasReadError(BaseException):
    """All options were taken, and work would begin."""


@contextmanager
def imported_anew(name: str) -> Iterator[None]:
    """Let a script that another one imports take the functions that are patched here, and nobody after it."""
    imported = sys.modules.pop(name, None)
    try:
        yield
    finally:
        sys.modules.pop(name, None)
        if imported:
            sys.modules[name] = imported


@contextmanager
def ending_where_work_begins() -> Iterator[None]:
    """Of a family's script, of gen_img.py, and of scripts about LoRA files."""
    own = protocols.families.import_own

    def import_own(name: str) -> object:
        if name.startswith("networks.") and name != "networks.names":
            raise WasReadError
        return own(name)

    with ExitStack() as stack:
        for place in (
            "protocols.families.FamilyEntry.make_family",
            "networks.convert.convert",
            "networks.convert.convert_flux",
            "stable_diffusion.run.generate",
        ):
            stack.enter_context(patch(place, side_effect=WasReadError))
        stack.enter_context(imported_anew("networks.convert_flux_lora"))
        stack.enter_context(patch("protocols.families.import_own", import_own))
        yield


def lay_out(folder: Path, words: list[str]) -> None:
    """Empty files under the names of all that a command reads."""
    for word in words:
        name = word.partition("=")[2] if word.startswith("--") else word
        path = folder / name.partition(";")[0].removeprefix("weights=")
        if re.search(r"^[\w./-]+\.[a-z]{2,11}[0-9]?$", path.name) and not OUTPUTS.match(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(CONTENTS.get(path.suffix, "a cat\n"), encoding="utf-8")


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.partition(" --")[0])
def test_what_a_guide_prints_is_taken_or_refused_with_a_reason(line: str, tmp_path: Path) -> None:
    command, _, rejection = line.partition(" => ")
    words = shlex.split(command)
    start = next(place for place, word in enumerate(words) if word.endswith(".py"))
    lay_out(tmp_path, words[start + 1 :])

    with ending_where_work_begins():
        try:
            code, said = run_here(*words[start:], folder=tmp_path)
        except WasReadError:
            code, said = 0, "read"

    if rejection:
        assert_one_message(code, said, rejection)
    else:
        assert said == "read", said
