"""Targets besides the clip: --guided_target, the teacher's band and shape, and the two priors."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, mse_loss

from checkpoints.writing import save_tensors
from dataset.cache_files import write_tensors
from modules.errors import CacheError, OptionError
from protocols.data import LOSS_MASK
from tests.training import toy
from training.features.teacher_errors import Split, magnitude_direction_errors
from training.loss import NoisyBatch
from training.run import prepare_run
from training.targets.passes import loss_passes
from training.training_run import TrainingRun

pytestmark = pytest.mark.usefixtures("nothing_compiled")

EMPTY_TEXT = -0.7  # what the cache of the empty prompt holds


def write_project(folder: Path, more: str = "", **settings: Any) -> None:
    """Caches of pictures and of the empty prompt."""
    toy.write_caches(folder, more=more, **settings)
    empty = {"varlen_letters_float32": torch.full((1, 1), EMPTY_TEXT)}
    save_tensors(folder / "cache" / "toy_te.empty.safetensors", empty)


@dataclass(frozen=True)
class Step:
    """What a step by hand needs: the networks' predictions for a batch at its noised input."""

    run: TrainingRun
    noisy_batch: NoisyBatch

    @property
    def dit(self) -> nn.Module:
        return self.run.model.dits.on_device(0)

    @property
    def latents(self) -> Tensor:
        return toy.LATENT.to_model(self.noisy_batch.batch.tensor("latents"))

    @property
    def velocity(self) -> Tensor:
        return self.noisy_batch.noise - self.latents

    @property
    def texts(self) -> Any:
        return self.noisy_batch.batch.tensors["letters"]

    @property
    def empty_texts(self) -> list[Tensor]:
        return [torch.full((1, 1), EMPTY_TEXT)] * len(self.noisy_batch.batch)

    def learning(self, texts: Any) -> Tensor:
        share = self.noisy_batch.sigmas.view(-1, 1, 1, 1, 1)
        noisy = (1 - share) * self.latents + share * self.noisy_batch.noise
        output: Tensor = self.dit(noisy, self.noisy_batch.timesteps, texts)
        return output

    def base(self, texts: Any) -> Tensor:
        with torch.no_grad(), self.run.model.trainable.as_base():
            return self.learning(texts)


def compare_steps(
    folder: Path, words: list[object], expected_loss: Callable[[Step], Tensor], family: Any = None
) -> None:
    """Compare loss and gradient of three steps, of a network that has an effect, with a formula."""
    family = family or toy.ToyFamily()
    with prepare_run(family, toy.toy_options(folder, *words)) as run:
        for parameter in run.parameters:
            parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
        for index in range(3):
            step = Step(run, run.feed.read((0, index)))
            expected = expected_loss(step)
            expected_gradients = torch.autograd.grad(expected, run.parameters)
            loss = torch.zeros(())
            dit = step.dit
            for (streams,) in loss_passes(family, dit, step.noisy_batch, run.autocast, run.rule):
                streams.backward()
                loss = loss + streams.detach()
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
            for parameter, gradient in zip(run.parameters, expected_gradients, strict=True):
                assert parameter.grad is not None
                torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
                parameter.grad = None


def guided(scale: float, lowest: float = 0) -> Callable[[Step], Tensor]:
    def loss(step: Step) -> Tensor:
        with torch.no_grad():
            away = step.learning(step.empty_texts)
        moved = away + scale * (step.velocity - away)
        is_above = (step.noisy_batch.sigmas >= lowest).view(-1, 1, 1, 1, 1)
        target = torch.where(is_above, moved, step.velocity)
        return mse_loss(step.learning(step.texts), target)

    return loss


@pytest.mark.parametrize("lowest", [0, 500])
def test_the_guided_target_is_moved_away_from_the_prediction_without_a_prompt(
    tmp_path: Path, lowest: int
) -> None:
    """The network that learns predicts it, from the same noised input; both sides of the bound are drawn."""
    write_project(tmp_path, batch_size=2)
    words = ["--guided_target", 3.5, "--guided_target_min_timestep", lowest]

    compare_steps(tmp_path, words, guided(3.5, lowest / 1000))


