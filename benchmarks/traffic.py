"""Count a step's passes over memory, without a GPU.

    python benchmarks/traffic.py

Runs the real code of a row of benchmarks/gpu.py on tensors without content, as --plan does, and counts for
every kernel the floating-point operations and the bytes read and written. Few blocks are run, because each
additional block adds the same. The seconds are a prediction for a card with the rates of --matmul,
--attention and --copy, at which every kernel is assumed to run: launches, waits, slower kernels and the
optimizer's reading of values are not included. --fused is an estimate of what a compiler makes of the eager
code: neighbors that are neither products nor attention become one kernel. It leaves out that a compiled block
is recomputed to its very end. Products in 8 bits are counted as products in 16.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402

from benchmarks.gpu_rows import CACHING, GENERATION, LOADING, Row, choose  # noqa: E402
from benchmarks.gpu_steps import (  # noqa: E402  # noqa: E402
    generation_family,
    lay_out,  # noqa: E402
    random_batch,
    random_request,
    training_family,
)
from benchmarks.traffic_count import (  # noqa: E402
    AGAIN,
    ATTENTION,
    BACKWARD,
    FORWARD,
    GROUPS,
    PRODUCT,
    Counting,
    Operation,
    fused,
)
from modules.console import quiet  # noqa: E402
from runtime.planning.dry_run import Counts, allocate_empty_weights, dry_run, track_blocks, truncate_blocks  # noqa: E402

META = torch.device("meta")
MIN = 2  # blocks of a list that are run; one more tells what each further block adds
OPTIMIZER = "optimizer"
GB = 1e9


@dataclass(frozen=True)
class Rates:
    """What a card does per second."""

    matmul: float  # floating-point operations
    attention: float
    copy: float  # bytes read and written

    def seconds(self, operation: Operation) -> float:
        """Return the predicted seconds of one kernel."""
        rate = self.attention if operation.group == ATTENTION else self.matmul
        return max(operation.operations / rate, operation.size / self.copy)


@dataclass(frozen=True)
class Sum:
    """Totals of equal kernels."""

    count: float = 0.0
    operations: float = 0.0
    size: float = 0.0  # bytes
    seconds: float = 0.0

    def plus(self, other: "Sum", times: float = 1.0) -> "Sum":
        """Return the sum of both, with the other one multiplied by `times`."""
        return Sum(
            self.count + times * other.count,
            self.operations + times * other.operations,
            self.size + times * other.size,
            self.seconds + times * other.seconds,
        )


Key = tuple[str, str, str, str]  # phase, group, name, line
Sums = Mapping[Key, Sum]
Run = Callable[[Counts], list[Operation]]  # a step with so many blocks in each list


def summed(operations: Iterable[Operation], rates: Rates) -> Sums:
    """Add up kernels of the same operator and line."""
    sums: dict[Key, Sum] = {}
    for one in operations:
        key = (one.phase, one.group, one.name, one.line)
        sums[key] = sums.get(key, Sum()).plus(Sum(1, one.operations, one.size, rates.seconds(one)))
    return sums


def combined(first: Sums, second: Sums, times: float) -> dict[Key, Sum]:
    """Return the first sums plus the second ones multiplied by `times`."""
    keys = {**first, **second}
    return {key: first.get(key, Sum()).plus(second.get(key, Sum()), times) for key in keys}


@dataclass(frozen=True)
class Traffic:
    """A step's kernels."""

    blocks: Mapping[str, Sums]  # what one more block of each list adds
    step: Sums
    counts: Mapping[str, int]
    inputs: Mapping[str, int]  # bytes of the tokens that a block of each list gets


def traffic_of(
    run: Run, counts: Mapping[str, int], inputs: Mapping[str, int], rates: Rates, merge: bool
) -> Traffic:
    """Run a step with few blocks, and with one more of each list."""
    few = tuple(min(count, MIN) for count in counts.values())

    def measured(numbers: Counts) -> Sums:
        operations = run(numbers)
        return summed(fused(operations) if merge else operations, rates)

    run(few)  # makes what later steps only read, such as the table of positions
    base, blocks = measured(few), dict[str, Sums]()
    step = dict(base)
    for index, (name, count) in enumerate(counts.items()):
        if count > few[index]:
            more = measured((*few[:index], few[index] + 1, *few[index + 1 :]))
            blocks[name] = {
                key: each for key, each in combined(more, base, -1).items() if each.count or each.size
            }
            step = combined(step, blocks[name], count - few[index])
    return Traffic(blocks, step, counts, inputs)


