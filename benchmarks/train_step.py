"""Measure the overhead of the training loop over the bare computation.

    python benchmarks/train_step.py

A bare step is forward, backward, clipping and optimizer step of a Wan transformer with a LoRA (with --whole
of all its weights), on a batch that is already on the device. A step of the loop also reads caches in
workers, draws noise and timesteps, copies, logs to TensorBoard and counts. Both are timed alternately in one
run, with the same network, optimizer and autocast; the figure is the median ratio of neighbors.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from modules.parser import add_options  # noqa: E402  # found from here on

AIM = 1.05  # for bare steps of 0.1 to 0.5 s


def main() -> None:
    """Print the ratio of a step of the loop to a bare step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=384, help="width of the model; Wan2.1 1.3B has 1536")
    parser.add_argument("--layers", type=int, default=3, help="blocks of the model; Wan2.1 1.3B has 30")
    parser.add_argument("--size", type=int, default=128, help="width and height of the clips in pixels")
    parser.add_argument(
        "--precision", default="no", choices=["no", "bf16", "fp16"], help="value of --mixed_precision"
    )
    parser.add_argument("--rounds", type=int, default=12, help="number of rounds; each times both kinds")
    parser.add_argument("--whole", action="store_true", help="train all weights instead of a LoRA")
    parser.add_argument("--steps", type=int, default=4, help="steps of each kind per round")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bare, loop = _measure(Path(folder), args)
    ratio = statistics.median(with_loop / alone for with_loop, alone in zip(loop, bare, strict=True))
    print(f"bare step {statistics.median(bare):.4f} s, step of the loop {statistics.median(loop):.4f} s")
    print(f"ratio {ratio:.3f}, aim at most {AIM} (of the fastest rounds {min(loop) / min(bare):.3f})")
    raise SystemExit(ratio > AIM)


def _measure(folder: Path, args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Return seconds of bare steps and of steps of the loop, one figure of each per round."""
    from modules.options import read_options
    from training.learning_options import FullDitOptions
    from training.loop import advance
    from training.options import TrainingOptions, read_arguments, training_parser
    from training.run import prepare_run
    from wan.family import family_for_training
    from wan.options import WanTrainingOptions

    parser = training_parser("", FullDitOptions) if args.whole else training_parser("")
    add_options(parser, WanTrainingOptions)
    given = read_arguments(parser, _write_project(folder, args, args.whole), {})
    family = family_for_training(read_options(WanTrainingOptions, given))
    bare: list[float] = []
    loop: list[float] = []
    with (
        prepare_run(family, read_options(TrainingOptions, given)) as run,
        contextlib.closing(run.feed.start(0, 0)) as micro_batches,
    ):
        groups = run.steps.batches_by_step(0)
        bare_step = _bare_step(run, next(micro_batches))

        def loop_step() -> None:
            advance(run, next(groups), micro_batches)

        for step in (bare_step, loop_step):  # warm up
            _time(args.steps, step)
        for _ in range(args.rounds):
            bare.append(_time(args.steps, bare_step))
            loop.append(_time(args.steps, loop_step))
    return bare, loop


def _bare_step(run: Any, batch: Any) -> Callable[[], None]:
    """Return a function for forward, backward, clipping and optimizer step on one prepared batch.

    The batch is moved and mixed with noise once, in advance.
    """
    import torch

    from modules.flow.schedule import add_noise

    batch = batch.to(run.device)
    latents = run.family.latent.to_model(batch.batch.tensor("latents"))
    noisy, target = add_noise(latents, batch.noise, batch.sigmas), batch.noise - latents
    conditions = run.family.batch_conditions(latents, batch.batch)

    def step() -> None:
        with run.autocast():
            velocity = run.family.predict(run.model.dits.on_device(0), noisy, batch.timesteps, conditions)
        torch.nn.functional.mse_loss(velocity.float(), target).backward()
        torch.nn.utils.clip_grad_norm_(run.parameters, 1.0)
        run.model.optimizer.step()
        run.model.optimizer.zero_grad(set_to_none=True)

    return step


def _time(count: int, step: Callable[[], None]) -> float:
    """Return the mean seconds of a step over `count` steps."""
    import torch

    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronize()
    return (time.perf_counter() - start) / count


def _write_project(folder: Path, args: argparse.Namespace, is_full: bool = False) -> list[str]:
    """Write a random transformer and caches of clips of nine frames; return the options of a run on them.

    `is_full` trains all weights instead of a LoRA.
    """
    import torch

    from checkpoints.writing import save_tensors
    from tests.tiny.wan_dit import tiny_state, write_dit

    sizes = {
        "dim": args.dim,
        "num_heads": args.dim // 128,
        "ffn_dim": args.dim * 35 // 6,
        "num_layers": args.layers,
    }
    dit = write_dit(folder, tiny_state("t2v", text_dim=256, freq_dim=256, **sizes))
    latent = args.size // 8
    for index in range(64):
        stem = folder / "cache" / f"clip{index}"
        latents = torch.randn(16, 3, latent, latent)
        name = f"{stem}_00000-009_{args.size:04d}x{args.size:04d}_wan.safetensors"
        save_tensors(Path(name), {f"latents_3x{latent}x{latent}_float32": latents})
        save_tensors(Path(f"{stem}_wan_te.safetensors"), {"varlen_t5_float32": torch.randn(40, 256)})
    here = folder.as_posix()
    table = (
        f'[[datasets]]\nvideo_directory = "{here}/clips"\ncache_directory = "{here}/cache"\ntarget_frames = '
        "[9]\n"
    )
    general = f"[general]\nresolution = [{args.size}, {args.size}]\nnum_repeats = 100\n"
    (folder / "dataset.toml").write_text(general + table, encoding="utf-8")
    options = {
        **{
            "dataset_config": folder / "dataset.toml",
            "dit": dit,
            "task": "t2v-1.3B",
            **({} if is_full else {"network_dim": 16}),
            "learning_rate": 1e-4,
        },
        **{"output_dir": folder / "output", "output_name": "x", "logging_dir": folder / "logs", "seed": 1},
        **{"mixed_precision": args.precision, "max_data_loader_n_workers": 2, "max_train_steps": 6400},
    }
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


if __name__ == "__main__":
    main()
