"""Runs whose processes share the passes of a step, from the command lines of the families: their latents are
those of one process that runs the passes one after the other, to the bit.
"""

import sys
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.commands import ROOT, run_in_processes
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.test_context_parallel import Wide
from tests.test_shard_base import BOTH, DEFAULT, OTHERS, SIZE, TEACACHE, Shared, generate, with_slow
from tests.tiny.wan import write_tiny_wan

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are copies of one with libraries")

PASSES, PARTS = ("--cfg_parallel",), ("--cfg_parallel", "--shard_base")
PROMPT = ("--prompt", "a cat", "--negative_prompt", "dull")
THIRD = (*PROMPT, "--slg_mode", "original", "--slg_layers", "1")
MAGCACHE = ("--magcache_mag_ratios", *(["1"] * 6), "--infer_steps", "6")
WAYS = {  # processes, how they share, what they make
    "two passes": (2, PASSES, PROMPT),
    "third pass": (2, PASSES, (*THIRD, "--slg_end", "0.7")),
    "three processes": (3, PASSES, THIRD),
    "parts": (2, PARTS, PROMPT),
    "parts, third pass": (2, PARTS, THIRD),
    "parts, weakened negative": (2, PARTS, (*PROMPT, "--slg_mode", "uncond", "--slg_layers", "1")),
    "parts, blank": (2, PARTS, (*PROMPT, "--slg_mode", "uncond", "--slg_layers", "1", "--perp_neg", "1.5")),
    "more parts than passes": (3, PARTS, PROMPT),
    "file": (2, PASSES, ("--from_file", "prompts.txt", "--output_type", "both")),
    "some steps, teacache": (2, PASSES, (*PROMPT, "--cfg_schedule", "2-3", *TEACACHE)),
    "magcache": (2, PASSES, (*PROMPT, *MAGCACHE)),
    "attention guidance": (2, PASSES, (*PROMPT, "--nag_scale", "5", "--nag_prompt", "a dog")),
    "zero star": (2, PASSES, (*PROMPT, "--cfgzerostar_scaling", "--cfgzerostar_init_steps", "1")),
    "fp8": (2, PASSES, (*PROMPT, "--fp8_scaled")),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    return Shared(DEFAULT, tmp_path_factory.mktemp("passes on two cards"), trains=False)


@pytest.mark.slow_cases("parts, third pass", "third pass")
@pytest.mark.parametrize("way", with_slow(WAYS, {"two passes", "third pass", "parts, third pass"}))
def test_a_generation_is_that_of_one_process(project: Shared, way: str) -> None:
    processes, by, words = WAYS[way]
    expected = generate(project, f"{way} alone", 1, *words)

    found = generate(project, f"{way} shared", processes, *words, by=by)

    assert len(found) == len(expected) > 0
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.slow
def test_each_process_runs_and_remembers_its_own_passes(project: Shared) -> None:
    """Of three passes the first process has two, and its step cache counts them."""
    command = (*project.family.generate, *SIZE, *THIRD, *TEACACHE, *PASSES, "--output_type", "latent")

    first, _ = run_in_processes(
        2, *command, "--slg_end", "1", "--save_path", "counted", folder=project.folder
    )

    assert "of 12 passes" in first.stderr


MORE = {"hunyuan_image": ("--apg_start_step_general", "0")}  # its own guidance from the second step on


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_family_shares_its_passes(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    project = Shared(name, tmp_path_factory.mktemp("passes on two cards"), trains=False)
    words = ("--prompt", "a cat", *MORE.get(name, ()))
    is_batch = "joins_guidance=True" in (ROOT / project.family.generate[0]).read_text(encoding="utf-8")
    (expected,) = generate(project, "alone", 1, *words, *(["--split_uncond"] if is_batch else []))

    (found,) = generate(project, "shared", 2, *words, by=PASSES)

    assert torch.equal(found, expected)
    if is_batch:
        torch.testing.assert_close(found, *generate(project, "batch", 1, *words), atol=2e-5, rtol=0)


@pytest.mark.slow
def test_each_process_has_both_experts(project: Shared) -> None:
    models = write_tiny_wan(project.folder / "experts", experts=2).models
    task = ("--task", "t2v-A14B", "--flow_shift", "5", "--video_length", "5")
    family = replace(project.family, generate=["wan_generate_video.py", *models, *task])
    pair = copy(project)
    pair.family = family

    (expected,), (found,) = (
        generate(pair, f"experts {count}", count, *PROMPT, by=PASSES) for count in (1, 2)
    )

    assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--shard_base",), TEACACHE], ids=["whole", "parts", "teacache"])
def test_processes_share_passes_and_tokens(tmp_path: Path, more: tuple[str, ...]) -> None:
    """Of four processes each pass has two, which share its tokens."""
    project = Wide(DEFAULT, tmp_path)
    words = (*PROMPT, *(word for word in more if word != "--shard_base"))
    (expected,) = generate(project, "alone", 1, *words)

    (found,) = generate(project, "shared", 4, *words, by=(*PASSES, "--context_parallel", "2", *more))

    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.slow
def test_a_run_says_if_there_is_nothing_to_share(project: Shared) -> None:
    command = (*project.family.generate, *SIZE, "--prompt", "a cat", *PASSES, "--output_type", "latent")

    alone = succeed_here(*command, "--save_path", "nothing", folder=project.folder)
    first, _ = run_in_processes(
        2, *command, "--save_path", "nothing", "--guidance_scale", "1", folder=project.folder
    )

    assert "--cfg_parallel has no effect with one process" in alone
    assert "--cfg_parallel: the largest number of passes in a step is 1" in first.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--sheet", "seed=1,2", *PASSES), "--sheet and --cfg_parallel"),
        (("--sheet", "seed=1,2", "--context_parallel", "2"), "--sheet and --context_parallel 2"),
        (("--post", "upscaler model=x", "--shard_base"), "--post and --shard_base"),
        (("--magcache_calibration", *PASSES), "calibrated by one process"),
        (
            (*PARTS, *TEACACHE),
            "--cfg_parallel and --shard_base cannot be used together with a step cache",
        ),
        (("--shard_base", "--lazy_loading", *BOTH), "--lazy_loading and --shard_base"),
        ((*PASSES, "--context_parallel", "3"), "--context_parallel 3: 2 processes"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(
    project: Shared, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], named: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = (*project.family.generate, *SIZE, "--prompt", "x", "--save_path", "refused")

    assert_one_message(*run_here(*command, *words, folder=project.folder), named)
