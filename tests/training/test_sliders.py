"""Sliders: --slider FILE of captions, and tables with a network_multiplier."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from modules.errors import DatasetError, OptionError
from tests.training import toy
from tests.training.test_targets import Step, write_project
from training.features.slider_file import read_sliders
from training.run import prepare_run
from training.targets.passes import loss_passes

pytestmark = pytest.mark.usefixtures("nothing_compiled")

# the toy's encoder takes the length of a text
FILE = """guidance = 2.5
[[sliders]]
positive = "red, red, red"
negative = "blue"
neutral = "a thing"
anchor = "something quite different"
anchor_weight = 0.5
weight = 0.8

[[sliders]]
positive = "longer"
negative = "s"
neutral = "it"
"""


def text_of(caption: str) -> list[Tensor]:
    return [torch.full((1, 1), len(caption) / 100)]


def write_slider(folder: Path, text: str = FILE) -> Path:
    path = folder / "slider.toml"
    path.write_text(text, encoding="utf-8")
    return path


def slider_loss(step: Step, texts: Sequence[str], anchor: str | None, weights: tuple[float, float]) -> Tensor:
    """The loss of one slider with guidance 2.5, both strengths together."""
    positive, negative, neutral = map(text_of, texts)
    weight, anchor_weight = weights
    start = step.base(neutral)
    change = step.base(positive) - step.base(negative)
    losses = []
    for strength in (1, -1):
        with step.run.model.trainable.at_strength(strength):
            losses.append(0.5 * weight * mse_loss(step.learning(neutral), start + strength * 2.5 * change))
            if anchor is not None:
                kept = mse_loss(step.learning(text_of(anchor)), step.base(text_of(anchor)))
                losses.append(weight * anchor_weight * kept)
    return torch.stack(losses).sum()


def test_loss_and_gradient_are_those_of_the_formula(tmp_path: Path) -> None:
    """Sliders take turns; an anchor is held at both strengths; the dataset's captions have no part in it."""
    write_project(tmp_path)
    family = toy.ToyFamily()
    with prepare_run(family, toy.toy_options(tmp_path, "--slider", write_slider(tmp_path))) as run:
        for parameter in run.parameters:
            parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
        for index in range(4):
            step = Step(run, run.feed.read((0, index)))
            if index % 2 == 0:
                texts, anchor = ("red, red, red", "blue", "a thing"), "something quite different"
                expected = slider_loss(step, texts, anchor, (0.8, 0.5))
            else:
                expected = slider_loss(step, ("longer", "s", "it"), None, (1.0, 1.0))
            expected_gradients = torch.autograd.grad(expected, run.parameters)
            family.passes.clear()
            loss = torch.zeros(())
            for (error,) in loss_passes(family, step.dit, step.noisy_batch, run.autocast, run.rule):
                error.backward()
                loss = loss + error.detach()
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
            for parameter, gradient in zip(run.parameters, expected_gradients, strict=True):
                assert parameter.grad is not None
                torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
                parameter.grad = None
            assert family.passes.count(False) == (4 if index % 2 == 0 else 3)
            assert run.model.trainable.strength.value == 1


def test_a_table_is_learned_at_its_strength(tmp_path: Path) -> None:
    """Also where a backward pass computes blocks again."""
    for how in ([], ["--gradient_checkpointing"]):
        folder = tmp_path / f"case{len(how)}"
        folder.mkdir()
        write_project(folder, more="network_multiplier = -0.5\n")
        with prepare_run(toy.ToyFamily(), toy.toy_options(folder, *how)) as run:
            assert run.feed.read((0, 0)).batch.network_multiplier == -0.5
        strong = toy.train_toy(folder, *how, "--max_train_steps", 2, "--optimizer_type", "SGD")
        write_project(folder)
        plain = toy.train_toy(folder, *how, "--max_train_steps", 2, "--optimizer_type", "SGD")
        # the first step moves what begins at zero by -0.5 times as much
        assert strong.keys() == plain.keys()
        assert not toy.same(strong, plain)