def test_a_step_below_the_bound_costs_no_pass(tmp_path: Path) -> None:
    write_project(tmp_path)
    family = toy.ToyFamily()
    toy.train_toy(tmp_path, "--guided_target", 3, "--guided_target_min_timestep", 500, family=family)

    with prepare_run(family, toy.toy_options(tmp_path)) as run:
        batches = [run.feed.read((epoch, index)) for epoch in range(2) for index in range(5)][:8]
    above = sum(float(batch.sigmas[0]) >= 0.5 for batch in batches)
    assert 0 < above < 8
    assert family.passes.count(False) == above
    assert family.passes.count(True) == 8


def test_a_dropped_caption_keeps_the_usual_target(tmp_path: Path) -> None:
    """It would be moved away from the network's own prediction."""
    write_project(tmp_path, more="caption_dropout_rate = 1.0\n")
    plain = toy.train_toy(tmp_path)

    family = toy.ToyFamily()
    assert toy.same(toy.train_toy(tmp_path, "--guided_target", 4, family=family), plain)
    assert not family.passes.count(False)


def test_the_whole_model_may_have_a_guided_target(tmp_path: Path) -> None:
    write_project(tmp_path)

    plain = toy.train_toy(tmp_path, full_dit=True)
    moved = toy.train_toy(tmp_path, "--guided_target", 3, full_dit=True)
    assert not toy.same(plain, moved)


def test_the_draws_of_a_run_stay(tmp_path: Path) -> None:
    """Also those of dropout: the pass without a prompt has the masks of the pass that learns."""
    write_project(tmp_path)
    words = ["--network_dropout", 0.3]
    with prepare_run(toy.ToyFamily(), toy.toy_options(tmp_path, *words)) as run:
        plain = [run.feed.read((0, index)) for index in range(3)]
    with prepare_run(toy.ToyFamily(), toy.toy_options(tmp_path, *words, "--guided_target", 3)) as run:
        for index, batch in enumerate(plain):
            drawn = run.feed.read((0, index))
            assert torch.equal(drawn.noise, batch.noise)
            assert torch.equal(drawn.timesteps, batch.timesteps)


def test_a_missing_cache_of_the_empty_prompt_is_named_with_its_command(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)

    for words in (["--guided_target", 3], ["--blank_prior_weight", 1]):
        with pytest.raises(CacheError, match=r"toy_te\.empty\.safetensors.*\n[\s\S]*--empty_prompt"):
            toy.train_toy(tmp_path, *words)


