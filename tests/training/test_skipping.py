"""--skip_bad_steps and --skip_spikes: which steps are left out, and what a skipped step leaves alone."""

import contextlib
import json
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoints.writing import save_tensors
from dataset.batches.finding import find_items
from dataset.batches.order import BatchOrder
from dataset.batches.reading import read_batch
from dataset.config import load_dataset_config
from modules.errors import OptionError, UserError
from modules.flow.schedule import add_noise
from networks.adapter import make_network
from protocols.loading import Placement
from tests.commands import run_in_processes
from tests.run_pages import read_run_page
from tests.tiny.families import FAMILIES, TinyFamily
from tests.tiny.runs import make_project
from tests.training import toy
from training.data.feed import NoiseSampler
from training.features.skip import (
    BAD,
    FATAL,
    MAX_SPIKES,
    MIN_NORMS,
    SPIKE,
    TAKEN,
    WINDOW,
    SkipOptions,
    Skipping,
    SkipProgress,
)
from training.loop import take_step
from training.optimizers.stepping import StepAfterBackward
from training.reports.history import RunHistory, parse_row
from training.run import prepare_run
from training.saving.states import SavedState, read_state

Decide = Callable[[float, float, list[float]], bool]


def write_spike(folder: Path, index: int = 2) -> None:
    """Caches of five pictures, the latents of one far away from all others."""
    toy.write_caches(folder)
    path = folder / "cache" / f"clip{index}_0032x0032_toy.safetensors"
    save_tensors(path, {"latents_1x4x4_float32": torch.full((2, 1, 4, 4), 500.0)})


def train_by_hand(folder: Path, steps: int, decide: Decide) -> tuple[dict[str, Tensor], list[int]]:
    """Train with plain torch, AdamW at 1e-2 / step number; omit the steps that `decide` refuses.

    decide: given loss, norm and the norms of all taken steps. Returns the weights and the skipped steps.
    """
    options, family = toy.toy_options(folder), toy.ToyFamily()
    dit = family.load_dit(Placement(torch.device("cpu"))).requires_grad_(False)
    network = make_network(options.network, family.lora_module, dit, seed=3)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    order = BatchOrder(find_items(load_dataset_config(folder / "dataset.toml"), "toy", toy.LATENT).items, 3)
    norms: list[float] = []
    skipped = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)  # --lr_scheduler linear
        batch = read_batch(order.epoch(step // 5)[step % 5], toy.LATENT)
        drawn = NoiseSampler(options.timesteps, 3).add_noise(batch, step, step)
        latents = batch.tensor("latents") * toy.LATENT.scale
        noisy = add_noise(latents, drawn.noise, drawn.sigmas)
        velocity = dit(noisy, drawn.timesteps, batch.tensors["letters"])
        loss = ((velocity - (drawn.noise - latents)) ** 2).mean()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0))
        if decide(float(loss.detach()), norm, norms):
            optimizer.step()
            norms.append(norm)
        else:
            skipped.append(step + 1)
        optimizer.zero_grad()
    return network.module.state_dict(), skipped


def is_finite(loss: float, norm: float, norms: list[float]) -> bool:
    return math.isfinite(loss) and math.isfinite(norm)


def is_no_spike(loss: float, norm: float, norms: list[float]) -> bool:
    return len(norms) < 20 or norm <= 5 * statistics.median(norms[-100:])