def count_training(family: Any, options: Any, batch: Any, rates: Rates, merge: bool = False) -> Traffic:
    """Count a step of `training_loss`, its backward pass, clipping and the optimizer.

    `batch` is a NoisyBatch.
    """
    from training.experts import choose_placement
    from training.planning.rehearsal import empty_like_on_device, set_up_trainable

    choice = replace(options.speed.attention.choice, mode="sdpa")  # stands in for all kernels
    placement = replace(choose_placement(options, META, options.speed.fp8.quantization), attention=choice)
    with quiet():
        dit = family.load_dit(placement)
    with quiet(), dry_run() as ledger, torch.autograd.set_detect_anomaly(True, check_nan=False):
        rehearsal = set_up_trainable(family, options, dit, ledger)
        rehearsal.rehearse_optimizer()  # makes the optimizer's states
        with Counting(ledger.device) as counting:
            rehearsal.rehearse_optimizer()
        of_optimizer = [replace(one, phase=OPTIMIZER) for one in counting.operations]
        on_device = batch.moved(lambda tensor: empty_like_on_device(tensor, ledger))

        def run(numbers: Counts) -> list[Operation]:
            with Counting(ledger.device) as counting:
                rehearsal.measure_passes(on_device, numbers)
            return counting.operations

        counts = dict(zip(rehearsal.blocks, rehearsal.num_blocks, strict=True))
        found = traffic_of(run, counts, ledger.input_bytes, rates, merge)
    return replace(found, step=combined(found.step, summed(of_optimizer, rates), 1))


def count_denoising(
    family: Any, options: Any, prepared: Any, prompts: Any, inputs: Any, rates: Rates, merge: bool = False
) -> Traffic:
    """Count the passes of the network and the guidance of one step of generation."""
    from blissful_tuner.guidance import make_guidance
    from generation.denoise import SeededNoise, iterate_sections, on_device, predictor
    from generation.memory import heaviest_step
    from protocols.loading import Placement

    choice = replace(options.speed.attention.choice, mode="sdpa")
    with quiet():
        dit = family.load_dit(Placement(META, attention=choice, quantization=options.speed.fp8.quantization))
    dit.eval().requires_grad_(False)
    blocks = family.dit.blocks(dit)
    with quiet(), dry_run() as ledger, torch.no_grad():
        allocate_empty_weights(dit, ledger)
        track_blocks(blocks, ledger)
        noise = SeededNoise(0, ledger.device)
        section = on_device(next(iterate_sections(family, prepared, prompts, inputs, noise)), ledger.device)
        guidance = make_guidance(prepared, options.guidance, family.experts)
        step = heaviest_step(prepared, options, family.experts, section.noise)

        def run(numbers: Counts) -> list[Operation]:
            truncate_blocks(dit, blocks, numbers, ledger)
            predict = predictor(family, lambda _: dit, step, options.splits_guidance, section.overrides)
            with Counting(ledger.device) as counting, ledger.reading_unknown_as_one():
                guidance(step, predict, section)
            return counting.operations

        counts = {name: len(each) for name, each in blocks.items()}
        return traffic_of(run, counts, ledger.input_bytes, rates, merge)


def traffic_of_row(row: Row, rates: Rates, merge: bool = False) -> Traffic:
    """Count a step of a row of benchmarks/gpu.py; of a generation, one step."""
    if row.model.family == "wan":  # as on a GPU: on a CPU the rows that pad a text are merged
        row = replace(row, text_tokens=512)
    with tempfile.TemporaryDirectory() as folder:
        path, high = lay_out(row, Path(folder))
        if row.kind == GENERATION:
            options, family = generation_family(row, path, high)
            return count_denoising(family, options, *random_request(row, family), rates, merge)
        options, family = training_family(row, path)
        return count_training(family, options, random_batch(row, family), rates, merge)