def teacher_loss(step: Step, weight: float, compare: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """(1 - W) of the usual loss + W of another; compare: of output, full target, anchor."""
    full = step.noisy_batch.batch.undropped.get("letters", step.texts)
    output = step.learning(step.texts)
    data = (output - step.velocity).square().flatten(1).mean(1)
    taught = compare(output, step.base(full), step.base(step.texts))
    return ((1 - weight) * data + weight * taught).mean()


def squares(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().flatten(1).mean(1)


def test_a_teacher_knows_more_only_within_its_band(tmp_path: Path) -> None:
    """Outside it is the anchor, told what the network is told, with a weight of its own."""
    write_project(tmp_path, more="caption_dropout_rate = 0.6\n", batch_size=2)
    words = ["--teacher", "base", "--teacher_weight", 0.7, "--teacher_max_timestep", 520]
    words += ["--teacher_min_timestep", 100, "--teacher_anchor_weight", 0.4]

    def loss(step: Step) -> Tensor:
        levels = step.noisy_batch.sigmas
        is_inside = (levels >= 0.1) & (levels <= 0.52)

        def compare(output: Tensor, full: Tensor, anchor: Tensor) -> Tensor:
            return torch.where(is_inside, squares(output, full), 0.4 * squares(output, anchor))

        return teacher_loss(step, 0.7, compare)

    compare_steps(tmp_path, words, loss)


def test_a_focus_inside_the_band_leaves_the_anchor_its_pull(tmp_path: Path) -> None:
    """Half of all draws go to 0.2..0.4, so that the anchor's are half as many as with `uniform` alone."""
    write_project(tmp_path, more="caption_dropout_rate = 0.6\n", batch_size=2)
    words = ["--teacher", "base", "--teacher_weight", 0.7, "--teacher_max_timestep", 500]
    words += ["--timestep_sampling", "uniform", "--timestep_focus", 0.5, "--timestep_focus_range", 200, 400]

    def loss(step: Step) -> Tensor:
        is_inside = step.noisy_batch.sigmas <= 0.5

        def compare(output: Tensor, full: Tensor, anchor: Tensor) -> Tensor:
            return torch.where(is_inside, squares(output, full), 2 * squares(output, anchor))

        return teacher_loss(step, 0.7, compare)

    compare_steps(tmp_path, words, loss)


def by_parts(output: Tensor, target: Tensor, size: float, colour: float) -> Tensor:
    """The split form of one sample at a time."""
    errors = []
    for p, t in zip(output, target, strict=True):
        p = p - (1 - math.sqrt(colour)) * (p - t).mean(dim=(1, 2, 3), keepdim=True)
        turn = 1 - cosine_similarity(p.flatten(), t.flatten(), dim=0)
        error = size * (p.norm() - t.norm()) ** 2 + 2 * p.norm().detach() * t.norm() * turn
        errors.append(error / p.numel())
    return torch.stack(errors)


def test_the_teachers_size_and_direction_have_their_own_weights(tmp_path: Path) -> None:
    """Inside the band; the anchor has them in equal parts."""
    write_project(tmp_path, more="caption_dropout_rate = 0.6\n", batch_size=2)
    words = ["--teacher", "base", "--teacher_weight", 1, "--teacher_max_timestep", 520]
    words += ["--teacher_split", "--teacher_size_weight", 0.25, "--teacher_colour_weight", 0.3]

    def loss(step: Step) -> Tensor:
        is_inside = step.noisy_batch.sigmas <= 0.52

        def compare(output: Tensor, full: Tensor, anchor: Tensor) -> Tensor:
            return torch.where(is_inside, by_parts(output, full, 0.25, 0.3), by_parts(output, anchor, 1, 1))

        return teacher_loss(step, 1, compare)

    compare_steps(tmp_path, words, loss)


def test_the_split_form_has_the_value_of_the_squares_at_even_weights() -> None:
    generator = torch.Generator().manual_seed(5)
    output = torch.randn(2, 3, 2, 4, 4, generator=generator)
    target = torch.randn(2, 3, 2, 4, 4, generator=generator)

    torch.testing.assert_close(
        magnitude_direction_errors(output, target, Split(1.0, 1.0), has_channels=True),
        squares(output, target),
    )
    lighter = magnitude_direction_errors(output + 0.5, output, Split(1.0, 0.25), has_channels=True)
    torch.testing.assert_close(lighter, torch.full((2,), 0.25 * 0.25))  # a pure shift of all channels
    heard = magnitude_direction_errors(output + 0.5, output, Split(1.0, 0.25), has_channels=False)
    torch.testing.assert_close(heard, torch.full((2,), 0.25))


def write_masks(folder: Path) -> None:
    """Give two of five caches a mask: one half is learned."""
    mask = torch.zeros(1, 4, 4, dtype=torch.float16)
    mask[:, :, :2] = 1
    mask[:, :, 2] = 0.25
    for index in (1, 3):
        path = folder / "cache" / f"clip{index}_0032x0032_toy.safetensors"
        write_tensors(path, {**load_file(path), LOSS_MASK: mask}, {})


def masks_of(step: Step) -> Tensor:
    masks = step.noisy_batch.batch.tensors.get(LOSS_MASK)
    if masks is None:
        return torch.ones(len(step.noisy_batch.batch), 1, 1, 4, 4)
    assert isinstance(masks, Tensor)
    return masks.float().unsqueeze(1)


def test_outside_a_mask_the_network_is_held_to_the_base_model(tmp_path: Path) -> None:
    write_project(tmp_path)
    write_masks(tmp_path)
    family = toy.ToyFamily()

    def loss(step: Step) -> Tensor:
        output, mask = step.learning(step.texts), masks_of(step)
        inside = mask * (output - step.velocity).square()
        outside = 0.5 * (1 - mask) * (output - step.base(step.texts)).square()
        return (inside + outside).mean()

    compare_steps(tmp_path, ["--mask_prior_weight", 0.5], loss, family)

    family = toy.ToyFamily()
    toy.train_toy(tmp_path, "--mask_prior_weight", 0.5, "--max_train_steps", 5, family=family)
    assert family.passes.count(False) == 2  # of five items, two have a mask


def test_the_empty_prompt_is_held_to_the_base_model(tmp_path: Path) -> None:
    write_project(tmp_path, batch_size=2)

    def loss(step: Step) -> Tensor:
        blank = mse_loss(step.learning(step.empty_texts), step.base(step.empty_texts))
        return mse_loss(step.learning(step.texts), step.velocity) + 0.8 * blank

    compare_steps(tmp_path, ["--blank_prior_weight", 0.8], loss)


def test_targets_may_be_had_together(tmp_path: Path) -> None:
    write_project(tmp_path)
    write_masks(tmp_path)
    words = ["--guided_target", 2, "--blank_prior_weight", 0.5, "--mask_prior_weight", 0.25]

    def loss(step: Step) -> Tensor:
        with torch.no_grad():
            away = step.learning(step.empty_texts)
        output, mask = step.learning(step.texts), masks_of(step)
        target = away + 2 * (step.velocity - away)
        outside = 0.25 * (1 - mask) * (output - step.base(step.texts)).square()
        blank = mse_loss(step.learning(step.empty_texts), step.base(step.empty_texts))
        return (mask * (output - target).square() + outside).mean() + 0.5 * blank

    compare_steps(tmp_path, words, loss)


ALL_TARGETS = ["--guided_target", 3, "--blank_prior_weight", 0.5, "--mask_prior_weight", 0.5]


def test_validation_is_the_usual_loss_with_all_targets(tmp_path: Path) -> None:
    write_project(tmp_path)
    write_masks(tmp_path)
    words = ["--validation_split", 0.2]
    losses = []
    for targets in ([], ALL_TARGETS, ["--teacher", "base", "--teacher_split"]):
        with prepare_run(toy.ToyFamily(), toy.toy_options(tmp_path, *words, *targets)) as run:
            assert run.validation is not None
            losses.append(run.validation.measure(run.model.dits.on_device, run.autocast))
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.slow
def test_a_killed_run_with_all_targets_ends_with_equal_bytes(tmp_path: Path) -> None:
    write_project(tmp_path)
    write_masks(tmp_path)
    words = [*ALL_TARGETS, "--save_every_n_steps", 2, "--save_state", "--resume", "latest"]
    words += ["--network_dropout", 0.2]
    expected = toy.train_toy(tmp_path, *words)

    words += ["--max_data_loader_n_workers", 2]
    assert toy.same(toy.train_with_kills(tmp_path, *words, moments=(3, 2)), expected)


def test_the_file_says_what_its_network_learned_towards(tmp_path: Path) -> None:
    write_project(tmp_path)
    write_masks(tmp_path)
    toy.train_toy(tmp_path, *ALL_TARGETS, "--max_train_steps", 1)

    metadata = toy.metadata_of(tmp_path / "output" / "x.safetensors")
    names = ("ss_guided_target", "ss_blank_prior_weight", "ss_mask_prior_weight")
    assert [metadata[name] for name in names] == ["3.0", "0.5", "0.5"]
    assert "ss_teacher" not in metadata


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--guided_target 3 --teacher base",
            "--guided_target 3 and --teacher base both choose what is learned",
        ),
        ("--guided_target 1", "--guided_target 1: use a number above 1 and of at most 20"),
        ("--guided_target_min_timestep 150", "--guided_target_min_timestep needs --guided_target"),
        ("--guided_target 3 --guided_target_sound 3", "the model toy has no sound"),
        ("--teacher_split", "--teacher_split needs --teacher"),
        ("--teacher base --teacher_size_weight 0.5", "--teacher_size_weight needs --teacher_split"),
        ("--teacher base --teacher_anchor_weight 2", "--teacher_anchor_weight needs"),
        ("--teacher base --teacher_split --loss_type l1", "--teacher_split with --loss_type l1"),
        ("--teacher base --teacher_min_timestep 700 --teacher_max_timestep 600", "the first has to be"),
        ("--teacher base --teacher_sees clip", "--teacher_sees clip: the model toy takes no such condition"),
        ("--mask_prior_weight 0", "--mask_prior_weight 0: use a number above 0"),
        ("--mask_prior_weight 0.5", "--mask_prior_weight 0.5: no item has a mask"),
    ],
)
def test_contradictions_are_refused_before_anything_is_loaded(
    tmp_path: Path, words: str, message: str
) -> None:
    write_project(tmp_path)
    family = toy.ToyFamily()

    with pytest.raises(OptionError, match=message):
        toy.train_toy(tmp_path, *words.split(), family=family)
    assert not family.passes
