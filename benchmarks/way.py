"""Count our files and functions on two paths: a clip to a LoRA, and a prompt with that LoRA to a clip.

    python benchmarks/way.py
    python benchmarks/way.py --records      # also which kinds of records are made

Runs the pocket model's commands in this process under a profiler, without workers, and prints what was
called: plain functions of product files (no comprehension, lambda or class body) and the lines of their
bodies; and how many kinds of our records (dataclasses and named tuples) were made.
"""

import argparse
import contextlib
import importlib
import inspect
import io
import logging
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# what dataclasses and named tuples have made: the name of its code, and the kind of its first argument
MAKERS: dict[str, Callable[[Any], Any]] = {"__init__": type, "<lambda>": lambda kind: kind}
NOT_PRODUCT = {"benchmarks", "tests", "docs", "pocket", ".venv"}
MODEL = ["--task", "t2v-1.3B", "--dit", str(ROOT / "pocket/dit.safetensors")]
VAE = ["--vae", str(ROOT / "pocket/vae.safetensors")]
T5 = ["--t5", str(ROOT / "pocket/t5.safetensors")]
CLIP = "--video_size 32 32 --video_length 5 --infer_steps 2 --guidance_scale 3 --flow_shift 3 --seed 1"
TRAINING = (
    "--sdpa --network_module networks.lora_wan --network_dim 4 --learning_rate 1e-3 "
    "--timestep_sampling shift --mixed_precision bf16 --max_train_steps 2 --max_data_loader_n_workers 0 "
    "--seed 1 --output_name way"
)
TABLE = """[general]
resolution = [32, 32]
caption_extension = ".txt"
[[datasets]]
video_directory = "{folder}/clips"
cache_directory = "{folder}/cache"
target_frames = [5]
"""

Command = tuple[str, list[str]]  # a script, and the words of its command line


def commands(folder: Path) -> dict[str, list[Command]]:
    """Return the commands of each path, with the clip and its dataset file written into the folder."""
    from modules.media.writing import write_video

    (folder / "clips").mkdir()
    write_video(folder / "clips/a.mp4", iter(np.zeros((5, 32, 32, 3), np.uint8)), 16.0)
    (folder / "clips/a.txt").write_text("a red circle moving left", encoding="utf-8")
    (folder / "d.toml").write_text(TABLE.format(folder=folder.as_posix()), encoding="utf-8")
    data = ["--dataset_config", str(folder / "d.toml")]
    made = ["--lora_weight", str(folder / "way.safetensors"), "--save_path", str(folder / "videos")]
    return {
        "one clip, cache and train": [
            ("wan_cache_latents.py", [*data, *VAE, "--num_workers", "1"]),
            ("wan_cache_text_encoder_outputs.py", [*data, *T5]),
            ("wan_train_network.py", [*MODEL, *data, *TRAINING.split(), "--output_dir", str(folder)]),
        ],
        "one prompt with a LoRA": [
            (
                "wan_generate_video.py",
                [*MODEL, *VAE, *T5, *made, *CLIP.split(), "--prompt", "a red circle moving left"],
            ),
        ],
    }


@dataclass(frozen=True)
class Counts:
    """What was called, and which kinds of records were made."""

    files: int
    functions: int
    lines: int
    records: tuple[str, ...]


def count(way: Sequence[Command]) -> Counts:
    """Run commands; return how many of our files and functions were called, their lines, and records."""
    called: set[CodeType] = set()
    made: set[Any] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            code = frame.f_code
            called.add(code)
            # what dataclasses and named tuples make of their fields is of no file
            if code.co_name in MAKERS and code.co_filename == "<string>" and code.co_argcount:
                made.add(MAKERS[code.co_name](frame.f_locals[code.co_varnames[0]]))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        for script, words in way:
            run_script(script, words)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    ours = {code for code in called.copy() if code.co_flags & inspect.CO_OPTIMIZED and _is_product(code)}
    lines = sum(max(line or 0 for *_, line in code.co_lines()) - code.co_firstlineno + 1 for code in ours)
    records = sorted(
        f"{one.__module__}.{one.__qualname__}" for one in made if isinstance(one, type) and _is_record(one)
    )
    return Counts(len({code.co_filename for code in ours}), len(ours), lines, tuple(records))


def run_script(script: str, words: list[str]) -> None:
    """Run a script of the root as its command does: its table reads the words first."""
    from modules.table_answers import answer_script

    main = importlib.import_module(Path(script).stem).main
    before = sys.argv
    sys.argv = [str(ROOT / script), *words]
    try:
        answer_script(Path(script), words)
        main()
    finally:
        sys.argv = before


def _is_record(kind: type) -> bool:
    if not is_dataclass(kind) and not hasattr(kind, "_fields"):
        return False
    path = Path(getattr(sys.modules[kind.__module__], "__file__", None) or "/")
    return path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] not in NOT_PRODUCT


def _is_product(code: CodeType) -> bool:
    path = Path(code.co_filename)
    if code.co_name.startswith("<") or not path.is_relative_to(ROOT):
        return False
    return path.relative_to(ROOT).parts[0] not in NOT_PRODUCT


def measure() -> dict[str, Counts]:
    """Return the counts of each path."""
    logging.disable()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        return {name: count(way) for name, way in commands(Path(folder)).items()}


def main() -> None:
    """Print the counts of both paths."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", action="store_true", help="also list the kinds of records")
    shows_records = parser.parse_args().records
    for name, found in measure().items():
        records = f"{len(found.records)} kinds of records"
        print(f"{name}: {found.files} files, {found.functions} functions, {records}, {found.lines:,} lines")
        if shows_records:
            print("\n".join(f"  {one}" for one in found.records))


if __name__ == "__main__":
    main()
