"""Compiled blocks of MiniMax-H3, by command: numbers of uncompiled ones, few compilations for all lengths.

Dynamo captures the whole graph; PyTorch's own kernels run it.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.utils import counters

from tests.faults.messages import succeed_here
from tests.minimax_h3.caches import random_clip
from tests.minimax_h3.test_generation import SCRIPT
from tests.minimax_h3.test_training import Project
from tests.minimax_h3.test_training import project as project
from tests.tiny.minimax_h3 import TinyH3, write_tiny_h3

COMPILED = ["--compile", "--compile_backend", "eager", "--compile_fullgraph"]
SWAPPED = ["--blocks_to_swap", "1"]
LINES = "a cat --f 22\na dog in the snow --f 39 --d 4\nrain --f 56\na bird --f 22 --d 5\n"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_compiled")]


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """As a share of the largest number of all."""
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    return max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items()) / largest


@pytest.mark.parametrize("more", [[], SWAPPED], ids=["whole", "swapped"])
def test_clips_of_several_lengths_are_made_by_two_compilations(tmp_path: Path, more: list[str]) -> None:
    """The first is for one length, the second for all."""
    files: TinyH3 = write_tiny_h3(tmp_path / "model")
    (tmp_path / "lines.txt").write_text(LINES, encoding="utf-8")
    fixed = ["--from_file", "lines.txt", "--video_size", "32", "64", "--infer_steps", "2", "--seed", "3"]
    fixed += ["--allow_experimental_duration", "--output_type", "latent", "--device", "cpu", *more]
    made = {}
    for name, words in (("plain", []), ("compiled", [*COMPILED, "--compile_dynamic", "auto"])):
        succeed_here(SCRIPT, *files.words, *fixed, *words, "--save_path", name, folder=tmp_path)
        paths = sorted(
            (tmp_path / name).glob("*_latent.safetensors"), key=lambda path: path.stat().st_mtime_ns
        )
        made[name] = [load_file(path) for path in paths]

    assert counters["stats"]["unique_graphs"] == 2
    assert len(made["compiled"]) == 4
    for compiled, plain in zip(made["compiled"], made["plain"], strict=True):
        assert largest_error(compiled, plain) < 1e-5


@pytest.mark.parametrize("more", [[], SWAPPED], ids=["whole", "swapped"])
def test_clips_of_several_lengths_are_learned_without_compiling_in_each_step(
    project: Project, more: list[str]
) -> None:
    project.cache([random_clip(seed, rows=rows) for seed, rows in ((1, 5), (2, 7), (3, 12), (4, 9))])
    run = ["--output_dir", "out", "--seed", 5, "--max_data_loader_n_workers", 0, "--optimizer_type", "SGD"]
    run += ["--learning_rate", 1, "--max_grad_norm", 0, "--gradient_checkpointing", *more]
    project.train(*run, "--max_train_steps", 8, "--output_name", "plain")
    counts = []
    for steps in (4, 8):
        torch._dynamo.reset()
        counters.clear()
        name = f"compiled {steps}"
        project.train(*run, "--max_train_steps", steps, "--output_name", name, *COMPILED)
        counts.append(counters["stats"]["unique_graphs"])

    assert counts[0] == counts[1] <= 4  # the first block has tokens without a gradient
    assert largest_error(project.saved("compiled 8"), project.saved("plain")) < 1e-4
