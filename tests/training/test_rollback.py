"""--rollback_on_spike: a run whose loss breaks away continues from a saved state, at a smaller rate."""

import logging
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from modules.errors import OptionError, UserError
from tests.training.toy import same, train_toy, write_caches
from training.features.rollback import BEFORE, RECENT, is_spike
from training.reports.history import RunHistory, history_path, read_history, read_session
from training.reports.item_losses import read_draws

STATES = ("--save_state", "--save_every_n_steps", 10, "--max_train_steps", 120)
# a rate that rises until the weights break away
RISING = ("--learning_rate", 1, "--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", 100)
RISING += ("--max_grad_norm", 0, *STATES)
BACK = ("--rollback_on_spike", 1.5)


def history_of(folder: Path) -> RunHistory:
    path = history_path(folder / "output", "x")
    session = read_session(path)
    assert session is not None
    return read_history(path, session)


def texts_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def test_a_spike_is_a_mean_loss_above_those_before() -> None:
    calm = [1.0] * BEFORE
    assert not is_spike([*calm, *[1.9] * RECENT], 2)
    assert is_spike([*calm, *[2.1] * RECENT], 2)
    assert not is_spike([1.0] * (RECENT - 1) + [9.0] * RECENT, 2)
    assert not is_spike([*calm, *[1.0] * (RECENT - 1), 15.0], 2)  # a single step is none


def test_the_run_goes_back_at_most_so_often_and_says_so(tmp_path: Path) -> None:
    write_caches(tmp_path)

    train_toy(tmp_path, *RISING, *BACK, "--rollback_times", 2, "--item_losses", has_page=True)

    history = history_of(tmp_path)
    told = [(step, text) for step, text in history.notes if "continues from here" in text]
    assert [step for step, _ in told] == [30, 40]
    assert ["(1 of at most 2 times)" in told[0][1], "(2 of at most 2 times)" in told[1][1]] == [True, True]
    # 0.3 and 0.4 by the curve, halved once and twice
    assert [text.rpartition("rate ")[2] for _, text in told] == ["0.15", "0.1"]
    assert history.rates["lr/unet"][120] == 0.25
    assert any("does not again" in text for _, text in history.notes)
    assert sorted(history.loss) == list(range(1, 121))
    draws = read_draws(tmp_path / "output", "x")
    assert sorted(draw.step for draw in draws) == list(range(1, 121))
    assert texts_of(tmp_path / "output" / "x.safetensors")["ss_rolled_back"] == "2"
    assert "ss_rolled_back" not in texts_of(tmp_path / "output" / "x-step00000030.safetensors")
    moved = [path.name for folder in (tmp_path / "output").glob("x.before-*") for path in folder.iterdir()]
    assert sorted(moved) == [f"x-step{step:08d}-state" for step in (40, 50, 50, 60)]


@pytest.mark.parametrize("more", [(), ("--ema_decay", 0.9)], ids=["", "ema"])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path, more: tuple[object, ...]) -> None:
    """After the first return, and from the state that it returns to: then the spike comes again."""
    write_caches(tmp_path)
    output = tmp_path / "output"
    words = (*RISING, *BACK, *more)
    whole = train_toy(tmp_path, *words)
    averages = load_file(output / "x-ema.safetensors") if more else {}
    kept = {step: output / f"x-step{step:08d}-state" for step in (30, 70)}

    for state in kept.values():
        resumed = train_toy(tmp_path, *words, "--resume", state)

        assert same(whole, resumed)
        assert texts_of(output / "x.safetensors")["ss_rolled_back"] == "3"
        if more:
            assert same(averages, load_file(output / "x-ema.safetensors"))
    assert not same(whole, train_toy(tmp_path, *RISING, "--output_dir", tmp_path / "other"))


def test_without_a_spike_nothing_changes(tmp_path: Path) -> None:
    write_caches(tmp_path)
    plain = train_toy(tmp_path, *STATES)

    assert same(plain, train_toy(tmp_path, *STATES, "--rollback_on_spike", 5))
    assert "ss_rolled_back" not in texts_of(tmp_path / "output" / "x.safetensors")


def test_a_loss_that_is_nan_goes_back_too_and_ends_the_run_when_that_does_not_help(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_caches(tmp_path)
    caplog.set_level(logging.INFO)
    rules = ("--lr_scheduler", "piecewise_constant", "--lr_scheduler_args", "step_rules=1:34,1e38:36,1")

    with pytest.raises(UserError, match="step 36"):
        train_toy(tmp_path, *rules, *STATES, "--rollback_on_spike", 1e6, "--rollback_times", 1)

    assert "is nan (1 of at most 1 times). The run continues from here" in caplog.text
    assert "Continuing at step 10" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--save_every_n_steps", 10), "needs saved states"),
        (("--save_state",), "needs saved states"),
        (
            (*STATES, "--lr_scheduler_type", "CosineAnnealingLR", "--lr_scheduler_args", "T_max=9"),
            "which CosineAnnealingLR sets by itself",
        ),
    ],
)
def test_it_is_refused_without_what_it_needs(tmp_path: Path, words: tuple[object, ...], message: str) -> None:
    write_caches(tmp_path)
    with pytest.raises(OptionError, match=message):
        train_toy(tmp_path, *BACK, *words)