def test_the_first_step_at_a_strength_is_that_share_of_the_usual_one(tmp_path: Path) -> None:
    """An untrained LoRA has an up matrix of zeros, whose gradient is the strength times the usual one."""
    gradients = []
    for more in ("", "network_multiplier = -0.5\n"):
        write_project(tmp_path, more=more)
        words = ["--max_train_steps", 1, "--optimizer_type", "SGD", "--max_grad_norm", 0]
        tensors = toy.train_toy(tmp_path, *words)
        gradients.append([tensor for name, tensor in sorted(tensors.items()) if "lora_up" in name])
    for default, scaled in zip(*gradients, strict=True):
        torch.testing.assert_close(scaled, -0.5 * default, rtol=1e-5, atol=1e-9)


def test_a_whole_model_has_no_strength(tmp_path: Path) -> None:
    write_project(tmp_path, more="network_multiplier = 2\n")

    with pytest.raises(OptionError, match="network_multiplier is the strength of a LoRA"):
        toy.train_toy(tmp_path, full_dit=True)


@pytest.mark.parametrize("value", ["0", "11", '"strong"', "true"])
def test_a_strength_that_is_none_is_refused(tmp_path: Path, value: str) -> None:
    write_project(tmp_path, more=f"network_multiplier = {value}\n")

    with pytest.raises(DatasetError, match="network_multiplier"):
        toy.train_toy(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"it has no \[\[sliders\]\]"),
        ("positive = 'a'", "unknown key positive. Use guidance, sliders"),
        ("[[sliders]]\npositive = 'a'\nnegative = 'b'", 'it has no neutral. Write neutral = "a caption"'),
        ("[[sliders]]\npositive = 'a'\nnegative = 'a'\nneutral = 'b'", "positive and negative are equal"),
        ("[[sliders]]\npositive = 1\nnegative = 'a'\nneutral = 'b'", "positive = 1 is not a caption"),
        ("guidance = 0\n[[sliders]]\npositive = 'a'\nnegative = 'b'\nneutral = 'c'", "guidance = 0: use"),
        ("[[sliders]]\npositive = 'a'\nnegative = 'b'\nneutral = 'c'\nanchor_weight = 2", "needs an anchor"),
        ("[[sliders]]\npositive = 'a'\nnegative = 'b'\nneutral = 'c'\nweigth = 2", "unknown key weigth"),
        ("[[sliders", "it is not a TOML file"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read_sliders(write_slider(tmp_path, text))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--guided_target 3", "--slider .* with --guided_target 3: a slider learns from its captions alone"),
        ("--teacher base", "--slider .* with --teacher base: a slider learns"),
        ("--blank_prior_weight 1", "--slider .* with --blank_prior_weight 1: a slider"),
        ("--mask_prior_weight 0.5", "--slider .* with --mask_prior_weight 0.5: a slider"),
        ("--preference 2000", "--slider .* with --preference 2000: a slider"),
    ],
)
def test_other_targets_are_refused_beside_it(tmp_path: Path, words: str, message: str) -> None:
    write_project(tmp_path)

    with pytest.raises(OptionError, match=message):
        toy.toy_options(tmp_path, "--slider", write_slider(tmp_path), *words.split())


def test_strengths_of_tables_are_refused_beside_it(tmp_path: Path) -> None:
    """A slider has its own strengths, 1 and -1, which would replace that of the table."""
    write_project(tmp_path, more="network_multiplier = -0.5\n")

    with pytest.raises(OptionError, match="network_multiplier cannot be used with --slider"):
        toy.train_toy(tmp_path, "--slider", write_slider(tmp_path))


def test_the_log_says_that_captions_of_the_dataset_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_project(tmp_path)
    with caplog.at_level("INFO"):
        toy.train_toy(tmp_path, "--slider", write_slider(tmp_path), "--max_train_steps", 1)

    assert "The captions of the dataset are not used: --slider" in caplog.text
