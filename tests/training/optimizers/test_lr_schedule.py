"""Learning-rate schedules, and optimizers by name and by import path."""

import importlib.util
import json
import math
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from modules.errors import CheckpointError, OptionError
from modules.installation import import_user_module
from modules.script_options import parse_options
from training.learning_options import LrScheduleOptions, OptimizerOptions
from training.optimizers.lr_schedule import LrSchedule, make_lr_schedule
from training.optimizers.optimizer import PATHS, check_rates, find_optimizer, make_optimizer

RATE = 1e-3
STABLE = "warmup_stable_decay --lr_warmup_steps"
PIECEWISE = "piecewise_constant --lr_scheduler_args step_rules="


def options(words: str = "") -> LrScheduleOptions:
    return parse_options("", words.split(), LrScheduleOptions)[0]


def schedule(words: str, total: int = 100) -> tuple[LrSchedule, Optimizer]:
    made = SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    return make_lr_schedule(options(words), made, total), made


@pytest.mark.parametrize(
    ("words", "points"),  # points: factor at a step; total 100
    [
        ("constant", {0: 1, 50: 1, 100: 1}),
        ("constant_with_warmup --lr_warmup_steps 20", {0: 0, 10: 0.5, 20: 1, 100: 1}),
        ("linear --lr_warmup_steps 20%", {0: 0, 10: 0.5, 20: 1, 60: 0.5, 100: 0}),
        ("cosine --lr_warmup_steps 20", {10: 0.5, 20: 1, 40: 0.853553, 60: 0.5, 100: 0}),
        ("cosine_with_restarts --lr_scheduler_num_cycles 2", {0: 1, 25: 0.5, 49: 0.000986, 50: 1, 100: 0}),
        ("polynomial --lr_scheduler_power 2", {0: 1, 50: 0.25 * (1 - 1e-4) + 1e-4, 100: 1e-4}),
        ("inverse_sqrt --lr_warmup_steps 25", {0: 0, 25: 1, 100: 0.5}),
        ("inverse_sqrt --lr_scheduler_timescale 25", {0: 1, 75: 0.5}),
        ("inverse_sqrt", {100: 1 / math.sqrt(1.01)}),
        ("cosine_with_min_lr --lr_scheduler_min_lr_ratio 0.1", {0: 1, 50: 0.55, 100: 0.1}),
        (f"{STABLE} 20 --lr_decay_steps 40 --lr_scheduler_min_lr_ratio 0.2", {0: 0.2, 20: 1, 59: 1, 80: 0.6}),
        (f"{STABLE} 20 --lr_decay_steps 0.4", {0: 0, 59: 1, 80: 0.5, 100: 0}),
        (f"{STABLE} 0 --lr_decay_steps 2", {98: 1, 99: 0.5, 100: 0}),
        ("warmup_stable_decay", {0: 1, 100: 1}),
        (f"{PIECEWISE}'1:10,0.1:20,0.01'", {0: 1, 9: 1, 10: 0.1, 19: 0.1, 20: 0.01}),
        (f"{PIECEWISE}1:10,0.1:20,0.01 --lr_warmup_steps 5", {0: 1, 10: 0.1, 100: 0.01}),
        ("polynomial --lr_scheduler_args lr_end=1e-4", {50: 0.55, 100: 0.1}),
    ],
)
def test_curves_pass_through_their_closed_forms(words: str, points: dict[int, float]) -> None:
    made, inner = schedule(f"--lr_scheduler {words}")
    factors = []
    for _ in range(101):
        factors.append(made.get_last_lr()[0] / RATE)
        assert inner.param_groups[0]["lr"] == made.get_last_lr()[0]
        inner.step()
        made.step()

    for step, expected in points.items():
        assert factors[step] == pytest.approx(expected, abs=1e-6), step


def test_each_group_keeps_its_own_rate() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1e-3, 4e-3)]
    made = make_lr_schedule(options("--lr_scheduler linear"), SGD(groups), 10)

    for _ in range(5):
        made.step()

    assert made.get_last_lr() == pytest.approx([5e-4, 2e-3])


@pytest.mark.parametrize(
    "words",
    [
        "--lr_scheduler cosine --lr_warmup_steps 3",
        "--lr_scheduler_type CosineAnnealingLR --lr_scheduler_args T_max=20",
        "--lr_scheduler_type torch.optim.lr_scheduler.MultiStepLR --lr_scheduler_args milestones=(4,9)",
        "--lr_scheduler_type OneCycleLR --lr_scheduler_args max_lr=0.01 total_steps=20 cycle_momentum=False",
    ],
)
def test_a_restored_schedule_goes_on_to_the_same_bits(words: str) -> None:
    full, inner = schedule(words, total=20)
    for _ in range(7):
        inner.step()
        full.step()
    state, groups = json.loads(json.dumps(full.state_dict())), inner.state_dict()

    resumed, other = schedule(words, total=20)
    other.load_state_dict(groups)
    resumed.load_state_dict(state)

    for _ in range(6):
        assert resumed.get_last_lr() == full.get_last_lr()
        assert other.param_groups[0]["lr"] == inner.param_groups[0]["lr"]
        for each in (inner, full, other, resumed):
            each.step()


