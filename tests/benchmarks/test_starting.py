"""Every benchmark starts as its page says: as a script, from any folder."""

import json
import re
import sys
from pathlib import Path

from tests.commands import ROOT, run_program

FOLDER = ROOT / "benchmarks"
STARTED = [
    path for path in sorted(FOLDER.glob("*.py")) if '__name__ == "__main__"' in path.read_text("utf-8")
]


def test_the_page_names_scripts_that_can_be_started() -> None:
    named = re.findall(r"^\| `(\w+\.py)`", (FOLDER / "README.md").read_text("utf-8"), re.MULTILINE)

    assert named
    assert {*named} <= {path.name for path in STARTED}


# each finds the project by itself: what those before it have found and imported of ours is forgotten
ASK = """
import contextlib, io, json, runpy, sys
root, *scripts = sys.argv[1:]
path = sys.path[1:]
said = {}
for script in scripts:
    sys.argv[:], sys.path[:] = [script, "--help"], [script.rpartition("/")[0], *path]
    for name, module in [*sys.modules.items()]:
        file = (getattr(module, "__file__", None) or "").replace(chr(92), "/")
        if file.startswith(root) and "/site-packages/" not in file:
            del sys.modules[name]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        said[script] = printed.getvalue() if end.code in {None, 0} else repr(end.code)
    except BaseException as error:
        said[script] = repr(error)
print(json.dumps(said))
"""


def test_every_benchmark_starts_from_another_folder(tmp_path: Path) -> None:
    # in a process of its own: in this one the project is found already; in one for all: libraries load once
    words = [path.as_posix() for path in (ROOT, *STARTED)]
    done = run_program(sys.executable, "-c", ASK, *words, folder=tmp_path, environment={"PYTHONPATH": ""})

    said = json.loads(done.stdout.splitlines()[-1])
    assert said.keys() == {*words[1:]}
    assert {script: text for script, text in said.items() if not text.startswith("usage: ")} == {}
