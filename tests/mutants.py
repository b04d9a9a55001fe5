"""Make small mistakes in a copy of the project, one at a time, and look which tests notice.

    python tests/mutants.py                 all of tests/mutants.toml: by the tests beside the code;
                                            those that are missed there, by the default tests
    python tests/mutants.py --beside        by the tests beside the code alone
    python tests/mutants.py --only merge    those with "merge" in their names

It prints a table, and ends with 1 if the default tests missed one, or the tests beside the code more than 4.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests" / "mutants.toml"
MAX_MISSED = 4  # by the tests beside the code
FAILED, BROKEN = 1, 2  # pytest: a test failed; a file of tests could not be read
FIRST_SECOND = 1_000_000_000  # of the times of files that are changed


@dataclass(frozen=True)
class Mutant:
    """A mistake: one place of a file, what is written there instead, and the tests beside it."""

    name: str
    file: str
    old: str
    new: str
    tests: list[str]

    def changed(self, root: Path) -> bytes:
        """Return the file with the mistake. Raises ValueError if its place is not in the file just once."""
        text = (root / self.file).read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} has {text.count(self.old)} times {self.old!r}")
        return text.replace(self.old, self.new).encode("utf-8")


def read_mutants() -> list[Mutant]:
    """Return all mutants of the list."""
    return [Mutant(**each) for each in tomllib.loads(LIST.read_text(encoding="utf-8"))["mutant"]]


def notices(root: Path, tests: list[str]) -> bool:
    """Return whether a test of a copy fails. tests: files and folders; none: the default tests."""
    spread = ["-n", "0"] if tests else ["-n", "2", "--dist", "worksteal"]
    command = [sys.executable, "-m", "pytest", "-x", "-q", *spread, *tests]
    own = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPYCACHEPREFIX": str(root.parent / "compiled"),
    }
    done = subprocess.run(command, cwd=root, env={**os.environ, **own}, capture_output=True, text=True)
    if done.returncode not in {0, FAILED, BROKEN}:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return done.returncode != 0


def write_at(path: Path, content: bytes, second: int) -> None:
    """Write a file with a time of its own: Python knows by size and second whether it has to compile anew."""
    path.write_bytes(content)
    os.utime(path, (second, second))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--beside", action="store_true", help="run the tests beside the code alone")
    parser.add_argument("--only", default="", help="mutants with this in their names")
    args = parser.parse_args()
    chosen = [each for each in read_mutants() if args.only in each.name]
    missed: dict[str, list[str]] = {"beside": [], "by default": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "project"
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache"))
        for number, mutant in enumerate(chosen):
            begin, path = time.monotonic(), root / mutant.file
            full = path.read_bytes()
            write_at(path, mutant.changed(root), FIRST_SECOND + 2 * number)
            answers = [notices(root, mutant.tests)]
            if not answers[0] and not args.beside:
                answers.append(notices(root, []))
            said = ""
            for where, noticed in zip(missed, answers, strict=False):
                said += f"{where}: {'caught' if noticed else 'MISSED'}  "
                missed[where] += [] if noticed else [mutant.name]
            print(f"{mutant.name:60} {said}{time.monotonic() - begin:.0f} s", flush=True)
            write_at(path, full, FIRST_SECOND + 2 * number + 1)
    for where, names in missed.items():
        print(f"{len(chosen)} mutants, missed {where}: {len(names)} {names}")
    raise SystemExit(bool(missed["by default"]) or len(missed["beside"]) > MAX_MISSED)


if __name__ == "__main__":
    main()