def test_a_state_of_another_kind_of_schedule_is_refused() -> None:
    named, imported = schedule("--lr_scheduler linear")[0], schedule("--lr_scheduler_type ConstantLR")[0]

    for one, other in ((named, imported), (imported, named)):
        with pytest.raises(CheckpointError, match="a different kind"):
            one.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (" adafactor", "--optimizer_type Adafactor"),
        (" polynomial --lr_scheduler_args powder=2", "has no such argument; it has lr_end, power"),
        (" linear --lr_scheduler_args power=2", "--lr_scheduler linear has no such argument; it has none"),
        (" piecewise_constant --lr_scheduler_args step_rules=1:a,2", "step_rules=1:a,2"),
        (f" {STABLE} 80 --lr_decay_steps 40", "exceed the 100 steps"),
        (" polynomial --lr_scheduler_args lr_end=1", "ends at 1"),
        (" polynomial --lr_scheduler_args power=x", "--lr_scheduler_args power=x: use a number"),
        ("_type nowhere.CosineLR", "the package nowhere is not installed"),
        ("_type ReduceLROnPlateau", "use --lr_scheduler plateau"),
        ("_type builtins.dict", "builtins is a module of Python's standard library"),
        ("_type torch.optim.AdamW", "is not a learning-rate scheduler"),
        ("_type torch.save", "is not a learning-rate scheduler"),
        ("_type ..os", "..os: is not an import path"),
        ("_type ChainedScheduler", "rejects --lr_scheduler_args"),
    ],
)
def test_schedules_that_cannot_be_made_are_refused(words: str, expected: str) -> None:
    with pytest.raises(OptionError) as error:
        schedule(f"--lr_scheduler{words}")

    assert expected in str(error.value)


def test_a_schedule_that_ends_before_the_run_says_so() -> None:
    words = "--lr_scheduler_type OneCycleLR --lr_scheduler_args max_lr=0.01 total_steps=2"
    made, inner = schedule(words)
    inner.step()
    for _ in range(2):
        made.step()
    with pytest.raises(OptionError, match="--lr_scheduler_type OneCycleLR: Tried to step 3 times"):
        made.step()


def test_adafactor_shows_the_rate_it_finds() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    made = make("Adafactor", parameter=parameter)
    shown = make_lr_schedule(options(), made, 10)
    assert shown.get_last_lr() == [0.0]

    parameter.grad = torch.ones(2, 2)
    made.step()
    shown.step()

    assert shown.name == "adafactor"
    # its relative step: min(0.01, 1/sqrt(step)) times RMS 1
    assert shown.get_last_lr()[0] == pytest.approx(0.01, rel=0.01)


def test_a_schedule_free_optimizer_keeps_its_own_pace_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    class ScheduleFreeAdamW(AdamW):
        """Named as the real ones are."""

    class Mine(ScheduleFreeAdamW):
        """Named by a user."""

    made = Mine([nn.Parameter(torch.zeros(1))], lr=RATE)
    shown = make_lr_schedule(options("--lr_scheduler cosine"), made, 10)

    shown.step()

    assert shown.get_last_lr() == [RATE]
    assert "needs no schedule" in caplog.text


def make(name: str, *arguments: str, parameter: nn.Parameter | None = None) -> Optimizer:
    """The optimizer of one parameter, at a rate of 0.05."""
    given = OptimizerOptions.from_defaults(
        optimizer_type=name, optimizer_args=arguments or None, learning_rate=0.05
    )
    parameter = nn.Parameter(torch.ones(2, 2)) if parameter is None else parameter
    return make_optimizer(given, [{"params": [parameter], "lr": 0.05}])[0]


def test_an_optimizer_is_named_in_any_case_or_by_its_path() -> None:
    for name in ("", "AdamW", "adamw", "torch.optim.AdamW"):
        assert find_optimizer(name) is torch.optim.AdamW
    assert find_optimizer("nadam") is torch.optim.NAdam
    assert find_optimizer(f"{__name__}.Descent") is Descent


class Descent(torch.optim.SGD):
    """A class that only an import path finds."""


