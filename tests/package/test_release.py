"""The hosted workflows: what linters say of them, and each step of a release run here, without an account."""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from modules.errors import UserError
from modules.version import VERSION
from package import release
from package.staging import lay_out_sources
from tests.commands import ROOT, assert_user_error, run_python

FOLDER = ROOT / ".github" / "workflows"
FILES = sorted(FOLDER.glob("*.yml"))
LINTERS = {"zizmor": ["--offline"], "check-jsonschema": ["--builtin-schema", "vendor.github-workflows"]}
TAG = f"v{VERSION}"
BUILD = "from package import backend; backend.build_sdist('dist'); backend.build_wheel('dist')"
PAGES = "https://example.org/owner/name/blob/v0.1.0"
# a program that publishes; it knows of no release yet
FAKE = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
test "$1 $2" != "release view"
"""
CHANGES = f"""# Changelog
## {VERSION} (2026-12-24)
- new: [page](docs/a.md#b), [site](https://example.org/x), [here](#c)
### more
- two
## {VERSION}9
- another
"""


def jobs_of(path: Path) -> dict[str, Any]:
    """The jobs of a workflow by name."""
    return dict(yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"])


def steps_of(path: Path, job: str) -> list[dict[str, Any]]:
    """The steps of one job."""
    return list(jobs_of(path)[job]["steps"])


def shell_steps() -> list[str]:
    """The shell text of all steps of all workflows."""
    steps = [step for path in FILES for job in jobs_of(path).values() for step in job["steps"]]
    return [step["run"] for step in steps if "run" in step]


@pytest.mark.parametrize("linter", LINTERS)
def test_linters_find_nothing_in_the_workflows(linter: str) -> None:
    program = shutil.which(linter, path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip(f"{linter} is not installed: python run_tests.py installs it")
    done = subprocess.run([program, *LINTERS[linter], *map(str, FILES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_script_and_module_of_a_step_exists() -> None:
    """Those of the image are below /opt/reelsmith, where the Dockerfile copies the checkout."""
    named = set()
    for text in shell_steps():
        named |= {word.removeprefix("/opt/reelsmith/") for word in re.findall(r"[\w/.]+\.py\b", text)}
        named |= {f"{word.replace('.', '/')}.py" for word in re.findall(r"-m (package[\w.]+)", text)}
    assert named == {"run_tests.py", "quickstart.py", "package/release.py", "reelsmith.py"}
    assert all((ROOT / name).is_file() for name in named)


def test_tests_run_on_three_systems_with_the_oldest_and_the_newest_python() -> None:
    (job,) = jobs_of(FOLDER / "tests.yml").values()
    matrix = job["strategy"]["matrix"]
    assert [system.partition("-")[0] for system in matrix["system"]] == ["ubuntu", "windows", "macos"]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    oldest, newest = matrix["python"]
    assert f'requires-python = ">={oldest},<3.{int(newest.removeprefix("3.")) + 1}"' in project


def test_only_the_job_that_publishes_may_write_and_no_secret_is_stored() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert "secrets." not in text
        assert yaml.safe_load(text)["permissions"] == {}
        for name, job in jobs_of(path).items():
            assert (job["permissions"] == {"contents": "read"}) == (name != "publish")
        # a tag can be moved to other code, a commit cannot
        assert all(re.search(r"@[0-9a-f]{40} # v\d", line) for line in text.splitlines() if "uses:" in line)


def test_the_tag_is_that_of_the_version() -> None:
    release.check_tag(TAG)
    done = run_python("-m", "package.release", "check-tag", "v9.9", folder=ROOT, check=False)
    assert_user_error(done, "The tag v9.9 is not", "pyproject.toml")


def test_notes_are_the_section_of_the_version_with_links_that_work_elsewhere() -> None:
    notes = release.cut_notes(TAG, CHANGES, PAGES)
    assert notes == (
        f"- new: [page]({PAGES}/docs/a.md#b), [site](https://example.org/x), [here](#c)\n### more\n- two\n"
    )
    with pytest.raises(UserError, match=r"has no section about 7\.0"):
        release.cut_notes("v7.0", CHANGES)
    with pytest.raises(UserError, match="Shorten"):
        release.cut_notes(TAG, CHANGES.replace("two", "two" * 50_000))


def test_the_list_of_changes_is_short_enough_to_be_notes() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    notes = release.cut_notes(TAG, changes.replace("## Unreleased", f"## {VERSION}"), PAGES)
    assert len(notes) > 1000
    assert "](docs/" not in notes


def test_checksums_are_those_that_sha256sum_reads(tmp_path: Path) -> None:
    contents = {"a b.tar.gz": b"a", "b.whl": b"b"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for _ in range(2):  # its own file is none of those
        release.write_checksums(tmp_path)
    sums = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in contents.items()]
    assert (tmp_path / release.CHECKSUMS).read_bytes() == "".join(sums).encode()


def test_files_of_another_version_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        release.check_files(tmp_path / "none")
    with pytest.raises(UserError, match="contains no file"):
        release.write_checksums(tmp_path)
    (tmp_path / "reelsmith_trainer-0.0.1-py3-none-any.whl").touch()
    with pytest.raises(UserError, match=r"contains reelsmith_trainer-0\.0\.1"):
        release.check_files(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="the steps are for a Unix shell")
def test_a_tag_goes_through_every_step_up_to_the_network(tmp_path: Path) -> None:
    """Each step's own text; programs in place of docker, gh and sudo write down how they are called.

    `build` comes from the package index: its two files are built by the backend that it calls.
    """
    tree = tmp_path / "a checkout"
    tree.mkdir()
    lay_out_sources(ROOT, tree)
    shutil.copy(ROOT / "package" / "release.py", tree / "package")
    changes = tree / "CHANGELOG.md"
    text = changes.read_text(encoding="utf-8")
    changes.write_text(text.replace("## Unreleased", f"## {VERSION} (2026-12-24)"), encoding="utf-8")
    programs = tmp_path / "programs"
    programs.mkdir()
    calls = tmp_path / "calls.txt"
    for name in ("docker", "gh", "sudo"):
        (programs / name).write_text(FAKE, encoding="utf-8")
        (programs / name).chmod(0o755)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    names = {
        "TAG": TAG,
        "PAGES": PAGES,
        "REPOSITORY": "Owner/Name",
        "GITHUB_ACTOR": "owner",
        "GH_TOKEN": "a-token",
    }
    environment = {**os.environ, **names, "PATH": path, "CALLS": str(calls), "RUNNER_TEMP": str(tmp_path)}

    def run_steps(job: str) -> None:
        for step in steps_of(FOLDER / "release.yml", job):
            words = str(step.get("run", ""))
            if "python -m build" in words:
                words = f"mkdir -p dist; python -c {shlex.quote(BUILD)}"
            done = subprocess.run(
                ["bash", "-e", "-c", words], cwd=tree, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{step}\n{done.stdout}\n{done.stderr}"

    run_steps("build")
    assert (tree / "notes.md").read_text(encoding="utf-8").startswith("### Models\n")
    (tree / "files").mkdir()  # as the action downloads what the other one has uploaded
    for name in ("dist", "notes.md"):
        shutil.move(tree / name, tree / "files" / name)
    run_steps("publish")

    assert sorted(file.suffix for file in (tree / "upload").iterdir()) == [".gz", ".whl"]
    called = calls.read_text(encoding="utf-8")
    image = "ghcr.io/owner/name"  # registries know no capitals
    assert f"docker build --tag {image}:{TAG} --tag {image}:latest .\n" in called
    assert f"gh release create {TAG} --draft --verify-tag --title Reelsmith {VERSION}" in called
    assert called.index("docker build") < called.index("docker push") < called.index("gh release upload")
    assert called.splitlines()[-1] == f"gh release edit {TAG} --draft=false"
    assert "a-token" not in called  # of a command line, others can read it