def rows_of(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "output" / "x-history.jsonl").read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("option", "decide", "steps"),
    [(("--skip_bad_steps", 1), is_finite, 12), (("--skip_spikes", 5), is_no_spike, 40)],
)
def test_weights_are_those_of_plain_torch_without_these_steps(
    tmp_path: Path,
    option: tuple[object, ...],
    decide: Decide,
    steps: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if decide is is_finite:
        toy.write_caches(tmp_path, bad=2)
    else:
        write_spike(tmp_path)
    expected, skipped = train_by_hand(tmp_path, steps, decide)
    linear = "--lr_scheduler", "linear", "--max_train_steps", steps

    trained = toy.train_toy(tmp_path, *option, *linear, has_page=True)

    assert len(skipped) >= 2
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    lines = [text for text in caplog.messages if "is skipped" in text]
    assert [int(re.findall(r"Step (\d+) is skipped", line)[0]) for line in lines] == skipped
    assert all("Its items: clip2_0032x0032_toy" in line for line in lines)
    kind = "bad" if decide is is_finite else "spike"
    run_history = RunHistory.of(row for row in rows_of(tmp_path) if "session" not in row)
    assert run_history.skipped == dict.fromkeys(skipped, kind)
    page = read_run_page(tmp_path / "output")
    assert "Skipped steps" in page
    metadata = toy.metadata_of(tmp_path / "output" / "x.safetensors")
    assert metadata["ss_skipped_steps"] == str(len(skipped))
    assert metadata[f"ss_{str(option[0])[2:]}"] == ("1" if decide is is_finite else "5.0")
    assert parse_row(b'{"step": 1, "loss": null, "skipped": 5}\n') is not None


def test_more_bad_steps_in_a_row_than_allowed_end_the_run(tmp_path: Path) -> None:
    toy.write_caches(tmp_path, bad=2)
    words = "--gradient_accumulation_steps", 5  # so that each step has the damaged item

    with pytest.raises(UserError, match=r"step 3: the loss is .*clip2.* The 2 steps before it") as end:
        toy.train_toy(tmp_path, "--skip_bad_steps", 2, *words)
    with pytest.raises(UserError, match=r"step 1: .*\n.*--skip_bad_steps 3 leaves out") as today:
        toy.train_toy(tmp_path, *words)

    assert "--skip_bad_steps" not in str(end.value)
    assert today.value.exit_code == end.value.exit_code == 1


@pytest.mark.parametrize("option", [("--skip_bad_steps", 3), ("--skip_spikes", 100)])
def test_where_nothing_goes_wrong_the_options_change_no_bit(
    tmp_path: Path, option: tuple[object, ...]
) -> None:
    toy.write_caches(tmp_path)
    average = "--ema_decay", 0.9, "--max_train_steps", 30
    plain = toy.train_toy(tmp_path, *average)

    assert toy.same(plain, toy.train_toy(tmp_path, *average, *option))


def test_a_resumed_run_skips_the_same_steps_to_the_bit(tmp_path: Path) -> None:
    write_spike(tmp_path)
    words = ("--skip_spikes", 5, "--skip_bad_steps", 1, "--ema_decay", 0.9, "--max_train_steps", 40)
    words += ("--save_every_n_steps", 1, "--save_state", "--resume", "latest")
    full = toy.train_toy(tmp_path, *words)

    killed = toy.train_with_kills(tmp_path, *words, moments=(7, 26))

    assert toy.same(full, killed)
    states = []
    for name in ("output", "killed"):
        state = read_state(tmp_path / name / "x-state")
        assert isinstance(state, SavedState)
        states.append(state.progress)
    assert states[0].skipped == states[1].skipped > 0
    assert states[0].feature_state(SkipProgress).norms == states[1].feature_state(SkipProgress).norms
    assert len(states[0].feature_state(SkipProgress).norms[""]) == 40 - states[0].skipped


def test_a_skipped_step_changes_neither_weights_nor_average_nor_moments(tmp_path: Path) -> None:
    toy.write_caches(tmp_path, bad=2)
    options = toy.toy_options(tmp_path, "--skip_bad_steps", 1, "--ema_decay", 0.5, "--lr_scheduler", "linear")
    with (
        prepare_run(toy.ToyFamily(), options) as run,
        contextlib.closing(run.feed.start(0, 0)) as micro_batches,
    ):
        model = run.model
        assert model.average is not None
        for index in range(5):
            before = [parameter.clone() for parameter in run.parameters]
            average = [value.clone() for value in model.average.values]
            rate = model.schedule.get_last_lr()
            is_bad = "clip2" in run.feed.order.epoch(0)[index][0].key
            take_step(run, range(index, index + 1), micro_batches)
            run.progress.step += 1

            unchanged = all(map(torch.equal, before, run.parameters))
            assert unchanged == all(map(torch.equal, average, model.average.values)) == is_bad
            assert model.schedule.get_last_lr() != rate
            assert all(parameter.grad is None for parameter in run.parameters)
        assert model.average.steps == 4
        assert {int(state["step"]) for state in model.optimizer.state.values()} == {4}


@pytest.mark.parametrize("bad", [True, False])
def test_the_scale_of_fp16_stays_as_it_is(tmp_path: Path, bad: bool) -> None:
    """A loss that is not finite is skipped and counted; a scale that is too high is the scaler's matter."""
    toy.write_caches(tmp_path, count=1, bad=0 if bad else None)
    options = toy.toy_options(tmp_path, "--skip_bad_steps", 1)
    scale = 2.0**10 if bad else float("inf")
    with prepare_run(toy.ToyFamily(), options) as run:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        assert isinstance(run.model.stepping, StepAfterBackward)
        stepping = replace(run.model.stepping, scaler=scaler)
        run = replace(run, model=replace(run.model, scaler=scaler, stepping=stepping))
        with contextlib.closing(run.feed.start(0, 0)) as micro_batches:
            take_step(run, range(1), micro_batches)
            in_a_row = run.progress.feature_state(SkipProgress).bad_in_a_row
            assert in_a_row == run.progress.skipped == int(bad)
            assert scaler.get_scale() == scale
            run.progress.step += 1
            if bad:
                with pytest.raises(UserError, match="step 2: the loss is"):
                    take_step(run, range(1), micro_batches)


def test_the_median_is_of_the_last_taken_steps_of_a_kind() -> None:
    progress = SkipProgress()
    skipping = Skipping(SkipOptions(skip_spikes=3.0), progress, has_scaler=False)
    for number in range(MIN_NORMS):
        assert skipping.judge(1.0, 1000.0, "low") == TAKEN
        skipping.record(TAKEN, float(number), "low")
    assert skipping.limit("low") == 3 * statistics.median(range(MIN_NORMS))
    assert skipping.limit("high") is None
    assert skipping.judge(1.0, 28.4, "low") == TAKEN
    assert skipping.judge(1.0, 28.6, "low") == SPIKE
    assert skipping.judge(1.0, math.inf, "low") == FATAL  # as without the option
    for number in range(300):
        skipping.record(TAKEN, float(number), "low")
    assert progress.norms["low"] == [float(number) for number in range(300 - WINDOW, 300)]


def test_norms_of_two_transformers_are_not_compared(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    family = toy.ToyFamily(experts=toy.TWO_EXPERTS)

    toy.train_toy(tmp_path, "--skip_spikes", 5, "--max_train_steps", 30, "--save_state", family=family)

    state = read_state(tmp_path / "output" / "x-state")
    assert isinstance(state, SavedState)
    counts = {kind: len(norms) for kind, norms in state.progress.feature_state(SkipProgress).norms.items()}
    assert counts.keys() == {"low_noise", "high_noise"}
    assert sum(counts.values()) == 30 - state.progress.skipped


def test_so_many_spikes_in_a_row_are_a_new_level() -> None:
    progress = SkipProgress()
    skipping = Skipping(SkipOptions(skip_spikes=3.0, skip_bad_steps=1), progress, has_scaler=False)
    for _ in range(MIN_NORMS):
        skipping.record(TAKEN, 1.0, "")
    levels = [skipping.record(skipping.judge(1.0, 10.0, ""), 10.0, "") for _ in range(MAX_SPIKES)]
    assert levels == [*[False] * (MAX_SPIKES - 1), True]
    assert skipping.judge(1.0, 10.0, "") == TAKEN
    assert skipping.judge(math.nan, 1.0, "") == BAD


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--skip_bad_steps", 0), "--skip_bad_steps 0: use a number"),
        (("--skip_spikes", 1), "--skip_spikes 1: use a number above 1"),
        (("--skip_spikes", "nan"), "--skip_spikes nan: use a number"),
    ],
)
def test_values_without_sense_are_refused(tmp_path: Path, words: tuple[object, ...], message: str) -> None:
    with pytest.raises(OptionError) as rejection:
        toy.toy_options(tmp_path, *words)
    assert message in str(rejection.value)


