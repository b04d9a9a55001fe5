"""Run a command of Reelsmith in this process and write its peaks of memory, for benchmarks/evening.py.

    python benchmarks/evening_phase.py PEAKS.json SCRIPT WORDS ...

The file has the peak of resident host memory and that of tensors on the CUDA device, in bytes.
"""

import json
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Run the script with its words, and write the peaks however it ends."""
    if len(sys.argv) < 3:
        print(f"usage: {Path(__file__).name} [--help] PEAKS.json SCRIPT WORDS ...\n\n{__doc__}")
        raise SystemExit(0 if {"-h", "--help"} & set(sys.argv) else 2)
    peaks, script = Path(sys.argv[1]), ROOT / sys.argv[2]
    sys.argv[:] = [str(script), *sys.argv[3:]]
    sys.path[0] = str(script.parent)  # as Python does for a script
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        _write_peaks(peaks)


def _write_peaks(path: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from modules.devices import host_peak  # only now: the script's first import comes before all of ours

    torch = sys.modules.get("torch")
    device = None
    if torch is not None and torch.cuda.is_initialized():
        device = torch.cuda.max_memory_allocated()
    path.write_text(json.dumps({"host": host_peak(), "device": device}), encoding="utf-8")


if __name__ == "__main__":
    main()
