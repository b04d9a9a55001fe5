"""Measure the time of --help and of a mistyped option, against `import torch` in the same run.

    python benchmarks/startup.py [runs] [script ...]

Prints a ratio for every script. With PYTHONDONTWRITEBYTECODE set, our modules are compiled at every start,
torch's are not: the ratios are then higher by about a quarter than a user's.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from package.reelsmith.commands import find_commands  # noqa: E402

BAR = 0.08


def seconds(command: list[str], runs: int) -> float:
    """Return the median wall seconds of a command, after one run that warms the file cache."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, capture_output=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def scripts() -> list[str]:
    """Return the scripts that users call."""
    return sorted(command.path.relative_to(ROOT).as_posix() for command in find_commands(ROOT))


def main() -> None:
    """Print the ratio of each script's start to `import torch`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="?", type=int, default=5, help="of each command (%(default)s)")
    parser.add_argument("scripts", nargs="*", help="all when not given")
    args = parser.parse_args()
    runs = args.runs
    baseline = seconds([sys.executable, "-c", "import torch"], runs)
    print(f"baseline: import torch {baseline:.3f} s")
    if sys.dont_write_bytecode:
        print("our modules are compiled at every start: PYTHONDONTWRITEBYTECODE is set")
    worst = 0.0
    for script in args.scripts or scripts():
        for argument in ("--help", "--no_such_option"):
            ratio = seconds([sys.executable, script, argument], runs) / baseline
            worst = max(worst, ratio)
            print(f"{script:42} {argument:18} {ratio:.3f} of import torch")
    print(f"worst {worst:.3f}, bar {BAR}: {'met' if worst <= BAR else 'NOT met'}")


if __name__ == "__main__":
    main()
