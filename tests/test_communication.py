"""What processes really send in a run is what the arithmetic of the plan says (docs/speed.md)."""

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator

import pytest
import torch

from modules.families import FAMILIES
from modules.planning.communication import Division, Work, WorkCounter, gathered_bytes
from networks.options import NetworkOptions
from tests.commands import ROOT, run_in_processes, run_script
from tests.test_shard_base import RUN, SIZE, USUAL, Shared, with_slow
from tests.tiny.wan_dit import tiny_state, write_dit
from tests.training.planning.test_rehearsal import noisy
from training.options import read_training
from training.planning.memory import predict
from training.planning.several_cards import count_work

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are copies of one with libraries")

# collective -> bytes of the tensor that it makes, sums or deals out, of all calls of a run
COUNTED = """import collections, json, os, runpy, sys
sys.path.insert(0, {root!r})
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
NAMES = {{"_allgather_base_": "all-gather", "allreduce_": "all-reduce", "alltoall_base_": "all-to-all",
    "all_gather_into_tensor": "all-gather", "all_reduce": "all-reduce", "all_to_all_single": "all-to-all"}}
sent = collections.Counter()
class Counting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {{}}))
        space, _, name = func.name().partition("::")
        if space in ("c10d", "_c10d_functional"):
            made = tree_leaves(args[0] if space == "c10d" else result)
            sent[NAMES.get(name.partition(".")[0], name)] += sum(tensor.nbytes for tensor in made)
        return result
try:
    with Counting():
        runpy.run_path(os.path.join({root!r}, {script!r}), run_name="__main__")
finally:
    with open("sent%s.json" % os.environ["RANK"], "w") as file:
        json.dump(sent, file)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    made = Shared(USUAL, tmp_path_factory.mktemp("sent"))
    write_dit(made.folder / "model", tiny_state("t2v", dim=256, num_layers=4), name="dit")  # of two heads
    script = COUNTED.format(root=str(ROOT), script=made.family.train[0])
    (made.folder / "counted.py").write_text(script, encoding="utf-8")
    with contextlib.chdir(made.folder):
        yield made


CHECKPOINTED = ("--gradient_checkpointing",)
TWICE = ("--gradient_accumulation_steps", "2")
ROWS = {
    "whole models": (Division(2), TWICE),
    "shared blocks": (Division(2, shards=True), ("--shard_base", *CHECKPOINTED, *TWICE)),
    "shared blocks in fp8": (Division(2, shards=True), ("--shard_base", "--fp8_base", "--fp8_scaled")),
    "shared tokens": (Division(2, context=2), ("--context_parallel", "2")),
    "both": (Division(2, True, 2), ("--shard_base", "--context_parallel", "2", *CHECKPOINTED, *TWICE)),
}


def count_traffic(work: Work, division: Division) -> dict[str, int]:
    """Bytes of a step by collective, in one process, by the terms that `estimate_time` has."""
    processes, context, count = division.processes, division.context, work.micro_batches
    gathered = work.passes * gathered_bytes(work.blocks, processes) if division.shards else 0
    joined, attended = (work.joined, work.attended // context) if context > 1 else (0, 0)
    return {
        "all-gather": count * (gathered + joined),
        "all-reduce": work.gradients if processes > 1 else 0,
        "all-to-all": count * attended,
    }


# of the others, `both` sends everything
@pytest.mark.parametrize("row", with_slow(ROWS, {"shared blocks in fp8", "both"}))
def test_a_run_sends_what_the_plan_counts(project: Shared, row: str) -> None:
    division, words = ROWS[row]
    command = (*project.family.train, *RUN, "--output_dir", row, *words, "--max_train_steps", "2")
    entry, counter = FAMILIES["wan"], WorkCounter()
    options, own, _ = read_training(None, entry.options_record("Training"), command[1:], NetworkOptions)
    # as the clips of the project, 5 frames of 32 x 32; a text of as many tokens would pass for one of them
    batch = noisy({"latents": torch.zeros(1, 16, 2, 4, 4), "t5": [torch.zeros(20, 32)]})
    family, cpu = entry.make_family("training", own), torch.device("cpu")
    prediction = predict(family, options, batch, cpu, watch=counter.watch)
    expected = count_traffic(count_work(prediction, counter), division)

    run_in_processes(
        division.processes, str(project.folder / "counted.py"), *command[1:], folder=project.folder
    )

    for rank in range(division.processes):
        sent = json.loads((project.folder / f"sent{rank}.json").read_text(encoding="utf-8"))
        assert {name: sent.get(name, 0) for name in expected} == {
            name: 2 * size for name, size in expected.items()
        }
        # at the start and the end; and what sends nothing
        others = {"broadcast_", "barrier", "wait_tensor", "_wrap_tensor_autograd"}
        assert set(sent) - set(expected) <= others


@pytest.mark.parametrize(
    ("kind", "launcher", "more"),
    [
        ("train", "accelerate launch --multi_gpu --num_processes 2", (*RUN, "--output_dir", "planned")),
        ("generate", "python", (*SIZE, "--prompt", "a cat", "--save_path", "planned")),
    ],
)
def test_a_plan_ends_with_the_command_of_a_way_that_fits(
    project: Shared, kind: str, launcher: str, more: tuple[str, ...]
) -> None:
    words = [str(word) for word in (*getattr(project.family, kind), *more)]

    done = run_script(*words, "--plan", "2x24", folder=project.folder)

    *_, title, command = done.stdout.rstrip().splitlines()
    assert title.startswith("The cheapest that fits")
    typed = [word.removeprefix(f"{ROOT}/") for word in shlex.split(command)]
    assert typed == [*launcher.split(), *words]
    assert done.stdout.count("  fits  ") == 4  # the transformer has two heads
    assert not (project.folder / "planned").exists()
