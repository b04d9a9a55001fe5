"""Measure peak memory of full fine-tuning with --fused_backward_pass, against the same run without.

    python benchmarks/fused_backward.py

A child process loads a random Wan transformer and trains all of it for a few steps with the training loop,
saving a file and a state; Adafactor keeps almost no state of its own. The figure is the highest resident
memory of the process above that before (VmHWM of /proc/self/status, so Linux only), with the fused pass
divided by without. Both runs must end with the same bytes. The last line is the peak of the saving alone
above the memory of the trained model, in sizes of its weights.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.process_memory import peak, require_linux, start_of_peak  # noqa: E402  # found from here on

AIM = 0.65  # weights alone are half of weights and gradients
SAVING_AIM = 0.1  # of the weights: one tensor at a time
FUSED = "--fused_backward_pass"
STEPS = 3


def main() -> None:
    """Print the peaks with and without the fused pass, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=768, help="width of the model; Wan2.1 1.3B has 1536")
    parser.add_argument("--layers", type=int, default=12, help="blocks of the model; Wan2.1 1.3B has 30")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(*_measure(args.child))
        return
    require_linux()
    with tempfile.TemporaryDirectory() as folder:
        options = _write_project(Path(folder), args.dim, args.layers)
        default, fused = (_run(Path(folder), [*options, *more]) for more in ([], [FUSED]))
    weights = default[1]
    for name, (full, _, saving, _) in (("without", default), ("with", fused)):
        print(
            f"{name:7} {FUSED}: peak {full / 1e6:6.0f} MB = {full / weights:.2f} x weights, "
            f"saving {saving / weights:.3f} x weights"
        )
    if default[3] != fused[3]:
        raise SystemExit("the two runs ended with different weights")
    ratio, saving = fused[0] / default[0], max(default[2], fused[2]) / weights
    print(
        f"weights {weights / 1e6:.0f} MB, ratio {ratio:.3f}, aim at most {AIM}; saving {saving:.3f}, aim at "
        f"most {SAVING_AIM}"
    )
    raise SystemExit(ratio > AIM or saving > SAVING_AIM)


def _run(folder: Path, options: list[str]) -> tuple[int, ...]:
    """Return bytes at the peak, of the weights, at the peak of saving, and a checksum of the weights."""
    command = [sys.executable, __file__, "--child", *(f"={word}" for word in options)]
    # return freed tensors of any size to the system at once
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return tuple(int(word) for word in done.stdout.split()[-4:])


def _measure(words: list[str]) -> tuple[int, int, int, int]:
    """Measure in the child; return the same as `_run`. The peak counts from before the model is loaded."""
    import torch
    import transformers.optimization  # noqa: F401  # Adafactor: loaded now so that it does not count

    from modules.options import read_options
    from training.learning_options import FullDitOptions
    from training.loop import advance
    from training.options import TrainingOptions, read_arguments, training_parser
    from training.run import prepare_run
    from wan.family import family_for_training
    from wan.options import WanTrainingOptions

    parser = training_parser("", FullDitOptions)
    from modules.parser import add_options

    add_options(parser, WanTrainingOptions)
    given = read_arguments(parser, [word.removeprefix("=") for word in words], {})
    family, options = (
        family_for_training(read_options(WanTrainingOptions, given)),
        read_options(TrainingOptions, given),
    )
    before = start_of_peak()
    with prepare_run(family, options) as run, contextlib.closing(run.feed.start(0, 0)) as micro_batches:
        for group in _groups(run.steps.batches_by_step(0)):
            advance(run, group, micro_batches)
        highest = peak() - before
        held = start_of_peak()
        run.saver.save_final()
        saving = peak() - held
        weights, checksum = sum(weight.nbytes for weight in run.parameters), 0
        for weight in run.parameters:
            checksum = zlib.crc32(weight.detach().view(-1).view(torch.uint8).numpy(), checksum)
    return (
        highest,
        weights,
        saving,
        checksum,
    )


def _groups(groups: Iterator[range]) -> list[range]:
    return [next(groups) for _ in range(STEPS)]


def _write_project(folder: Path, dim: int, layers: int) -> list[str]:
    """Write a random transformer and caches of small clips; return the options of a run on them."""
    import torch

    from checkpoints.writing import save_tensors
    from tests.tiny.wan_dit import tiny_state, write_dit

    sizes = {
        "dim": dim,
        "num_heads": dim // 128,
        "ffn_dim": dim * 35 // 6,
        "num_layers": layers,
        "text_dim": 256,
    }
    dit = write_dit(folder, tiny_state("t2v", freq_dim=256, **sizes))
    for index in range(4):
        stem = folder / "cache" / f"clip{index}"
        save_tensors(
            Path(f"{stem}_00000-005_0064x0064_wan.safetensors"),
            {"latents_2x8x8_float32": torch.randn(16, 2, 8, 8)},
        )
        save_tensors(Path(f"{stem}_wan_te.safetensors"), {"varlen_t5_float32": torch.randn(20, 256)})
    here = folder.as_posix()
    table = (
        f'[[datasets]]\nvideo_directory = "{here}/clips"\ncache_directory = "{here}/cache"\ntarget_frames = '
        "[5]\n"
    )
    (folder / "dataset.toml").write_text(f"[general]\nresolution = [64, 64]\n{table}", encoding="utf-8")
    options = {
        **{
            "dataset_config": folder / "dataset.toml",
            "dit": dit,
            "task": "t2v-1.3B",
            "seed": 1,
            "max_data_loader_n_workers": 0,
        },
        **{
            "output_dir": folder / "output",
            "output_name": "x",
            "max_grad_norm": 0,
            "optimizer_type": "Adafactor",
        },
    }
    return [
        *(word for name, value in options.items() for word in (f"--{name}", str(value))),
        "--gradient_checkpointing",
        "--save_state",
    ]


if __name__ == "__main__":
    main()
