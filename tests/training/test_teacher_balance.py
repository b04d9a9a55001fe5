"""--timestep_focus: which levels it draws, and what makes up for it in a band."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modules.errors import OptionError
from protocols.family import FLOW, NoiseSpec
from protocols.rules import Expert
from tests.training import toy
from tests.training.data.test_timesteps import IMAGE_NOISE, TWO, drawn, options
from training.data.timesteps import draw, map_uniform_to_fractions
from training.features.show_timesteps_drawing import count_timesteps
from training.features.teacher_balance import FocusBalance, find_balance
from training.noise_options import SAMPLERS

SHIFTED = "--timestep_sampling shift --discrete_flow_shift 5"


def share(sigmas: Tensor, low: float, high: float) -> float:
    return float(((sigmas >= low) & (sigmas <= high)).double().mean())


def test_a_uniform_number_below_the_focus_becomes_a_level_of_its_range() -> None:
    u = torch.tensor([0.0, 0.1, 0.2, 0.39, 0.4, 0.7, 0.999], dtype=torch.float64)
    made = options("--timestep_sampling uniform --timestep_focus 0.4 --timestep_focus_range 500 900")

    expected = [0.5, 0.6, 0.7, 0.89, 0.0, 0.5, 0.599 / 0.6]
    shares = map_uniform_to_fractions(made, u, FLOW, 1.0)
    torch.testing.assert_close(shares, torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=0)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "flux2_shift"])
def test_the_focus_is_a_mixture_with_the_draws_of_every_sampler(sampler: str) -> None:
    """The range is of the level as it is trained: no shift moves it."""
    words = f"--timestep_sampling {sampler} --discrete_flow_shift 5"
    noise = IMAGE_NOISE["flux"]
    shape = (1, 16, 1, 64, 48)

    def levels(more: str) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return draw(options(words + more), 100_000, generator, noise_spec=noise, shape=shape).sigmas

    default, focused = levels(""), levels(" --timestep_focus 0.3 --timestep_focus_range 200 450")
    for low, high in ((0.0, 0.2), (0.2, 0.3), (0.3, 0.45), (0.45, 1.0)):
        overlap = max(0.0, min(high, 0.45) - max(low, 0.2)) / 0.25
        assert share(focused, low, high) == pytest.approx(
            0.7 * share(default, low, high) + 0.3 * overlap, abs=8e-3
        )


def test_buckets_spread_the_focus_too() -> None:
    made = options(f"{SHIFTED} --num_timestep_buckets 10 --timestep_focus 0.3 --timestep_focus_range 10 20")
    sigmas = drawn(made, count=10)

    assert int(((sigmas >= 0.01) & (sigmas <= 0.02)).sum()) == 3


def test_each_of_two_experts_gets_its_levels_with_a_focus() -> None:
    made = options(f"{SHIFTED} --timestep_focus 0.5 --timestep_focus_range 850 950")
    times = [draw(made, 8, torch.Generator().manual_seed(seed), experts=TWO) for seed in range(200)]

    for one in times:
        side = TWO[one.expert]
        levels = 1000 * one.sigmas.double()
        assert ((levels >= side.min_timestep) & (levels < side.max_timestep)).all()
    assert share(torch.cat([one.sigmas for one in times]), 0.85, 0.95) > 0.5


def test_a_model_with_a_table_of_levels_counts_places_in_it() -> None:
    noise = NoiseSpec(table=tuple(float(place) for place in range(1000)))
    made = options("--timestep_sampling uniform --timestep_focus 0.999 --timestep_focus_range 300 301")
    times = draw(made, 50, torch.Generator().manual_seed(1), noise_spec=noise)

    assert (times.timesteps == 300).sum() >= 48


def test_without_a_focus_the_draws_are_those_of_before() -> None:
    assert torch.equal(drawn(options(SHIFTED)), drawn(options(f"{SHIFTED} --sigmoid_scale 1.0")))
    assert find_balance(options(SHIFTED), 0, 750) == FocusBalance(1.0, 1.0)


@pytest.mark.parametrize(("focus", "low", "high", "maximum"), [(0.5, 400, 800, 750), (0.3, 0, 200, 520)])
def test_the_balance_of_a_uniform_sampler_is_the_formula(
    focus: float, low: int, high: int, maximum: int
) -> None:
    made = options(
        f"--timestep_sampling uniform --timestep_focus {focus} --timestep_focus_range {low} {high}"
    )
    above = 1 - maximum / 1000
    overlap = max(0, high - max(low, maximum)) / (high - low)

    balance = find_balance(made, 0, maximum)

    assert balance.outside == pytest.approx(above / ((1 - focus) * above + focus * overlap), rel=1e-3)


@pytest.mark.parametrize("experts", [None, TWO[0], TWO[1]])
def test_the_balance_is_the_ratio_of_drawn_shares(experts: Expert | None) -> None:
    expert = Expert("", 0.0) if experts is None else experts
    words = f"{SHIFTED} --timestep_focus 0.4 --timestep_focus_range 700 950"
    balance = find_balance(options(words), 200, 920, flow_shift=5.0, expert=expert)

    def inside(words: str) -> float:
        levels = 1000 * drawn(options(words), count=400_000).double()
        levels = levels[(levels >= expert.min_timestep) & (levels < expert.max_timestep)]
        return share(levels, 200, 920)

    default, focused = inside(SHIFTED), inside(words)
    assert balance.inside == pytest.approx(default / focused, rel=0.02)
    expected = 1.0 if math.isclose(focused, 1) else (1 - default) / (1 - focused)
    assert balance.outside == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--timestep_focus 1", "use a number above 0 and below 1 .*--min_timestep"),
        ("--timestep_focus 0", "use a number above 0 and below 1"),
        ("--timestep_focus nan", "use a number above 0 and below 1"),
        ("--timestep_focus_range 300 400", "--timestep_focus_range needs --timestep_focus"),
        ("--timestep_focus 0.5 --timestep_focus_range 800 400", "800 400: need 0 <= LOW < HIGH <= 1000"),
        ("--timestep_focus 0.5 --timestep_focus_range 0 1001", "need 0 <= LOW < HIGH <= 1000"),
        ("--timestep_focus 0.5 --timestep_focus_range 400 400", "need 0 <= LOW < HIGH <= 1000"),
        (
            "--timestep_focus 0.5 --min_timestep 100",
            "0.5 with --min_timestep 100 .*a window",
        ),
        ("--timestep_focus 0.5 --max_timestep 1000", "Pass one of the two"),
    ],
)
def test_wrong_values_of_the_focus_are_explained(words: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        options(words)


def test_the_picture_of_the_draws_shows_the_focus() -> None:
    counts, _ = count_timesteps(options("--timestep_focus 0.5 --timestep_focus_range 100 200"), 1, 10)

    assert float(counts[100:200].sum() / counts.sum()) == pytest.approx(0.55, abs=0.01)


def test_a_file_says_the_focus_it_was_trained_with(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    toy.train_toy(tmp_path, "--max_train_steps", 1, "--timestep_focus", 0.4)
    metadata = toy.metadata_of(tmp_path / "output" / "x.safetensors")

    assert metadata["ss_timestep_focus"] == "0.4"
    assert metadata["ss_timestep_focus_range"] == "400 800"
