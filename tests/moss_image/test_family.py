"""MOSS-Image's schedule, the negative pass, training times, and what a request becomes."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from blissful_tuner.guidance import check_guidance, plan_steps
from blissful_tuner.options import GuidanceOptions
from modules.errors import OptionError
from moss_image import options as own
from moss_image.configs import NOISE
from moss_image.family import MossImage, NegativeSkipChoice, family_for_training
from moss_image.files import MossImageFiles
from moss_image.options import read_blocks
from moss_image.schedule import snap_levels
from protocols.requests import Prepared, Request
from protocols.rules import NegativeSkips
from tests.moss_image.making import GOLDEN
from tests.tiny.moss_image import write_tiny_moss_image
from training.data.timesteps import draw, map_uniform_to_fractions
from training.noise_options import TRUNCATED_LOGIT, TimestepOptions

REQUEST = Request("a cat", seed=1, width=64, height=64)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> MossImage:
    """With 24 blocks, so that there is one of number 22."""
    files = write_tiny_moss_image(tmp_path_factory.mktemp("model"), num_layers=24)
    return MossImage(replace(MossImageFiles(), dit=files.dit, vae=files.vae, text_encoder=files.text_encoder))


def prepare(family: MossImage, **changes: Any) -> Prepared:
    return family.prepare(replace(REQUEST, **changes))


@pytest.mark.parametrize("steps", sorted(map(int, GOLDEN["sigmas"])))
def test_levels_are_the_released_thousandths(steps: int) -> None:
    levels = [round(1000 * level) for level in snap_levels(steps, 5.0)]
    assert levels == GOLDEN["sigmas"][str(steps)]
    assert all(level == round(1000 * level) / 1000 for level in snap_levels(steps, 5.0))


def test_equal_levels_are_left_out_and_told(family: MossImage, caplog: pytest.LogCaptureFixture) -> None:
    for asked, made in GOLDEN["evaluations"].items():
        assert len(snap_levels(int(asked), 5.0)) - 1 == made
    assert prepare(family, steps=218).steps == 218
    assert not caplog.records
    prepared = prepare(family, steps=500)
    assert prepared.steps == len(prepared.sigmas) - 1 == GOLDEN["evaluations"]["500"]
    assert "415 of the 500 steps are used" in caplog.text


def test_the_simple_schedule_is_that_of_the_solver(family: MossImage) -> None:
    official = prepare(family, steps=8)
    simple = prepare(family, steps=8, extra={"moss_schedule": "simple"})
    assert official.sigmas == snap_levels(8, 5.0)
    assert (simple.sigmas, simple.flow_shift) == ((), 5.0)
    assert prepare(family, steps=8, flow_shift=2.0).sigmas == snap_levels(8, 2.0)
    with pytest.raises(OptionError, match="official or simple"):
        prepare(family, extra={"moss_schedule": "even"})


def skipped_at(prepared: Prepared, **options: Any) -> list[tuple[list[int], list[int]]]:
    """For each step the blocks that the positive and the negative pass omit."""
    guidance = replace(GuidanceOptions.from_defaults(), **options)
    (plans,) = plan_steps(prepared, guidance)
    passes = [
        {one.conditions_name: sorted(one.overrides.skip_blocks) for one in plan.passes} for plan in plans
    ]
    return [(each["positive"], each.get("negative", [-1])) for each in passes]


def test_the_negative_pass_alone_leaves_block_22_out(family: MossImage) -> None:
    assert skipped_at(prepare(family, steps=3)) == [([], [22])] * 3
    chosen = prepare(family, steps=3, extra={"negative_skip_blocks": "3, 5"})
    assert skipped_at(chosen) == [([], [3, 5])] * 3
    none = prepare(family, steps=3, extra={"negative_skip_blocks": "none"})
    assert skipped_at(none) == [([], [])] * 3
    assert skipped_at(prepare(family, steps=3, guidance_scale=1.0)) == [([], [-1])] * 3


def test_skipping_has_a_window_of_steps(family: MossImage) -> None:
    windowed = replace(family, skips=NegativeSkipChoice("22", 0.25, 0.75))
    assert [negative for _, negative in skipped_at(windowed.prepare(replace(REQUEST, steps=4)))] == [
        [],
        [22],
        [22],
        [],
    ]
    skips = NegativeSkips(frozenset({1}), 0.01, 1.0)  # the first step is not in it
    assert [skips.is_active(index, 50) for index in (0, 1, 49)] == [False, True, True]


def test_skipping_that_has_no_effect_is_told(family: MossImage, caplog: pytest.LogCaptureFixture) -> None:
    """The block that is left out without an option is not: nobody asked for it."""
    chosen = {"negative_skip_blocks": "3,5"}
    late = replace(family, skips=NegativeSkipChoice("3", 0.95, 1.0))
    for prepared, reason in (
        (prepare(family, steps=2, guidance_scale=1.0, extra=chosen), "3,5 is ignored because no step uses"),
        (late.prepare(replace(REQUEST, steps=2)), "3 is ignored because it acts in none of the 2 steps"),
        (
            replace(family, skips=NegativeSkipChoice("22", 0.95, 1.0)).prepare(replace(REQUEST, steps=2)),
            "22 is ignored because it acts in none of the 2 steps",
        ),
        (prepare(family, steps=2, extra=chosen), ""),
        (prepare(family, steps=2, guidance_scale=1.0), ""),
        (prepare(family, steps=2, guidance_scale=1.0, extra={"negative_skip_blocks": "none"}), ""),
    ):
        caplog.clear()
        check_guidance(prepared)
        said = [record.message for record in caplog.records]
        assert said == [f"--negative_skip_blocks {reason}{' guidance' * ('uses' in reason)}"] * bool(reason)


@pytest.mark.parametrize(
    "options", [own.MossImageTrainingOptions.from_defaults(), own.MossImageGenerationOptions.from_defaults()]
)
def test_a_window_that_ends_before_it_begins_is_refused(options: Any) -> None:
    with pytest.raises(OptionError, match="--negative_skip_start 0.8: use less than .*end, 0.2; .* none"):
        replace(options, negative_skip_start=0.8, negative_skip_end=0.2)


def test_options_that_skip_layers_replace_the_blocks_of_the_model(family: MossImage) -> None:
    prepared = prepare(family, steps=2)
    assert skipped_at(prepared, slg_mode="uncond", slg_layers="1", slg_end=0.5) == [([], [1]), ([], [22])]


def test_a_block_that_is_not_there_is_refused(family: MossImage) -> None:
    with pytest.raises(OptionError, match=r"negative_skip_blocks 24.*has the blocks 0 to 23"):
        prepare(family, extra={"negative_skip_blocks": "22,24"})


@pytest.mark.parametrize("text", ["22;24", "-1", "a", "1,,2", "99999"])
def test_other_words_for_blocks_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="use numbers of blocks"):
        read_blocks(text)


def test_training_times_are_those_of_the_report() -> None:
    """The mean sigma is 0.744: the wrong sign of the mean would make it 0.26."""
    options = replace(TimestepOptions.from_defaults(), timestep_sampling=TRUNCATED_LOGIT)
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000

    shares = map_uniform_to_fractions(options, u, NOISE, 1.0)

    assert float(shares.mean()) == pytest.approx(GOLDEN["times"]["mean"], abs=1e-5)
    assert round(GOLDEN["times"]["mean"], 3) == 0.744
    numbers = (1000 * shares).round()
    torch.testing.assert_close(numbers, 1000 * shares, rtol=0, atol=1e-9)
    assert (numbers.min(), numbers.max()) == (1, 1000)
    for number, expected in GOLDEN["times"]["cdf"].items():
        assert float((numbers <= int(number)).double().mean()) == pytest.approx(expected, abs=1e-5)


def test_the_network_is_fed_whole_timesteps_in_training() -> None:
    options = replace(TimestepOptions.from_defaults(), timestep_sampling=TRUNCATED_LOGIT)
    times = draw(options, 64, torch.Generator().manual_seed(0), noise_spec=NOISE)
    assert torch.equal(times.timesteps, times.timesteps.round())
    torch.testing.assert_close(times.timesteps, 1000 * times.sigmas)


def test_the_scripts_train_at_these_times_by_default() -> None:
    import moss_image_train
    import moss_image_train_network

    for script in (moss_image_train, moss_image_train_network):
        assert script.changes.settings["timestep_sampling"]["default"] == TRUNCATED_LOGIT


def test_a_training_on_sft_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    options = own.MossImageTrainingOptions.from_defaults()
    for name in ("moss_image_base_bf16", "moss_image_sft_bf16"):
        files = write_tiny_moss_image(tmp_path / name, name=name)
        family_for_training(replace(options, dit=files.dit))
    assert "Base is intended for training" in caplog.text
    assert "moss_image_base" not in caplog.text


def test_noise_and_pictures_are_in_float32_whatever_the_transformer_computes_in(family: MossImage) -> None:
    """As released: in 16 bits latents would be rounded between steps."""
    in_16_bits = replace(family, files=replace(family.files, dit_dtype=torch.bfloat16))
    assert in_16_bits.files.load_vae(torch.device("cpu")).dtype == torch.float32
    assert in_16_bits.noise_dtype == torch.float32