@pytest.mark.parametrize("option", [("--skip_bad_steps", 1), ("--skip_spikes", 5)])
def test_weights_that_are_stepped_in_the_backward_pass_cannot_be_left_out(
    tmp_path: Path, option: tuple[object, ...]
) -> None:
    with pytest.raises(OptionError, match=rf"{option[0]} with --fused_backward_pass: weights are stepped"):
        toy.toy_options(tmp_path, *option, "--fused_backward_pass", full_dit=True)


def test_a_whole_model_skips_too(tmp_path: Path) -> None:
    toy.write_caches(tmp_path, bad=2)
    words = "--skip_bad_steps", 1, "--mixed_precision", "bf16", "--full_bf16"

    trained = toy.train_toy(tmp_path, *words, full_dit=True)

    assert all(tensor.isfinite().all() for tensor in trained.values())
    assert toy.metadata_of(tmp_path / "output" / "x.safetensors")["ss_skipped_steps"] == "2"


def test_several_processes_decide_alike_and_one_names_the_items(tmp_path: Path) -> None:
    toy.write_caches(tmp_path, bad=2)
    words = "--skip_bad_steps", 2, "--max_train_steps", 6
    alone = toy.train_toy(tmp_path, *words, "--gradient_accumulation_steps", 2, "--output_name", "one")

    script = Path(__file__).with_name("train_toy.py")
    output = "--output_dir", tmp_path / "two"
    done = run_in_processes(2, str(script), tmp_path, *words, *output, folder=tmp_path)

    for name, tensor in load_file(tmp_path / "two" / "x.safetensors").items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-5, atol=1e-6)
    lines = [line for one in done for line in one.stderr.splitlines() if "is skipped" in line]
    assert len(lines) == 2
    assert all("clip2" in line for line in lines)


@pytest.mark.parametrize("family", [FAMILIES[0], *[one for one in FAMILIES if "ltx" in one.name][:1]])
def test_a_real_script_takes_both_options(tmp_path: Path, family: TinyFamily) -> None:
    project = make_project(family, tmp_path)
    plain = project.train("plain")
    skipping = project.train("skipping", "--skip_bad_steps", 1, "--skip_spikes", 5)
    assert toy.same(plain, skipping)