def test_arguments_reach_the_optimizer_and_its_description_and_groups_keep_their_rates() -> None:
    given = OptimizerOptions.from_defaults(
        optimizer_type="AdamW", optimizer_args=("betas=0.9,0.95", "eps=1e-5")
    )
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in (0.1, 0.4)]

    made, described = make_optimizer(given, groups)

    assert described == "torch.optim.adamw.AdamW(betas=(0.9, 0.95),eps=1e-05)"
    assert [group["lr"] for group in made.param_groups] == [0.1, 0.4]
    assert made.defaults["eps"] == 1e-5


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("adamw8bit_apex_fused", (), "unknown. Did you mean adamw8bit? Use one of"),
        ("adamw8bit_apex_fused_legacy_no_scale", (), "unknown. Did you mean adamw8bit? Use one of"),
        ("adamw8bit_apex_fused", (), "Pass --optimizer_type AdamW8bit"),
        ("AdamW8bit_apex_fused_legacy", (), "Pass --optimizer_type AdamW8bit"),
        ("adamw8bit_apex_fused_legacy_no_scale", (), "it stands for AdamW with 8-bit states. Pass --opt"),
        ("nowhere.Fast", (), "install the package that has the module nowhere; it may have another name"),
        ("torch.nowhere.Fast", (), "torch has no module nowhere. Fix the name"),
        ("torch.optim.Fast", (), "cannot be imported"),
        ("AdamW", ("speed=3",), "--optimizer_args speed=3"),
        ("AdamW", ("betas=2",), "--optimizer_args betas=2"),
        (
            "builtins.dict",
            (),
            "builtins is a module of Python's standard library",
        ),
        ("torch.nn.Linear", (), "is not an optimizer class"),
        ("torch.optim.Optimizer", (), "--optimizer_type torch.optim.Optimizer: "),
        ("antigravity.fly", (), "which has nothing for this option and is not imported"),
        ("..os", (), "--optimizer_type ..os: is not an import path"),
        (".", (), "unknown. Use one of"),
        ("os.", (), "is not an import path"),
        ("LBFGS", (), "LBFGS: it computes the loss several times a step"),
        ("torch.optim.lbfgs.LBFGS", (), "LBFGS: it computes the loss several times a step"),
        ("SparseAdam", (), "SparseAdam: it takes sparse gradients only"),
    ],
)
def test_what_cannot_be_built_is_refused_with_a_reason(
    name: str, arguments: tuple[str, ...], expected: str
) -> None:
    with pytest.raises(OptionError) as error:
        make(name, *arguments)

    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("name", "install"),
    [
        ("Lion", "lion-pytorch"),
        ("Prodigy", "prodigyopt"),
        ("AdamWScheduleFree", "schedulefree"),
        ("prodigyplus.ProdigyPlusScheduleFree", "prodigy-plus-schedule-free"),
        ("optimi.StableAdamW", "torch-optimi"),
    ],
)
def test_a_missing_package_is_named_with_the_command_to_install_it(name: str, install: str) -> None:
    if importlib.util.find_spec(PATHS.get(name.lower(), name).partition(".")[0]) is not None:
        pytest.skip("it is installed here")

    with pytest.raises(OptionError, match=f"pip install {install}"):
        find_optimizer(name)


def test_adafactor_finds_its_own_rate_unless_told_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    own = make("adafactor")
    forced = make("adafactor", "relative_step=False", "warmup_init=True")
    given = make("adafactor", "relative_step=False", "scale_parameter=False")

    assert own.defaults["relative_step"]
    assert own.param_groups[0]["lr"] is None
    assert forced.defaults["relative_step"]
    assert given.param_groups[0]["lr"] == 0.05
    assert "--max_grad_norm" in caplog.text


class OneRate(torch.optim.SGD):
    """Refuses several learning rates in its first step, as Prodigy does."""

    def step(self, closure: Any = None) -> Any:
        if len({group["lr"] for group in self.param_groups}) > 1:
            raise RuntimeError("one rate only")
        return super().step(closure)


class OneGroup(torch.optim.SGD):
    """Refuses several groups when it is made, as some optimizers of second order do."""

    def __init__(self, params: Any, **arguments: Any) -> None:
        super().__init__(params, **arguments)
        if len(self.param_groups) > 1:
            raise ValueError("no parameter groups")


@pytest.mark.parametrize(("kind", "reason"), [(OneRate, "one rate only"), (OneGroup, "no parameter groups")])
def test_an_optimizer_of_one_rate_is_refused_by_the_options_that_give_several(
    kind: type, reason: str
) -> None:
    given = OptimizerOptions.from_defaults(optimizer_type=f"{__name__}.{kind.__name__}", learning_rate=0.05)
    rates = {"--learning_rate": 0.05, "--text_encoder_lr 0.01": 0.01}

    with pytest.raises(OptionError, match=rf"^--text_encoder_lr 0.01: .*takes one group .*\(.*{reason}"):
        check_rates(given, rates)

    check_rates(given, {"--learning_rate": 0.05})
    check_rates(OptimizerOptions.from_defaults(learning_rate=0.05), rates)


def test_a_standard_module_is_not_imported_for_an_option() -> None:
    assert "antigravity" not in sys.modules

    with pytest.raises(OptionError, match="standard library"):
        make("antigravity.Adam")
    with pytest.raises(OptionError, match="standard library"):
        import_user_module("--network_module", "antigravity", "networks.lora_wan", "")

    assert "antigravity" not in sys.modules
