"""Runs whose processes share the passes of a step, from the command lines of the families: their latents are
those of one process that runs the passes one after the other, to the bit.
"""

import sys

import pytest
import torch

from tests.commands import run_in_processes
from tests.faults.messages import succeed_here
from tests.test_shard_base import OTHERS, SIZE, TEACACHE, USUAL, Shared, generate, with_slow

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are copies of one with libraries")

PROMPT = ("--prompt", "a cat", "--negative_prompt", "dull")
THIRD = (*PROMPT, "--slg_mode", "original", "--slg_layers", "1", "--slg_end", "0.7")
PASSES, ALL = ("--cfg_parallel",), ("--cfg_parallel", "--shard_base")
RATIOS = ("--magcache_mag_ratios", *(["1"] * 6), "--magcache_retention_ratio", "0.2", "--infer_steps", "6")
WAYS = {  # processes, how they share, what they make
    "two passes": (2, PASSES, PROMPT),
    "third pass": (2, PASSES, THIRD),
    "a process for each of three passes": (3, PASSES, THIRD),
    "parts": (2, ALL, PROMPT),
    "parts, third pass": (2, ALL, THIRD),
    "more parts than passes": (3, ALL, PROMPT),
    "weakened negative": (
        2,
        ALL,
        (*PROMPT, "--slg_mode", "uncond", "--slg_layers", "1", "--perp_neg", "1.5"),
    ),
    "file": (2, PASSES, ("--from_file", "prompts.txt", "--output_type", "both")),
    "some steps": (2, PASSES, (*PROMPT, "--cfg_schedule", "2-3", *TEACACHE)),
    "attention guidance": (2, PASSES, (*PROMPT, "--nag_scale", "5", "--nag_prompt", "a dog")),
    "zero star": (2, PASSES, (*PROMPT, "--cfgzerostar_scaling", "--cfgzerostar_init_steps", "1")),
    "magcache": (2, PASSES, (*PROMPT, *RATIOS)),
    "fp8": (2, PASSES, (*PROMPT, "--fp8_scaled")),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    return Shared(USUAL, tmp_path_factory.mktemp("passes on two cards"), trains=False)


@pytest.mark.parametrize("way", with_slow(WAYS, {"two passes", "parts, third pass"}))
def test_a_generation_is_that_of_one_process(project: Shared, way: str) -> None:
    processes, by, words = WAYS[way]
    expected = generate(project, f"{way} alone", 1, *words)

    found = generate(project, f"{way} shared", processes, *words, by=by)

    assert len(found) == len(expected) > 0
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_each_process_runs_and_remembers_its_own_passes(project: Shared) -> None:
    """Of three passes the first process has two, and its step cache counts them."""
    words = (*THIRD, "--slg_end", "1", *TEACACHE)
    expected = generate(project, "counted alone", 1, *words)
    command = (*project.family.generate, *SIZE, "--output_type", "latent", *words, "--cfg_parallel")

    first, _ = run_in_processes(2, *command, "--save_path", "counted", folder=project.folder)

    assert "of 12 passes" in first.stderr
