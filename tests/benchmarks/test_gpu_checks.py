"""The runner of the checks on a GPU loses nothing: failing, hanging, crashing and skipping files."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_checks import main

GOOD = "def test_good(): pass\n"
FAILING = GOOD + "def test_bad():\n    assert 1 + 1 == 3, 'a wrong sum'\n"
HANGING = GOOD + "import time\ndef test_endless():\n    time.sleep(600)\n"
CRASHING = GOOD + "import os\ndef test_crash():\n    os._exit(7)\n"
SKIPPING = "import pytest\ndef test_away():\n    pytest.skip('no such device')\n"
MISSING = "import a_package_that_nobody_has\n" + GOOD
BROKEN = "import benchmarks.no_such_part\n" + GOOD


def checked(
    tmp_path: Path, files: dict[str, str], capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[int, str, dict[str, dict[str, object]]]:
    """The exit code, what was printed, and the groups by the name of their file."""
    paths = [tmp_path / f"test_{name}.py" for name in files]
    for path, text in zip(paths, files.values(), strict=True):
        path.write_text(text, encoding="utf-8")
    found = tmp_path / "found.json"
    code = main([*map(str, paths), "--markers", "", "--output", str(found), *options])
    groups = json.loads(found.read_text(encoding="utf-8"))["groups"]
    return code, capsys.readouterr().out, {Path(group["name"]).stem[5:]: group for group in groups}


@pytest.mark.slow
def test_a_bad_file_does_not_lose_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"failing": FAILING, "hanging": HANGING, "crashing": CRASHING, "skipping": SKIPPING}
    files |= {"missing": MISSING, "broken": BROKEN, "good": GOOD}
    code, printed, groups = checked(tmp_path, files, capsys, "--group_seconds", "12", "--jobs", "2")

    assert code == 1
    assert {name: group["passed"] for name, group in groups.items()} == {
        **dict.fromkeys(("failing", "hanging", "crashing", "good"), 1),
        **dict.fromkeys(("skipping", "missing", "broken"), 0),
    }
    assert "a wrong sum" in printed
    assert "stopped after 12 seconds (in " in printed
    assert str(groups["hanging"]["running"]).endswith("test_endless")
    assert str(groups["crashing"]["ended"]).startswith("ended with exit code 7")
    assert str(groups["crashing"]["running"]).endswith("test_crash")
    assert groups["skipping"]["skipped"] == {"no such device": 1}
    assert groups["missing"]["skipped"] == {"needs a_package_that_nobody_has": 1}
    assert not groups["missing"]["failures"]
    assert groups["broken"]["failures"]  # a part of ours that is not there is a fault
    assert "Not good: " in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_at_once_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REELSMITH_TEST_DEVICE", raising=False)
    assert main([]) == 1
    assert capsys.readouterr().out.startswith("Nothing was checked: torch sees no CUDA device here.")
