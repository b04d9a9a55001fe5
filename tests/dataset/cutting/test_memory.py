"""Cutting a long film takes no more memory than a short one."""

import os
import re
import subprocess
import sys
from fractions import Fraction
from itertools import chain
from pathlib import Path

import pytest

from tests.commands import QUIET, ROOT
from tests.dataset.cutting.films import scene, write_film

# the peak as the process itself sees it, in KiB
PEAK = """
import re, sys
sys.path.insert(0, {root!r})
from tools.split_video import main
main(sys.argv[1:])
print("peak", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def peak_of(film: Path, output: Path) -> int:
    words = [sys.executable, "-c", PEAK.format(root=str(ROOT)), "--input", str(film), "--output", str(output)]
    done = subprocess.run(
        [*words, "--preset", "ultrafast"],
        env={**os.environ, **QUIET},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"peak (\d+)", done.stdout)
    assert found is not None
    return int(found[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux")
def test_a_film_of_four_times_the_length_takes_about_the_same_memory(tmp_path: Path) -> None:
    scenes = [scene(seed, 60) for seed in range(8)]
    # 2 and 8 minutes
    short = write_film(tmp_path / "short.mp4", [*chain(*scenes)] * 6, Fraction(24))
    long = write_film(tmp_path / "long.mp4", [*chain(*scenes)] * 24, Fraction(24))

    peaks = [peak_of(film, tmp_path / film.stem) for film in (short, long)]

    assert len(list((tmp_path / "long").glob("*.mp4"))) > 150
    assert peaks[1] <= 1.15 * peaks[0], peaks
