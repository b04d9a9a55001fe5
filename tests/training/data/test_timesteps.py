"""Timestep samplers, loss weights, and --show_timesteps."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flux_2.configs import count_latents
from modules.errors import OptionError
from modules.media.reading import read_image
from modules.options import read_options
from modules.parser import add_options
from protocols.families import HIGH_NOISE, LOW_NOISE
from protocols.family import FLOW, NoiseSpec
from protocols.rules import Expert
from tests.golden_cases import read_case
from training.data.timesteps import (
    Timesteps,
    check_experts_reached,
    draw,
    find_shift,
    is_in_range,
    loss_weights,
    map_uniform_to_fractions,
    noise_fractions,
    takes_normal_draws,
    times_at,
)
from training.features.show_timesteps_drawing import count_timesteps, draw_text_bars, show_timesteps
from training.noise_options import SAMPLERS, SIZE_SAMPLERS, WEIGHTINGS, TimestepOptions

GOLDEN, _ = read_case("timestep_sampling")
IMAGES, _ = read_case("image_timesteps")


def count_tokens(shape: Sequence[int]) -> int:
    """A token is 2 x 2 latents."""
    return (shape[-2] // 2) * (shape[-1] // 2)


def from_numbers(
    made: TimestepOptions, numbers: Tensor, noise: NoiseSpec = FLOW, shape: Sequence[int] = ()
) -> Timesteps:
    """The deterministic part of the samplers. numbers: normal where `takes_normal_draws`, else uniform."""
    return times_at(
        made, noise_fractions(made, numbers.double(), noise, find_shift(made, noise, shape)), noise
    )


IMAGE_NOISE = {
    "flux": NoiseSpec(0.0, table_is_shifted=True, count_tokens=count_tokens),
    "hunyuan_image": NoiseSpec(0.0, integer_timesteps=True, table_is_shifted=True, count_tokens=count_tokens),
    "lumina": NoiseSpec(0.0, table_is_shifted=True, count_tokens=count_tokens),
}
# what `predict` makes of the timesteps
FED = {"flux": lambda fed: fed / 1000, "hunyuan_image": lambda fed: fed, "lumina": lambda fed: 1 - fed / 1000}


def options(words: str = "", samplers: Sequence[str] = SAMPLERS) -> TimestepOptions:
    parser = argparse.ArgumentParser()
    add_options(parser, TimestepOptions, settings={"timestep_sampling": {"choices": samplers}})
    return read_options(TimestepOptions, parser.parse_args(words.split()))


def drawn(made: TimestepOptions, count: int = 100_000, seed: int = 1) -> Tensor:
    return draw(made, count, torch.Generator().manual_seed(seed), seed, 0).sigmas


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: " ".join(case["cli"]) or "default")
def test_samplers_and_weights_give_the_recorded_numbers(case: dict[str, list[float]]) -> None:
    made = options(" ".join(map(str, case["cli"])))
    numbers = torch.tensor(GOLDEN["n" if takes_normal_draws(made) else "u"])

    times = from_numbers(made, numbers)

    torch.testing.assert_close(times.sigmas, torch.tensor(case["sigma_used"]), atol=1e-6, rtol=0)
    fed = torch.tensor(case["timestep_given_to_model"])
    torch.testing.assert_close(times.timesteps, fed, atol=1e-3, rtol=0)
    expected = torch.tensor(case["loss_weight"]) if case["loss_weight"] else torch.ones(len(numbers))
    torch.testing.assert_close(loss_weights(made, times), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "case", IMAGES["cases"], ids=lambda case: " ".join(map(str, (case["family"], *case["options"].values())))
)
def test_image_families_draw_the_recorded_numbers_by_their_own_conventions(case: dict[str, Any]) -> None:
    given = {**IMAGES["defaults"][case["family"]], **case["options"]}
    names = ["timestep_sampling", "discrete_flow_shift", "sigmoid_scale", "logit_mean", "logit_std"]
    names += ["mode_scale", *(["weighting_scheme"] if given["weighting_scheme"] in WEIGHTINGS else [])]
    words = " ".join(f"--{name} {given[name]}" for name in names)
    made = options(words, samplers=(*SAMPLERS, *SIZE_SAMPLERS))
    noise = IMAGE_NOISE[case["family"]]
    numbers = torch.tensor(IMAGES["n" if takes_normal_draws(made) else "u"], dtype=torch.float64)

    times = from_numbers(made, numbers, noise, (1, 16, 1, *case["latent_h_w"]))

    torch.testing.assert_close(times.sigmas, torch.tensor(case["sigma"]), atol=2e-6, rtol=0)
    if case["loss_weight"] and 0.0 not in case["sigma"]:  # of pure data it is infinite there
        expected = torch.tensor(case["loss_weight"])
        torch.testing.assert_close(loss_weights(made, times, exact_sigmas=True), expected, rtol=1e-5, atol=0)
    fed = torch.tensor(case["given_to_model"], dtype=torch.float32)
    torch.testing.assert_close(FED[case["family"]](times.timesteps), fed, atol=2e-6, rtol=0)


def test_a_sampler_that_follows_the_size_is_refused_where_the_model_does_not() -> None:
    with pytest.raises(OptionError, match="flux_shift: the shift of this model does not depend on the size"):
        draw(options("--timestep_sampling flux_shift"), 10, torch.Generator(), noise_spec=NoiseSpec())


def shifted(normal: Tensor, mu: float) -> Tensor:
    """By the formula."""
    t = torch.sigmoid(normal)
    return t * math.exp(mu) / (1 + (math.exp(mu) - 1) * t)


NORMAL = torch.tensor([-1.5, 0.0, 0.7])


@pytest.mark.parametrize(
    ("sampler", "slope"),
    [("flux_shift", 0.65 / 3840), ("qwen_shift", 0.4 / 7936), ("krea2_shift", 0.65 / 6144)],
)
def test_shifts_follow_width_and_height_of_a_video_but_not_its_length(sampler: str, slope: float) -> None:
    """480 x 832 pixels are 60 x 104 latents: 1560 tokens in each latent frame."""
    made = options(f"--timestep_sampling {sampler} --sigmoid_scale 0.8")

    found = [from_numbers(made, NORMAL, shape=(2, 16, frames, 60, 104)).sigmas for frames in (1, 21)]

    expected = shifted(0.8 * NORMAL, 0.5 + (1560 - 256) * slope)
    torch.testing.assert_close(found[0], expected, atol=1e-6, rtol=0)
    assert torch.equal(found[0], found[1])


def test_the_shift_of_flux_2_counts_each_latent_pixel() -> None:
    """A picture of 1024 x 768 pixels is 64 x 48 of its latents: 3072 tokens."""
    made = options("--timestep_sampling flux2_shift")

    found = from_numbers(made, NORMAL, NoiseSpec(count_tokens=count_latents), (1, 128, 1, 64, 48)).sigmas

    expected = shifted(NORMAL, 0.5 + (3072 - 256) * 0.65 / 3840)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    with pytest.raises(OptionError, match="flux2_shift counts each latent pixel.*Use flux_shift"):
        draw(made, 10, torch.Generator(), shape=(1, 16, 1, 64, 48))


def test_the_shift_of_ideogram_grows_with_the_side_of_a_picture() -> None:
    """sigmoid(0.5 ln(pixels / 512^2) + 1.5 n), for a picture of 1024 x 768 pixels."""
    made = options("--timestep_sampling ideogram4_shift")
    expected = torch.sigmoid(0.5 * math.log(1024 * 768 / 512**2) + 1.5 * NORMAL)

    packed = from_numbers(made, NORMAL, NoiseSpec(count_tokens=count_latents), (1, 128, 1, 64, 48)).sigmas
    halved = from_numbers(made, NORMAL, shape=(1, 16, 1, 128, 96)).sigmas

    torch.testing.assert_close(packed, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(halved, expected, atol=1e-6, rtol=0)


def test_both_experts_are_reached_by_the_shift_of_ideogram() -> None:
    check_experts_reached([options("--timestep_sampling ideogram4_shift")], FLOW, TWO)


def test_bounds_count_on_a_shifted_table_as_on_the_plain_one() -> None:
    spec = NoiseSpec(0.0, table_is_shifted=True)

    for more in ("", " --preserve_distribution_shape"):
        made = options(f"--discrete_flow_shift 3 --min_timestep 300 --max_timestep 450{more}")
        found = draw(made, 2000, torch.Generator().manual_seed(1), noise_spec=spec).sigmas
        plain = draw(made, 2000, torch.Generator().manual_seed(1)).sigmas
        torch.testing.assert_close(found, 3 * plain / (1 + 2 * plain))
        assert 0.55 <= float(plain.min()) <= float(plain.max()) <= 0.7 + 1e-6


@pytest.mark.parametrize(
    ("share", "place"), [(1e-9, 0), (0.0004, 0), (0.001, 0), (0.0011, 1), (0.57, 569), (1.0, 999)]
)
def test_a_table_of_noise_levels_is_read_at_whole_timesteps(share: float, place: int) -> None:
    table = NoiseSpec(0.0, table=tuple(0.5 + index for index in range(1000)))

    times = times_at(options(), torch.tensor([share], dtype=torch.float64), table)

    assert (times.timesteps.item(), times.sigmas.item()) == (place, place + 0.5)


@pytest.mark.parametrize("sampling", ["uniform", "sigmoid", "shift", "logsnr", "sigma"])
@pytest.mark.parametrize("buckets", ["", " --num_timestep_buckets 20"])
def test_keeping_the_shape_means_the_distribution_cut_to_the_range(sampling: str, buckets: str) -> None:
    base = f"--timestep_sampling {sampling} --discrete_flow_shift 3"
    limits = f" --min_timestep 300 --max_timestep 450 --preserve_distribution_shape{buckets}"
    low, high = (0.55, 0.7) if sampling == "sigma" else (0.3, 0.45)

    kept = drawn(options(base + limits), 20_000)
    full = drawn(options(base), 100_000)

    assert float(kept.min()) >= low - 1e-6
    assert float(kept.max()) <= high + 1e-6
    middle = full[(full >= low) & (full <= high)].median()
    torch.testing.assert_close(kept.median(), middle, atol=5e-3, rtol=0)


@pytest.mark.parametrize("sampling", ["uniform", "sigmoid", "logsnr", "qinglong_flux"])
def test_keeping_the_shape_with_buckets_takes_one_of_each_equal_part(sampling: str) -> None:
    """Means of runs of 500 are then nearly equal; those of independent draws differ by 2e-3."""
    made = options(
        f"--timestep_sampling {sampling} --min_timestep 300 --max_timestep 450 "
        "--preserve_distribution_shape --num_timestep_buckets 500"
    )

    means = [
        draw(made, 500, torch.Generator().manual_seed(seed), seed, 0, shape=(1, 16, 1, 64, 64)).sigmas.mean()
        for seed in range(10)
    ]

    assert float(torch.stack(means).std()) < 3e-4


def test_a_range_that_nothing_falls_into_is_an_error() -> None:
    narrow = "--timestep_sampling sigmoid --sigmoid_scale 0.01 --max_timestep 50"

    with pytest.raises(OptionError, match="--max_timestep 50"):
        drawn(options(f"{narrow} --preserve_distribution_shape"), 10)


@pytest.mark.parametrize("sampling", ["sigmoid", "shift", "logsnr", "sigma", "uniform"])
def test_extreme_uniform_numbers_stay_finite(sampling: str) -> None:
    made = options(f"--timestep_sampling {sampling} --sigmoid_scale 0")
    assert torch.isfinite(
        map_uniform_to_fractions(made, torch.tensor([0.0, 1.0]), FLOW, made.flow_shift)
    ).all()


TWO = (Expert(LOW_NOISE, 0.0, 875.0), Expert(HIGH_NOISE, 875.0))
DRAWS = {
    "uniform": "--timestep_sampling uniform",
    "shift": "--timestep_sampling shift --discrete_flow_shift 5",
    "sigma": "",
    "logsnr": "--timestep_sampling logsnr --logit_mean -1",
    "squeezed": "--timestep_sampling uniform --min_timestep 500",
    "kept": "--timestep_sampling sigmoid --min_timestep 600 --preserve_distribution_shape",
    "table": "--weighting_scheme mode --max_timestep 400 --preserve_distribution_shape",
}


@pytest.mark.slow_cases("kept", "sigma", "squeezed", "table")
@pytest.mark.parametrize("name", DRAWS)
def test_a_batch_is_for_one_expert_and_each_sample_has_the_plain_distribution(name: str) -> None:
    made = options(DRAWS[name])
    batches = [
        draw(made, 3, torch.Generator().manual_seed(number), 1, 3 * number, experts=TWO)
        for number in range(1500)
    ]

    for times in batches:
        assert ((1000 * times.sigmas >= 875) == bool(times.expert)).all()
    plain = draw(made, 40_000, torch.Generator().manual_seed(7)).sigmas
    share = float((1000 * plain >= 875).float().mean())
    assert abs(sum(times.expert for times in batches) / len(batches) - share) < 0.05  # 3.9 sigma at most
    for place in range(3):  # of each by itself, not only of all together; 0.042: p of 0.01
        own = torch.stack([times.sigmas[place] for times in batches]).sort().values
        levels = torch.searchsorted(own, own, right=True).double() / len(own)
        above = torch.searchsorted(plain.sort().values, own, right=True).double() / len(plain)
        assert float((levels - above).abs().max()) < 0.045, place


def test_the_high_noise_expert_alone_gets_its_side_evenly_with_buckets() -> None:
    made = options("--timestep_sampling uniform --num_timestep_buckets 5")
    times = draw(made, 5, torch.Generator().manual_seed(1), 1, 0, experts=TWO[1:])
    assert sorted(((times.sigmas - 0.875) / 0.025).floor().tolist()) == [0, 1, 2, 3, 4]
    assert times.expert == 0


@pytest.mark.parametrize(
    ("limits", "expert"),
    [
        ("--max_timestep 875 --preserve_distribution_shape", "high-noise"),
        ("--max_timestep 800", "high-noise"),
        ("--min_timestep 880", "low-noise"),
    ],
)
@pytest.mark.parametrize("sampler", ["uniform", "flux_shift"])
def test_an_expert_that_no_timestep_reaches_is_an_error(limits: str, expert: str, sampler: str) -> None:
    with pytest.raises(OptionError, match=f"no timestep of this run reaches the {expert} transformer"):
        check_experts_reached([options(f"--timestep_sampling {sampler} {limits}")], FLOW, TWO)
    for able in ("", f"--timestep_sampling {sampler}"):
        check_experts_reached([options(able)], FLOW, TWO)


def test_bounds_of_the_sampler_sigma_are_told_to_count_from_the_noisy_end() -> None:
    made = options("--min_timestep 875 --preserve_distribution_shape")  # 0 to 125
    with pytest.raises(OptionError, match="counts the first two from the noisy end"):
        check_experts_reached([made], FLOW, TWO[1:])


def test_the_table_is_counted_from_the_noisy_end_and_a_range_ends_before_its_last_number() -> None:
    made = options("--timestep_sampling sigma --min_timestep 100 --max_timestep 200")
    shares = torch.tensor([0.901, 0.9, 0.801, 0.8])  # numbers 99, 100, 199 and 200

    assert is_in_range(made, shares).tolist() == [False, True, True, False]


def test_statistics_count_every_draw_once() -> None:
    made = options("--weighting_scheme sigma_sqrt")
    counts, weights = count_timesteps(made, seed=0, num_batches=3, batch_size=100)

    assert float(counts.sum()) == 300
    assert counts.shape == weights.shape == (1000,)
    assert torch.isfinite(weights).all()


def test_the_console_shows_forty_bars_for_counts_and_weights(capsys: pytest.CaptureFixture[str]) -> None:
    show_timesteps(options("--timestep_sampling uniform"), "console")

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 82
    assert max(line.count("#") for line in lines) == 64
    assert draw_text_bars(torch.ones(1000)).splitlines()[39].startswith(" 975.. 999       1.00 ####")


def test_experts_are_named_with_their_share_of_the_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("console", "image"):
        made = options("--timestep_sampling uniform")
        show_timesteps(made, kind, folder=tmp_path, experts=TWO)
        said = capsys.readouterr().out
        assert "low-noise transformer: timesteps from 0 to 875, 87." in said
        assert "high-noise transformer: timesteps from 875 to 1000, 12." in said
    plain, marked = tmp_path / "plain", read_image(tmp_path / "timesteps.png")
    assert marked.shape == (700, 1000, 3)
    show_timesteps(made, kind, folder=plain)
    assert (read_image(plain / "timesteps.png") != marked).any()  # the line at the boundary
