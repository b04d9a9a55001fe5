"""Another frozen model as a teacher: --teacher dit, with the effect of a LoRA or the whole of it."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from modules.errors import CheckpointError, OptionError
from protocols.family import Abilities
from protocols.loading import Placement
from tests.training import toy
from tests.training.test_speed import KINDS, write_file
from tests.training.test_targets import Step, write_project
from training.features.phases import TARGETS
from training.other_models import OtherFamilies
from training.run import prepare_run
from training.targets.passes import loss_passes
from training.training_run import TrainingRun

pytestmark = pytest.mark.usefixtures("nothing_compiled")


@dataclass(frozen=True)
class OtherToy(toy.ToyFamily):
    """The toy with other weights."""

    width: int = toy.WIDTH
    is_unused: bool = False  # nothing but its header may be read

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        assert placement.device.type == "meta" or not self.is_unused, "its weights were read"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(99)
            dit = toy.ToyDit()
        if self.width != toy.WIDTH:
            dit.head = nn.Linear(self.width, 2)
        return dit.to(placement.device, self.dtype)


@dataclass(frozen=True)
class SampledToy(OtherToy):
    """A model whose samples another transformer may make."""

    abilities: ClassVar[Abilities] = replace(toy.ToyFamily.abilities, sampling_dit_option="--other_dit")


def other_words(folder: Path) -> list[object]:
    file = folder / "teacher.safetensors"
    file.write_bytes(b"")
    return ["--teacher", "dit", "--teacher_weight", 1, "--teacher_dit", file]


def teacher_of(run: TrainingRun) -> Any:
    """Return the model that teaches, of the function of the hooks."""
    (compare,) = run.features.added[TARGETS].around
    return compare.__self__.predict_target.__self__  # type: ignore[attr-defined]


def compare_losses(
    folder: Path,
    words: list[object],
    teacher: Any,
    expected_target: Callable[[Step, Any], Tensor],
) -> None:
    """Compare the loss of three steps, of a network that has an effect, with the distance to a target."""
    family = toy.ToyFamily()
    others = OtherFamilies(with_dit=lambda dit: teacher)
    with prepare_run(family, toy.toy_options(folder, *words), others=others) as run:
        for parameter in run.parameters:
            parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
        model = teacher_of(run)
        for index in range(3):
            step = Step(run, run.feed.read((0, index)))
            target = expected_target(step, model)
            with torch.no_grad(), contextlib.ExitStack() as stack:
                for adapter in run.model.dits.loras:  # as the loop has them in a step
                    stack.enter_context(adapter.switched_to(is_on=True))
                expected = mse_loss(step.learning(step.texts), target)
                ((loss,),) = loss_passes(family, step.dit, step.noisy_batch, run.autocast, run.rule)
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def predict(step: Step, dit: nn.Module, loras: Any, is_on: bool) -> Tensor:
    share = step.noisy_batch.sigmas.view(-1, 1, 1, 1, 1)
    noisy = (1 - share) * step.latents + share * step.noisy_batch.noise
    with torch.no_grad(), loras.switched_to(is_on):
        output: Tensor = dit(noisy, step.noisy_batch.timesteps, step.texts)
    return output


def test_the_network_learns_another_models_prediction_with_its_lora(tmp_path: Path) -> None:
    write_project(tmp_path)
    lora = write_file(tmp_path, KINDS["LoRA"])
    words = [*other_words(tmp_path), "--teacher_lora", f"{lora}:0.5"]

    def target(step: Step, teacher: Any) -> Tensor:
        with_lora = predict(step, teacher.dit, teacher.loras, is_on=True)
        assert not torch.allclose(with_lora, predict(step, teacher.dit, teacher.loras, is_on=False))
        return with_lora

    compare_losses(tmp_path, words, OtherToy(), target)


def test_only_the_change_by_the_lora_may_be_taught(tmp_path: Path) -> None:
    """b + (T with the LoRA) - T: the trained model keeps its own way where the LoRA changes nothing."""
    write_project(tmp_path)
    lora = write_file(tmp_path, KINDS["LoRA"])
    words = [*other_words(tmp_path), "--teacher_lora", lora, "--teacher_delta"]

    def target(step: Step, teacher: Any) -> Tensor:
        with_lora = predict(step, teacher.dit, teacher.loras, is_on=True)
        without = predict(step, teacher.dit, teacher.loras, is_on=False)
        return step.base(step.texts) + with_lora - without

    compare_losses(tmp_path, words, OtherToy(), target)


def test_the_trained_transformer_may_teach_with_a_lora_and_without_its_adapter(tmp_path: Path) -> None:
    """As for a Lightning LoRA: what is distilled is an adapter of the same transformer."""
    write_project(tmp_path)
    (tmp_path / "adapter").mkdir()
    adapter = write_file(tmp_path / "adapter", KINDS["LoRA"])
    lora = write_file(tmp_path, KINDS["LoRA"])
    words = ["--teacher", "dit", "--teacher_weight", 1, "--teacher_lora", f"{lora}:-1"]

    def target(step: Step, teacher: Any) -> Tensor:
        assert teacher.dit is step.dit
        with step.run.model.trainable.as_base():
            return predict(step, step.dit, teacher.loras, is_on=True)

    compare_losses(tmp_path, [*words, "--training_adapter", adapter], None, target)


def test_a_teacher_of_another_width_is_refused_by_its_shapes(tmp_path: Path) -> None:
    write_project(tmp_path)
    options = toy.toy_options(tmp_path, *other_words(tmp_path))

    message = r"teacher_dit .*teacher\.safetensors: its head\.weight has the shape \[2, 6\]"
    with (
        pytest.raises(CheckpointError, match=message),
        prepare_run(
            OtherToy(is_unused=True),
            options,
            others=OtherFamilies(with_dit=lambda dit: OtherToy(width=6, is_unused=True)),
        ),
    ):
        pass


def test_a_model_for_samples_of_another_width_is_refused_by_its_shapes(tmp_path: Path) -> None:
    write_project(tmp_path)
    others = OtherFamilies(sampling=OtherToy(width=6, is_unused=True))

    message = r"--other_dit: its head\.weight has the shape \[2, 6\], but in the trained transformer \[2, 8\]"
    with (
        pytest.raises(CheckpointError, match=message),
        prepare_run(SampledToy(is_unused=True), toy.toy_options(tmp_path), others=others),
    ):
        pass


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--teacher dit", r"--teacher dit: pass the transformer to learn from \(--teacher_dit FILE\)"),
        ("--teacher base --teacher_lora {file}", "--teacher_lora is for --teacher dit"),
        ("--teacher base --teacher_dit {file}", "--teacher_dit is for --teacher dit"),
        ("--teacher_delta", "--teacher_delta needs --teacher_lora"),
        ("--teacher dit --teacher_dit {file} --teacher_delta", "--teacher_delta needs --teacher_lora"),
        ("--teacher dit --teacher_lora nothing.safetensors", "--teacher_lora nothing.safetensors: no such"),
        ("--teacher dit --teacher_lora {file}:nan", "the multiplier is nan"),
    ],
)
def test_mistakes_are_refused_before_anything_is_loaded(tmp_path: Path, words: str, message: str) -> None:
    write_project(tmp_path)
    file = tmp_path / "other.safetensors"
    file.write_bytes(b"")

    with pytest.raises(OptionError, match=message):
        toy.toy_options(tmp_path, *words.format(file=file).split())
