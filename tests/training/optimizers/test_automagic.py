"""--optimizer_type Automagic: a rate for each element by the signs of its updates, resumed to the bit."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from transformers.optimization import Adafactor

from modules.errors import OptionError
from tests.training.toy import same, train_toy, write_caches
from training.optimizers.automagic import Automagic, element_rates

AUTOMAGIC = ("--optimizer_type", "Automagic", "--learning_rate", 1e-4, "--optimizer_args", "lr_bump=1e-4")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rates_of(optimizer: Automagic, weight: Parameter) -> Tensor:
    return element_rates(optimizer.state[weight]["count"], optimizer.param_groups[0])


@pytest.mark.parametrize("shape", [(5,), (6, 4), (3, 2, 5)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_with_rates_that_cannot_change_it_is_adafactor(shape: tuple[int, ...], decay: float) -> None:
    """Adafactor's decay of means is 1 - step**decay_rate: here each step is its tenth, with a rate of -1."""
    ours, theirs = Parameter(draw(*shape)), Parameter(draw(*shape))
    fixed: dict[str, Any] = {"lr": 1e-3, "min_lr": 1e-3, "max_lr": 1e-3, "weight_decay": decay, "beta2": 0.9}
    optimizer = Automagic([ours], **fixed)
    oracle = Adafactor(
        [theirs],
        lr=1e-3,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
        weight_decay=decay,
        decay_rate=-1.0,
    )
    means = {"exp_avg_sq": torch.zeros(shape)}
    if len(shape) > 1:
        rows, columns = torch.zeros(shape[:-1]), torch.zeros(*shape[:-2], shape[-1])
        means = {"exp_avg_sq_row": rows, "exp_avg_sq_col": columns}
    oracle.state[theirs] = {"RMS": 0, **means}
    for step in range(5):
        ours.grad = draw(*shape, seed=step + 1)
        theirs.grad = ours.grad.clone()
        oracle.state[theirs]["step"] = 9
        oracle.step()

        optimizer.step()

        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_rate_rises_while_signs_agree_and_falls_when_they_change() -> None:
    weight = Parameter(torch.zeros(3))
    optimizer = Automagic([weight], lr=1e-5, min_lr=7e-6, max_lr=1.3e-5, lr_bump=2e-6)
    signs = [(1, 1, -1), (1, -1, -1), (1, 1, 1), (1, -1, 1), (1, 1, 1)]
    expected = [(10, 10, 10), (12, 8, 12), (13, 7, 10), (13, 7, 12), (13, 7, 13)]
    for gradient, rates in zip(signs, expected, strict=True):
        weight.grad = torch.tensor(gradient, dtype=torch.float32)

        optimizer.step()

        torch.testing.assert_close(
            rates_of(optimizer, weight), 1e-6 * torch.tensor(rates, dtype=torch.float32)
        )


def test_the_schedule_multiplies_all_rates() -> None:
    weight = Parameter(torch.zeros(3))
    optimizer = Automagic([weight], lr=1e-5)
    weight.grad = torch.ones(3)
    optimizer.step()
    before = rates_of(optimizer, weight)
    optimizer.param_groups[0]["lr"] = 0.5e-5
    torch.testing.assert_close(rates_of(optimizer, weight), before / 2)


def test_it_finds_a_rate_that_learns() -> None:
    """A quadratic bowl, in which the rate at the start moves next to nothing in so many steps."""
    goal = 0.1 * draw(8, 8)
    errors = {}
    for max_lr in (1e-3, 1e-6):
        weight = Parameter(torch.zeros(8, 8))
        optimizer = Automagic([weight], lr=1e-6, lr_bump=1e-5, max_lr=max_lr)
        for _ in range(400):
            weight.grad = weight.detach() - goal
            optimizer.step()
        errors[max_lr] = float((weight.detach() - goal).square().mean() / goal.square().mean())
    assert errors[1e-3] < 0.01
    assert errors[1e-6] > 0.98


@pytest.mark.parametrize(
    "more",
    [(), ("--mixed_precision", "bf16", "--full_bf16"), ("--fused_backward_pass",)],
    ids=["lora", "bf16", "fused"],
)
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path, more: tuple[object, ...]) -> None:
    write_caches(tmp_path)
    words = (*AUTOMAGIC, *more, "--save_state", "--save_every_n_steps", 3)
    words += ("--max_grad_norm", 0) if "--fused_backward_pass" in more else ()
    whole = train_toy(tmp_path, *words, full_dit=bool(more))
    if more == ("--fused_backward_pass",):
        plain = [word for word in words if word not in more]
        assert same(whole, train_toy(tmp_path, *plain, "--output_dir", tmp_path / "plain", full_dit=True))

    state = tmp_path / "output" / "x-step00000003-state"
    resumed = train_toy(tmp_path, *words, "--resume", state, full_dit=bool(more))

    assert same(whole, resumed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--learning_rate", 1), "--optimizer_type automagic: the rate 1 is too high to start with"),
        (("--optimizer_args", "lr_bump=1e-12"), "lr_bump must be above 0 and at least"),
        (("--optimizer_args", "min_lr=1"), "min_lr must be above 0 and at most max_lr"),
        (("--optimizer_args", "bump=1"), "has no such argument"),
    ],
)
def test_a_wrong_argument_is_refused(tmp_path: Path, words: tuple[object, ...], message: str) -> None:
    write_caches(tmp_path)
    with pytest.raises(OptionError, match=message):
        train_toy(tmp_path, "--optimizer_type", "automagic", *words)


def test_a_mistyped_name_is_corrected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    write_caches(tmp_path)
    with pytest.raises(OptionError, match="Did you mean automagic"):
        train_toy(tmp_path, "--optimizer_type", "automagik")
