"""Measure training steps and generation of models of real size on one GPU: python benchmarks/gpu.py

Weights are random, so nothing is downloaded: the same code that loads real files loads an empty file with the
released model's tensors, then fills it with noise on the device. Each row runs in its own process, with the
options that a user would type. The output is a Markdown table: seconds per step, operations per second
against a bf16 matrix product measured in the same run (hardware operations: recomputation counts), the peak
of the device's memory beside the prediction of --plan, and the host's peak. A generation is 5 steps with
guidance, times 8 for the 40 steps of a video; VAE and text encoders are not in the time.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.gpu_rows import ROWS, Row, sampling_steps, work_of  # noqa: E402
from tests.manifests import tensor_list, write_hollow  # noqa: E402

STEPS, WARM_UP = 3, 2
MADE = 5  # number of timed steps of a generation
GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="\n".join(rows_in_words()))
    parser.add_argument(
        "--rows", type=int, nargs="+", default=list(range(len(ROWS))), help="rows to measure; default: all"
    )
    parser.add_argument(
        "--seconds", type=float, default=1200, help="start no row after this many seconds; default 1200"
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(measure_row(ROWS[args.child], args.device)))
        return
    print_table(args.rows, args.seconds, args.device)


def rows_in_words() -> list[str]:
    return [f"{number}: {row.model.name} {row.size} {row.name}." for number, row in enumerate(ROWS)]


def print_table(numbers: list[int], seconds: float, device: str) -> None:
    """Measure each row in a child process and print it as soon as it is done."""
    import torch

    from benchmarks.ceilings import matmul_peak, upload_peak

    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    begun, peak = time.monotonic(), matmul_peak()
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {date.today()}. ", end="")
    print(f"bf16 matrix product {peak / 1e12:.0f} TFLOP/s, pinned upload {upload_peak() / 1e9:.0f} GB/s\n")
    print(
        "| model | size | options | seconds | TFLOP/s | of the peak | device GiB | planned | host GiB | "
        "loading s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for number in numbers:
        if time.monotonic() - begun > seconds:
            print(f"\nrows from {number} on were not begun: {seconds:.0f} s are over")
            return
        command = [sys.executable, __file__, "--child", str(number), "--device", device]
        child = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
        row = ROWS[number]
        start = f"| {row.model.name} | {row.size} | {row.name} |"
        if child.returncode:
            reason = (child.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"{start} failed: {reason[:160]} |", flush=True)
            sys.stderr.write(child.stderr)
            continue
        print(line_of(start, row, json.loads(child.stdout.splitlines()[-1]), peak), flush=True)


def line_of(start: str, row: Row, found: dict[str, float], peak: float) -> str:
    """Return a row of the table."""
    rate = found["operations"] / found["seconds"]
    shown = f"{found['seconds']:.2f}"
    if row.generates:
        shown = (
            f"{found['seconds'] / MADE * sampling_steps(row.model):.0f} for {sampling_steps(row.model)} steps"
        )
    planned, device = found["planned"], found["device"]
    plan = f"{planned / GIB:.1f} ({100 * (planned / device - 1):+.0f} %)"
    memory = f"{device / GIB:.1f} | {plan} | {found['host'] / GIB:.1f}"
    return (
        f"{start} {shown} | {rate / 1e12:.0f} | {100 * rate / peak:.0f} % | {memory} | "
        f"{found['loading']:.0f} |"
    )


@dataclass(frozen=True)
class Bench:
    """A prepared model and the work of one measured call."""

    call: Callable[[], object]
    operations: float  # of the call
    planned: float  # bytes that the plan predicts for the device
    loading: float  # seconds


def measure_row(row: Row, device: str) -> dict[str, float]:
    """Return the figures of a row, in the process that loads its model."""
    import torch

    from benchmarks.process_memory import peak

    where = torch.device(device)
    with tempfile.TemporaryDirectory() as folder:
        # all in bf16, although the release has some in float32
        in_bf16 = {name: ("BF16", shape) for name, (_, shape) in tensor_list(row.model.manifest).items()}
        path = write_hollow(Path(folder) / "dit.safetensors", in_bf16)
        bench = (generation if row.generates else train_steps)(row, path, where)
        seconds = time_call(
            bench.call, where, rounds=1 if row.generates else STEPS, warm_up=1 if row.generates else WARM_UP
        )
    device_peak = torch.cuda.max_memory_allocated(where) if where.type == "cuda" else 0
    host = peak() if sys.platform == "linux" else 0
    return {
        "seconds": seconds,
        "operations": bench.operations,
        "device": device_peak,
        "planned": bench.planned,
        "host": host,
        "loading": bench.loading,
    }


def time_call(call: Callable[[], object], device: Any, rounds: int, warm_up: int) -> float:
    """Return the mean seconds of `rounds` calls.

    The peak of the device's memory counts from the last warm-up call on.
    """
    import torch

    synchronize = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    for _ in range(warm_up):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        call()
    synchronize()
    start = time.perf_counter()
    for _ in range(rounds):
        call()
    synchronize()
    return (time.perf_counter() - start) / rounds


def train_steps(row: Row, path: Path, device: Any) -> Bench:
    """Prepare training steps of a LoRA of rank 32 on random latents.

    A step is loss, backward pass, clipping and optimizer step, as in the training loop.
    """
    import torch

    from benchmarks.noise import fill_with_noise
    from modules.fp8.products import add_product
    from modules.offload.block_swap import host_weights
    from modules.offload.swap_plan import SwapPlan
    from networks.adapter import make_network
    from training.dressing import dress, placement_of
    from training.loss import training_loss
    from training.optimizers.optimizer import make_optimizer
    from training.planning.prediction import predict
    from training.planning.rehearsal import autocast_of

    options, family = training_family(row, path)
    batch = random_batch(row, family)
    planned = predict(family, options, batch, device).device(options.speed.swap.number)
    begun = time.monotonic()
    host = host_weights(SwapPlan(family.dit, options.speed.swap.number), device)
    placement = placement_of(options, device, add_product(options.speed.fp8.quantisation, device))
    dit = family.load_dit(replace(placement, host=host)).requires_grad_(False)
    loading = time.monotonic() - begun
    fill_with_noise(dit)
    network = make_network(options.network, family.lora_module, dit, seed=0)
    network.module.to(device)
    dress(dit, family.dit, options.loop, device, options.speed.compilation.choice, host)
    parameters = network.parameters()
    optimizer, _ = make_optimizer(
        options.optimizer, network.parameter_groups(options.optimizer.learning_rate)[0]
    )
    autocast, batch = autocast_of(options, device), batch.to(device)

    def step() -> None:
        training_loss(family, dit, batch, autocast).backward()
        torch.nn.utils.clip_grad_norm_(parameters, options.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    work = work_of(row, family.files.dit_header().config)
    return Bench(step, work.lora_step(checkpointing=True), planned, loading)


def generation(row: Row, path: Path, device: Any) -> Bench:
    """Prepare some steps of the denoising loop with guidance, on random conditions."""
    import torch

    from benchmarks.noise import fill_with_noise
    from generation.dressing import dit_loader
    from generation.memory import rehearse_denoising
    from generation.sections import make_latents
    from modules.planning.memory_plan import workspace

    options, family = generation_family(row, path)
    prepared, prompts, inputs = random_request(row, family)
    plan, _ = rehearse_denoising(
        family, options, prepared, prompts, inputs, workspace(device, is_training=False)
    )
    begun = time.monotonic()
    dit = dit_loader(family, (), device, options)(0)
    loading = time.monotonic() - begun
    fill_with_noise(dit)

    @torch.no_grad()
    def make() -> None:
        make_latents(family, lambda _: dit, prepared, prompts, inputs, device, split=options.split_uncond)

    work = work_of(row, family.files.dit_header().config)
    return Bench(make, 2 * MADE * work.forward, plan(options.speed.swap.number).device, loading)


def training_family(row: Row, path: Path) -> tuple[Any, Any]:
    """Return the options of a row, as the training script reads them, and the family."""
    from training.options import read_training

    given = [
        "--dit",
        str(path),
        "--dataset_config",
        "-",
        "--output_dir",
        "-",
        "--output_name",
        "-",
        "--mixed_precision",
        "bf16",
    ]
    given += ["--network_dim", "32", "--learning_rate", "1e-4", *row.options]
    if row.model.is_wan:
        from wan.family import family_for_training
        from wan.options import WanTrainingOptions, add_training_arguments

        options, own = read_training(
            None, add_training_arguments, WanTrainingOptions, ["--task", str(row.model.task), *given]
        )
        return options, family_for_training(own)
    from hunyuan_model import family as hunyuan
    from hunyuan_model import options as hunyuan_options

    arguments = hunyuan_options.add_training_arguments
    options, theirs = read_training(None, arguments, hunyuan_options.HunyuanTrainingOptions, given)
    return options, hunyuan.family_for_training(theirs)


def generation_family(row: Row, path: Path) -> tuple[Any, Any]:
    """Return the same for generation; only for Wan so far."""
    from generation.options import read_generation
    from generation.script_options import ScriptDefaults
    from wan.family import family_for_generation
    from wan.options import WanGenerationOptions, add_generation_arguments

    given = [
        "--task",
        str(row.model.task),
        "--dit",
        str(path),
        "--prompt",
        "-",
        "--save_path",
        "-",
        *row.options,
    ]
    defaults = ScriptDefaults(fps=16, guidance_scale=5.0)
    options, own = read_generation(None, defaults, add_generation_arguments, WanGenerationOptions, given)
    return options, family_for_generation(own)


def random_batch(row: Row, family: Any) -> Any:
    """Return a batch of one clip, as the feed returns it: latents, texts, noise."""
    import torch

    from modules.contract.data import Batch
    from training.loss import NoisyBatch

    size, config = row.size, family.files.dit_header().config
    shape = family.latent.shape(size.frames, size.height, size.width)
    tensors: dict[str, Any] = {"latents": torch.randn(shape)}
    if row.model.is_wan:
        tensors["t5"] = [torch.randn(row.text_tokens, config.text_dim)]
    else:
        tensors["llm"] = torch.randn(1, row.text_tokens, config.text_dim)
        tensors["llm_mask"] = torch.ones(1, row.text_tokens, dtype=torch.bool)
        tensors["clipL"] = torch.randn(1, config.pooled_dim)
        tensors["clipL_mask"] = torch.ones(1, 77, dtype=torch.bool)
    one = torch.ones(1)
    return NoisyBatch(Batch(tensors, ("",), ("random",)), torch.randn(shape), one / 2, one * 500, one)


def random_request(row: Row, family: Any) -> tuple[Any, Any, Any]:
    """Return a request for a few steps, with its texts and its image as the encoders return them."""
    import torch

    from modules.contract.generation import EncodedPrompts, Request
    from modules.contract.requests import settle

    size, config = row.size, family.files.dit_header().config
    texts = [{"t5": [torch.randn(row.text_tokens, config.text_dim)]} for _ in range(2)]
    shape = family.latent.shape(size.frames, size.height, size.width)
    inputs: dict[str, Any] = {}
    if config.has_image:
        inputs["clip"] = torch.randn(1, 257, config.image_dim)
        inputs["condition_latents"] = torch.randn(1, config.in_dim - shape[1], *shape[2:])
    request = Request("", 0, steps=MADE, guidance_scale=5.0, solver="unipc", fps=16.0)
    prepared = settle(
        request, family.defaults, (size.width, size.height, size.frames), flow_shift=3.0, usual_negative=""
    )
    return prepared, {0: EncodedPrompts(*texts)}, {0: inputs}


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
