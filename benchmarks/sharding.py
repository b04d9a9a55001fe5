"""Measure the host memory of a training whose processes share the transformer (--shard_base).

    python benchmarks/sharding.py

A random Wan2.1 of about 370 MB in float32, with 40 blocks as 14B has, is loaded and trained for two steps,
by one process with all of it and by two that share it, on the CPU: a LoRA, and all of its weights with AdamW,
with a state saved in the end. Of each process the most resident bytes
are counted, less those that it has after a training of a tiny model, which loads all libraries. glibc is
told to give freed memory back, as it keeps holes of blocks that were gathered. Nothing is timed.
"""

import contextlib
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import process_memory  # noqa: E402  # found from here on
from modules.parser import Parser  # noqa: E402

WORKER = "--worker"  # in front of a command that is run in this process
AIM = 0.6  # of the bytes of one process
SIZES = {"dim": 384, "ffn_dim": 1536, "num_heads": 3, "num_layers": 40}
TINY, LARGE = "model/dit.safetensors", "model/large.safetensors"
FREES = {"MALLOC_MMAP_THRESHOLD_": "65536"}
RUN = (
    *("--max_train_steps", "2", "--seed", "1", "--max_data_loader_n_workers", "0", "--no_page"),
    *("--output_name", "x", "--gradient_checkpointing"),
)


def main() -> None:
    """Measure both, and print what a process takes."""
    if sys.argv[1:2] == [WORKER]:
        measure(sys.argv[2:])
        return
    Parser(description=__doc__).parse_args()
    process_memory.require_linux()
    is_missed = False
    with tempfile.TemporaryDirectory() as name:
        for kind, command in prepare(Path(name)).items():
            (alone,) = run(Path(name), 1, [*command, "--output_dir", "alone"])
            shared = run(Path(name), 2, [*command, "--output_dir", "shared", "--shard_base"])
            size = (Path(name) / LARGE).stat().st_size
            print(f"{kind}, {size / 1e6:.0f} MB of weights; one process {alone / 1e6:.0f} MB")
            for rank, most in enumerate(shared):
                print(f"process {rank} of 2: {most / 1e6:.0f} MB, {most / alone:.2f} of one (aim: {AIM})")
            is_missed = is_missed or max(shared) > AIM * alone
    raise SystemExit(is_missed)


def prepare(folder: Path) -> dict[str, list[str]]:
    """Write model and caches; return the commands of the trainings."""
    from tests.faults.messages import succeed_here
    from tests.tiny.families import FAMILIES
    from tests.tiny.wan_dit import tiny_state, write_dit

    family = FAMILIES[0]
    family.prepare(folder)
    write_dit(folder / "model", tiny_state("t2v", **SIZES), name="large")
    for command in (family.cache_latents, family.cache_texts):
        succeed_here(*command, folder=folder)
    models = family.train[1 : family.train.index("--network_module")]
    return {
        "LoRA": [*family.train, *RUN],
        "whole model": [family.train_whole, *models, *RUN, "--save_state", "--overwrite"],
    }


def run(folder: Path, count: int, command: list[str]) -> list[int]:
    """Return the bytes that each of so many processes takes for a command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    usual = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "MASTER_PORT": port, **FREES}
    usual |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(count)}
    started = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), WORKER, *command],
            cwd=folder,
            env={**usual, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else usual,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("a training failed: its message is above")
    return [int(json.loads(text.splitlines()[-1])["bytes"]) for text in said]


def measure(command: list[str]) -> None:
    """Run a script of the root in this process, and print the bytes that it takes beside its libraries."""
    with contextlib.redirect_stdout(sys.stderr):
        run_script([*command, "--output_name", "tiny"])
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)  # that of the first is in use
        before = process_memory.start_of_peak()
        run_script([LARGE if word == TINY else word for word in command])
    print(json.dumps({"bytes": process_memory.peak() - before}))
    sys.stdout.flush()
    os._exit(0)  # gloo may abort at the interpreter's end


def run_script(command: list[str]) -> None:
    """Run a script of the root. Ends this process if it fails."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of a training before
    sys.argv = command
    try:
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


if __name__ == "__main__":
    main()