def table(sums: Sums, unit: float, rates: Rates) -> Iterator[str]:
    """Yield lines of a table by phase and group. `unit` is the bytes of the tokens at a block's entry."""
    yield "| phase | group | kernels | TFLOP | GB | token tensors | ms |"
    yield "|---|---|---|---|---|---|---|"
    for phase in dict.fromkeys((FORWARD, AGAIN, BACKWARD, OPTIMIZER)):
        for group in GROUPS:
            yield from row_of(f"{phase} | {group}", chosen(sums, phase, group), unit)
    for group in GROUPS:
        yield from row_of(f"all | {group}", chosen(sums, None, group), unit)
    full = chosen(sums)
    yield from row_of("all | all", full, unit)
    useful = sum(chosen(sums, None, group).operations for group in (ATTENTION, PRODUCT))
    if full.seconds:
        share = useful / full.seconds / rates.matmul
        yield f"\nPredicted: {full.seconds:.4f} s, {100 * share:.1f} % of the matrix product's rate\n"


def chosen(sums: Sums, phase: str | None = None, group: str | None = None) -> Sum:
    """Add up the kernels of a phase and a group; None means all."""
    total = Sum()
    for (its_phase, its_group, *_), each in sums.items():
        if phase in {None, its_phase} and group in {None, its_group}:
            total = total.plus(each)
    return total


def row_of(name: str, total: Sum, unit: float) -> Iterator[str]:
    """Yield the line of a total, unless it is empty."""
    if total.count:
        yield (
            f"| {name} | {total.count:.0f} | {total.operations / 1e12:.2f} | {total.size / GB:.2f} | "
            f"{total.size / unit:.1f} | {1e3 * total.seconds:.2f} |"
        )


def longest(sums: Sums, unit: float, maximum: int) -> Iterator[str]:
    """Yield the kernels other than large products and attention, those with most bytes first."""
    yield "| phase | operator | times | GB | token tensors | line |"
    yield "|---|---|---|---|---|---|"
    passes = [item for item in sums.items() if item[0][1] not in {ATTENTION, PRODUCT}]
    for (phase, _, name, line), each in sorted(passes, key=lambda item: -item[1].size)[:maximum]:
        sizes = f"{each.size / GB:.2f} | {each.size / unit:.2f}"
        yield f"| {phase} | {name} | {each.count:.0f} | {sizes} | {line} |"


def report(found: Traffic, rates: Rates, maximum: int) -> Iterator[str]:
    """Yield all lines that are printed for a row."""
    for name, sums in found.blocks.items():
        yield f"### One of {found.counts[name]} blocks of `{name}`: tokens {found.inputs[name] / GB:.3f} GB\n"
        yield from table(sums, found.inputs[name], rates)
        yield from longest(sums, found.inputs[name], maximum)
        yield ""
    yield "### Step\n"
    yield from table(found.step, max(found.inputs.values()), rates)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", nargs="+", default=["wan14b-bf16"], help="names of benchmarks/gpu.py; default: wan14b-bf16"
    )
    parser.add_argument("--fused", action="store_true", help="estimate what a compiler would merge")
    parser.add_argument("--most", type=int, default=30, help="number of passes that are listed; default 30")
    parser.add_argument("--matmul", type=float, default=790, help="assumed TFLOP/s of products; default 790")
    parser.add_argument(
        "--attention", type=float, default=600, help="assumed TFLOP/s of attention; default 600"
    )
    parser.add_argument("--copy", type=float, default=4.3, help="assumed TB/s read and written; default 4.3")
    return parser.parse_args(argv)


def main() -> None:
    """Print the tables of the selected rows."""
    args = parse()
    rates = Rates(args.matmul * 1e12, args.attention * 1e12, args.copy * 1e12)
    for row in choose(args.rows, ()):
        if row.kind in (*CACHING, LOADING):
            raise SystemExit(f"--rows {row.name}: only training and generation are counted")
        kind = "as if compiled, an estimate" if args.fused else "eager"
        print(f"## {row.name}: {row.model.name}, {row.size}, {row.about}. Counted {kind}\n")
        print("\n".join(report(traffic_of_row(row, rates, args.fused), rates, args.maximum)), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
