"""Optimizers by name and by import path."""

import importlib.util
import logging
from typing import Any

import pytest
import torch
from torch import nn

from modules.errors import OptionError
from training.learning_options import OptimizerOptions
from training.optimizers.optimizer import find_optimizer, make_optimizer


def options(name: str = "", *arguments: str, rate: float = 0.05) -> OptimizerOptions:
    return OptimizerOptions.usual(optimizer_type=name, optimizer_args=arguments or None, learning_rate=rate)


def groups(parameter: nn.Parameter, rate: float = 0.05) -> list[dict[str, Any]]:
    return [{"params": [parameter], "lr": rate}]


def test_an_optimizer_is_named_in_any_case_or_by_its_path() -> None:
    for name in ("", "AdamW", "adamw", "torch.optim.AdamW"):
        assert find_optimizer(name) is torch.optim.AdamW
    assert find_optimizer("nadam") is torch.optim.NAdam
    assert find_optimizer(f"{__name__}.Descent") is Descent


class Descent(torch.optim.SGD):
    """A class that only an import path finds."""


def test_the_description_is_the_class_with_its_arguments() -> None:
    _, described = make_optimizer(
        options("AdamW", "betas=0.9,0.95", "weight_decay=0.1"), groups(nn.Parameter(torch.ones(1)))
    )
    _, plain = make_optimizer(options(), groups(nn.Parameter(torch.ones(1))))

    assert described == "torch.optim.adamw.AdamW(betas=(0.9, 0.95),weight_decay=0.1)"
    assert plain == "torch.optim.adamw.AdamW"


def test_arguments_reach_the_optimizer_and_groups_keep_their_rates() -> None:
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    made, _ = make_optimizer(options("AdamW", "eps=1e-5"), [*groups(first, 0.1), *groups(second, 0.4)])

    assert [group["lr"] for group in made.param_groups] == [0.1, 0.4]
    assert made.defaults["eps"] == 1e-5


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        (
            "adamw8bit_apex_fused",
            (),
            "--optimizer_type adamw8bit_apex_fused: unknown. Did you mean adamw8bit? Use one of",
        ),
        ("nowhere.Fast", (), "the package nowhere is not installed"),
        ("torch.optim.Fast", (), "cannot be imported"),
        ("AdamW", ("speed=3",), "--optimizer_args speed=3"),
        ("AdamW", ("betas=2,3",), "--optimizer_args betas=(2, 3)"),
        ("AdamW", ("betas=2",), "--optimizer_args betas=2"),
        ("builtins.dict", (), "--optimizer_type builtins.dict: is not an optimizer class"),
        ("torch.nn.Linear", (), "is not an optimizer class"),
        ("torch.optim.Optimizer", (), "with --optimizer_args"),
        ("math.sqrt", (), "is not an optimizer class"),
        ("..os", (), "--optimizer_type ..os: is not an import path"),
        (".", (), "unknown. Use one of"),
        ("os.", (), "is not an import path"),
        ("torch.optim.lbfgs.LBFGS", (), "LBFGS: it computes the loss several times a step"),
        ("LBFGS", (), "LBFGS: it computes the loss several times a step"),
        ("SparseAdam", (), "SparseAdam: it takes sparse gradients only"),
    ],
)
def test_what_cannot_be_built_is_refused_with_a_reason(
    name: str, arguments: tuple[str, ...], expected: str
) -> None:
    with pytest.raises(OptionError) as error:
        make_optimizer(options(name, *arguments), groups(nn.Parameter(torch.ones(1))))

    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("name", "install"),
    [("Lion", "lion-pytorch"), ("Prodigy", "prodigyopt"), ("AdamWScheduleFree", "schedulefree")],
)
def test_a_missing_package_is_named_with_the_command_to_install_it(name: str, install: str) -> None:
    if importlib.util.find_spec(install.replace("-", "_")) is not None:
        pytest.skip("it is installed here")

    with pytest.raises(OptionError, match=f"pip install {install}"):
        find_optimizer(name)


def test_adafactor_finds_its_own_rate_unless_told_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    with caplog.at_level(logging.WARNING):
        own, _ = make_optimizer(options("adafactor"), groups(parameter))
        forced, _ = make_optimizer(
            options("adafactor", "relative_step=False", "warmup_init=True"), groups(parameter)
        )
        given, _ = make_optimizer(
            options("adafactor", "relative_step=False", "scale_parameter=False"), groups(parameter)
        )

    assert own.defaults["relative_step"]
    assert own.param_groups[0]["lr"] is None
    assert forced.defaults["relative_step"]
    assert given.param_groups[0]["lr"] == 0.05
    assert "--max_grad_norm" in caplog.text
