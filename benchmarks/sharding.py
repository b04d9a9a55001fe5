"""Measure the host memory of a training that shares (--shard_base) or swaps (--blocks_to_swap) weights.

    python benchmarks/sharding.py

A random Wan2.1 of about 370 MB in float32, with 40 blocks as 14B has, is loaded and trained for two steps, by
one process with all of it and by two that share it, on the CPU: a LoRA, and all of its weights with AdamW,
with a state saved at the end. For each process the peak of resident bytes is counted, minus those that it has
after a training of a tiny model, which loads all libraries. glibc is configured to return freed memory,
because it keeps holes of blocks that were gathered. Nothing is timed.

Swapped weights of two processes are one copy: the peak of all memory that both have together (a shared page
counts once), minus what each needs besides those weights, is compared with the weights.
"""

import contextlib
import json
import os
import re
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import process_memory  # noqa: E402  # found from here on
from modules.parser import Parser  # noqa: E402

WORKER = "--worker"  # in front of a command that is run in this process and measured
PLAIN = "--plain"  # in front of one that is watched from outside
LORA = "LoRA"
AIM = 0.6  # of the bytes of one process
AIM_SWAPPED = 1.1  # of the swapped weights
BLOCKS, SWAPPED = 40, 38
PAUSE = 0.05  # seconds between two looks
SIZES = {"dim": 384, "ffn_dim": 1536, "num_heads": 3, "num_layers": BLOCKS}
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
    if sys.argv[1:2] == [PLAIN]:
        run_script(sys.argv[2:])
        os._exit(0)  # gloo may abort at the interpreter's end
    Parser(description=__doc__).parse_args()
    process_memory.require_linux()
    is_missed = False
    with tempfile.TemporaryDirectory() as name:
        commands = prepare(Path(name))
        for kind, command in commands.items():
            (alone,) = run(Path(name), 1, [*command, "--output_dir", "alone"])
            shared = run(Path(name), 2, [*command, "--output_dir", "shared", "--shard_base"])
            size = (Path(name) / LARGE).stat().st_size
            print(f"{kind}, {size / 1e6:.0f} MB of weights; one process {alone / 1e6:.0f} MB")
            for rank, maximum in enumerate(shared):
                print(
                    f"process {rank} of 2: {maximum / 1e6:.0f} MB, {maximum / alone:.2f} of one (aim: {AIM})"
                )
            is_missed = is_missed or max(shared) > AIM * alone
        weights = swapped_bytes(Path(name) / LARGE)
        words = [*commands[LORA], "--blocks_to_swap", str(SWAPPED)]
        one, two = (watch(Path(name), count, [*words, "--output_dir", f"{count}"]) for count in (1, 2))
    share = (two - 2 * (one - weights)) / weights
    print(
        f"{weights / 1e6:.0f} MB of swapped weights; one process {one / 1e6:.0f} MB, two {two / 1e6:.0f} MB"
    )
    print(f"two processes hold {share:.2f} of the weights (aim: {AIM_SWAPPED})")
    raise SystemExit(is_missed or share > AIM_SWAPPED)


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
        LORA: [*family.train, *RUN],
        "whole model": [family.train_full, *models, *RUN, "--save_state", "--overwrite"],
    }


def run(folder: Path, count: int, command: list[str]) -> list[int]:
    """Return the bytes that each of `count` processes takes for a command."""
    started = start(folder, count, [WORKER, *command])
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("a training failed: its message is above")
    return [int(json.loads(text.splitlines()[-1])["bytes"]) for text in said]


def watch(folder: Path, count: int, command: list[str]) -> int:
    """Return the peak of the bytes that `count` processes together have for a command."""
    large = [LARGE if word == TINY else word for word in command]
    started, maximum = start(folder, count, [PLAIN, *large]), 0
    while any(process.poll() is None for process in started):
        with contextlib.suppress(OSError):  # one that has just ended
            maximum = max(maximum, sum(map(proportional_bytes, started)))
        time.sleep(PAUSE)
    if any(process.returncode for process in started):
        raise SystemExit("a training failed: its message is above")
    return maximum


def proportional_bytes(process: subprocess.Popen[str]) -> int:
    """Return the bytes of a process that no file on disk has; of shared pages, its fraction."""
    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
    return sum(int(size) * 1024 for size in re.findall(r"Pss_(?:Anon|Shmem):\s+(\d+) kB", text))


def swapped_bytes(path: Path) -> int:
    """Return the bytes of the weights in host memory."""
    from checkpoints.opening import open_checkpoint
    from runtime.offload.swap_plan import plan_list

    starts = tuple(f"blocks.{index}." for index in plan_list("blocks", BLOCKS, SWAPPED).streamed)
    with contextlib.closing(open_checkpoint(path)) as checkpoint:
        return sum(
            info.size_bytes
            for name, info in checkpoint.tensors.items()
            if name.startswith(starts) and name.endswith(".weight") and len(info.shape) == 2
        )


def start(folder: Path, count: int, words: list[str]) -> list[subprocess.Popen[str]]:
    """Start this script in `count` processes, as a launcher does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    default = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "MASTER_PORT": port,
        **FREES,
    }
    default |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(count)}
    default |= {"LOCAL_WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *words],
            cwd=folder,
            env={**default, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else default,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def measure(command: list[str]) -> None:
    """Run a script of the root in this process, and print the bytes that it takes besides its libraries."""
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
