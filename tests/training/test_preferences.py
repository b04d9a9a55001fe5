"""Preferences: --preference, on a toy with caches of pairs."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import logsigmoid

from checkpoints.writing import save_tensors
from dataset.cache.records import CacheChecks
from dataset.cache_files import FLIPPED
from modules.errors import CacheError, DatasetError, OptionError
from tests.training import toy
from tests.training.test_targets import Step, compare_steps, masks_of, write_masks
from training.run import prepare_run
from training.targets.passes import loss_passes

pytestmark = pytest.mark.usefixtures("nothing_compiled")

PAIRS = 'worse_directory = "worse"\n'


def write_pairs(folder: Path, more: str = PAIRS, **settings: Any) -> None:
    """Caches of pictures with worse ones."""
    toy.write_caches(folder, more=more, **settings)
    generator = torch.Generator().manual_seed(2)
    for path in sorted((folder / "cache").glob("*_toy.safetensors")):
        tensors = load_file(path)
        rejected = torch.randn(2, 1, 4, 4, generator=generator)
        save_tensors(path, {**tensors, "latents_worse_1x4x4_float32": rejected})


def error(step: Step, latents: Tensor, is_base: bool, mask: Tensor | float = 1.0) -> Tensor:
    """Return the error of each sample at the noise and the level of the better ones."""
    noisy_batch = step.noisy_batch
    share = noisy_batch.sigmas.view(-1, 1, 1, 1, 1)
    noisy = (1 - share) * latents + share * noisy_batch.noise

    def predict() -> Tensor:
        output: Tensor = step.dit(noisy, noisy_batch.timesteps, step.texts)
        return output

    if is_base:
        with torch.no_grad(), step.run.model.trainable.as_base():
            output = predict()
    else:
        output = predict()
    return (mask * (output - (noisy_batch.noise - latents)).square()).flatten(1).mean(1)


@pytest.mark.parametrize("data_weight", [0, 0.25])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_loss_of_pairs_and_its_gradient(tmp_path: Path, data_weight: float, batch_size: int) -> None:
    write_pairs(tmp_path, batch_size=batch_size)

    def expected(step: Step) -> Tensor:
        better = step.latents
        assert step.noisy_batch.batch.rejected is not None
        rejected = toy.LATENT.to_model(step.noisy_batch.batch.rejected)
        margin = error(step, better, True) - error(step, better, False)
        margin = margin + error(step, rejected, False) - error(step, rejected, True)
        return (-logsigmoid(margin * 50 / 2) + data_weight * error(step, better, False)).mean()

    words: list[object] = ["--preference", 50]
    words += ["--preference_data_weight", data_weight] if data_weight else []
    compare_steps(tmp_path, words, expected)


def test_masks_count_in_the_errors_of_both(tmp_path: Path) -> None:
    """One mask is for both of a pair, as both have one crop."""
    write_pairs(tmp_path, batch_size=2)
    write_masks(tmp_path)

    def expected(step: Step) -> Tensor:
        better = step.latents
        assert step.noisy_batch.batch.rejected is not None
        rejected = toy.LATENT.to_model(step.noisy_batch.batch.rejected)
        mask = masks_of(step)
        margin = error(step, better, True, mask) - error(step, better, False, mask)
        margin = margin + error(step, rejected, False, mask) - error(step, rejected, True, mask)
        return -logsigmoid(margin * 50 / 2).mean()

    compare_steps(tmp_path, ["--preference", 50], expected)


def test_the_average_of_weights_is_that_of_the_steps_and_goes_on(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    words = ("--preference", 2000, "--ema_decay", 0.5)
    state = ("--save_state", "--save_every_n_steps", 4)
    full = toy.train_toy(tmp_path, *words, *state, "--output_dir", tmp_path / "whole")
    plain = toy.train_toy(tmp_path, "--preference", 2000, "--output_dir", tmp_path / "plain")
    resume = ("--resume", tmp_path / "whole" / "x-step00000004-state")
    resumed = toy.train_toy(tmp_path, *words, *resume, "--output_dir", tmp_path / "resumed")

    assert toy.same(full, plain)
    assert toy.same(resumed, full)
    first, second = (load_file(tmp_path / name / "x-ema.safetensors") for name in ("whole", "resumed"))
    assert toy.same(first, second)
    assert not toy.same(first, full)


def test_a_mirrored_pair_has_both_mirrored(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    for path in sorted((tmp_path / "cache").glob("*_toy.safetensors")):
        tensors = load_file(path)
        mirrored = {
            name.replace("_1x4x4", f"{FLIPPED}_1x4x4"): tensor.flip(-1).contiguous()
            for name, tensor in tensors.items()
        }
        save_tensors(path, {**tensors, **mirrored})
    with prepare_run(toy.ToyFamily(), toy.toy_options(tmp_path, "--preference", 2000)) as run:
        items = run.feed.order.epoch(0)[0]
        plain, flipped = (
            run.feed.sources.read(
                items, checks=CacheChecks(), seed_parts=("x",), flips=(flip,), reads_rejected=True
            )
            for flip in (False, True)
        )

    assert plain.rejected is not None
    assert flipped.rejected is not None
    assert torch.equal(flipped.rejected, plain.rejected.flip(-1))
    assert torch.equal(flipped.tensor("latents"), plain.tensor("latents").flip(-1))


def test_the_first_loss_is_the_logarithm_of_two(tmp_path: Path) -> None:
    write_pairs(tmp_path, batch_size=2)
    family = toy.ToyFamily()
    with prepare_run(family, toy.toy_options(tmp_path, "--preference", 2000)) as run:
        noisy_batch = run.feed.read((0, 0))
        ((loss,),) = loss_passes(family, run.model.dits.on_device(0), noisy_batch, run.autocast, run.rule)

        (tally,) = run.features.tallies
        numbers = tally.take()
    assert loss.item() == torch.tensor(2.0).log().item()
    assert numbers is not None
    assert numbers[2] == 0
    assert math.isfinite(float(numbers.sum()))


def test_pairs_cost_two_passes_of_twice_the_size(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    family = toy.ToyFamily()
    trained = toy.train_toy(tmp_path, "--preference", 2000, family=family)

    assert family.passes == [False, True] * 8
    metadata = toy.metadata_of(tmp_path / "output" / "x.safetensors")
    assert metadata["ss_preference"] == "2000.0"
    again = toy.train_toy(tmp_path, "--preference", 2000, "--output_dir", tmp_path / "again")
    assert toy.same(trained, again)


def test_accumulated_steps_and_a_resumed_run(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    words = ("--preference", 2000, "--gradient_accumulation_steps", 2)
    state = ("--save_state", "--save_every_n_steps", 4)
    full = toy.train_toy(tmp_path, *words, *state, "--output_dir", tmp_path / "whole")
    resume = ("--resume", tmp_path / "whole" / "x-step00000004-state")

    assert toy.same(toy.train_toy(tmp_path, *words, *resume, "--output_dir", tmp_path / "resumed"), full)


def test_pairs_change_nothing_of_a_usual_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pairs(tmp_path)
    with_pairs = toy.train_toy(tmp_path)
    assert "worse_directory has no effect in this run" in caplog.text
    toy.write_caches(tmp_path)

    assert toy.same(toy.train_toy(tmp_path, "--output_dir", tmp_path / "plain"), with_pairs)


def test_items_without_worse_ones_are_refused(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    with pytest.raises(DatasetError, match="has no worse_directory"):
        toy.train_toy(tmp_path, "--preference", 2000)
    toy.write_caches(tmp_path, more=PAIRS)
    with pytest.raises(CacheError, match="it has no latents of a worse one, which --preference needs"):
        toy.train_toy(tmp_path, "--preference", 2000)


def test_latents_of_two_sizes_are_refused(tmp_path: Path) -> None:
    toy.write_caches(tmp_path, more=PAIRS)
    for path in sorted((tmp_path / "cache").glob("*_toy.safetensors")):
        save_tensors(path, {**load_file(path), "latents_worse_1x4x2_float32": torch.zeros(2, 1, 4, 2)})

    with pytest.raises(CacheError, match="the latents of its worse one are 2x1x4x2, but its own are 2x1x4x4"):
        toy.train_toy(tmp_path, "--preference", 2000)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--guided_target", 3), "has no place for another target"),
        (("--teacher", "base"), "has no place for another target"),
        (("--blank_prior_weight", 1), "has no place for another target"),
        (("--mask_prior_weight", 1), "has no place for another target"),
    ],
)
def test_other_targets_are_refused(tmp_path: Path, words: tuple[object, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        toy.toy_options(tmp_path, "--preference", 2000, *words)


def test_a_weight_needs_pairs_and_beta_is_above_zero(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--preference"):
        toy.toy_options(tmp_path, "--preference_data_weight", 1)
    with pytest.raises(OptionError, match="above 0"):
        toy.toy_options(tmp_path, "--preference", 0)


def test_full_fine_tuning_is_refused(tmp_path: Path) -> None:
    with pytest.raises((SystemExit, OptionError)):
        toy.toy_options(tmp_path, "--preference", 2000, full_dit=True)
