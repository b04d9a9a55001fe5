"""The frozen model as a teacher: --teacher base."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from checkpoints.writing import save_tensors
from modules.errors import OptionError
from tests.training import toy
from tests.training.test_speed import COMPILED, KINDS, write_file
from tests.training.toy_images import train_image_toy, write_images
from training.run import prepare_run
from training.targets.passes import training_loss

pytestmark = pytest.mark.usefixtures("nothing_compiled")

ALONE = ["--teacher", "base", "--teacher_weight", 1]


def write_dropping(folder: Path, **more: int) -> None:
    """Caches with captions that are dropped."""
    toy.write_caches(folder, more="caption_dropout_rate = 0.6\n", **more)
    save_tensors(folder / "cache" / "toy_te.empty.safetensors", {"varlen_letters_float32": torch.zeros(1, 1)})


def ups(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [tensor for name, tensor in tensors.items() if "lora_up" in name]


@pytest.mark.parametrize("how", [[], ["--gradient_checkpointing", "--blocks_to_swap", 1], COMPILED])
def test_an_untrained_network_has_nothing_to_learn_from_an_equally_told_teacher(
    tmp_path: Path, how: list[object]
) -> None:
    """At weight 1 all of the loss is the distance to the base, which an untrained LoRA is."""
    toy.write_caches(tmp_path)

    assert not any(tensor.any() for tensor in ups(toy.train_toy(tmp_path, *how, *ALONE)))


def test_a_teacher_that_is_told_dropped_captions_does_teach(tmp_path: Path) -> None:
    write_dropping(tmp_path)

    assert any(tensor.any() for tensor in ups(toy.train_toy(tmp_path, *ALONE)))


def test_the_loss_is_that_of_the_formula_and_the_draws_stay(tmp_path: Path) -> None:
    """Every batch of an epoch by hand; all random numbers are those of a run without a teacher."""
    write_dropping(tmp_path, batch_size=2)
    family, weight = toy.ToyFamily(), 0.3
    with prepare_run(family, toy.toy_options(tmp_path)) as run:
        plain = [run.feed.read((0, index)) for index in range(3)]
        assert run.rule.list_comparisons is None
    assert all(not batch.batch.undropped for batch in plain)

    told = 0
    with prepare_run(
        family, toy.toy_options(tmp_path, "--teacher", "base", "--teacher_weight", weight)
    ) as run:
        dit = run.model.dits.on_device(0)
        for parameter in run.parameters:  # a network that has an effect
            parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
        for index, batch in enumerate(plain):
            ours = run.feed.read((0, index))
            assert torch.equal(ours.noise, batch.noise)
            assert torch.equal(ours.timesteps, batch.timesteps)
            assert ours.batch.captions == batch.batch.captions
            dropped = batch.batch.tensors["letters"]
            texts = ours.batch.undropped.get("letters", dropped)
            told += texts is not dropped
            latents = toy.LATENT.to_model(batch.batch.tensor("latents"))
            share = batch.sigmas.view(-1, 1, 1, 1, 1)
            noisy = (1 - share) * latents + share * batch.noise
            with torch.no_grad(), run.model.trainable.as_base():
                taught = dit(noisy, batch.timesteps, texts)
            with torch.no_grad():
                output = dit(noisy, batch.timesteps, dropped)
                found = training_loss(family, dit, ours, run.autocast, run.rule)
            expected = (1 - weight) * mse_loss(output, batch.noise - latents)
            expected = expected + weight * mse_loss(output, taught)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert told


def test_the_validation_loss_is_measured_without_the_teacher(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    words = ["--validation_split", 0.2]
    with prepare_run(toy.ToyFamily(), toy.toy_options(tmp_path, *words)) as run:
        assert run.validation is not None
        default = run.validation.measure(run.model.dits.on_device, run.autocast)
    with prepare_run(toy.ToyFamily(), toy.toy_options(tmp_path, *words, "--teacher", "base")) as run:
        assert run.validation.measure(run.model.dits.on_device, run.autocast) == default


def test_the_teacher_has_the_adapter_as_the_network_has(tmp_path: Path) -> None:
    """So an untrained network has nothing to learn from it, and least of all to undo the adapter."""
    toy.write_caches(tmp_path)
    words = ["--training_adapter", write_file(tmp_path, KINDS["LoRA"]), *ALONE]
    with prepare_run(toy.ToyFamily(), toy.toy_options(tmp_path, *words)) as run:
        batch = run.feed.read((0, 0))
        with torch.no_grad(), run.model.dits.loras[0].switched_to(is_on=True):
            assert (
                training_loss(toy.ToyFamily(), run.model.dits.on_device(0), batch, run.autocast, run.rule)
                == 0
            )


STATES = ["--save_every_n_steps", 2, "--save_state", "--resume", "latest"]


@pytest.mark.slow
def test_a_killed_run_ends_with_equal_bytes(tmp_path: Path) -> None:
    write_dropping(tmp_path)
    words = [*STATES, "--teacher", "base", "--network_dropout", 0.2]
    expected = toy.train_toy(tmp_path, *words)

    words += ["--max_data_loader_n_workers", 2]
    assert toy.same(toy.train_with_kills(tmp_path, *words, moments=(3, 2)), expected)
    metadata = toy.metadata_of(tmp_path / "killed" / "x.safetensors")
    assert (metadata["ss_teacher"], metadata["ss_teacher_weight"]) == ("base", "0.5")


def test_a_resumed_run_may_have_another_teacher_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy.write_caches(tmp_path)
    toy.train_toy(tmp_path, *STATES, "--max_train_steps", 4)
    toy.train_toy(tmp_path, *STATES, "--teacher", "base")

    assert "--teacher was None when the state was saved; it is base from here on" in caplog.text
    assert "does not say" not in caplog.text


def test_a_model_that_can_be_told_nothing_else_is_refused(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    family = toy.ToyFamily(teacher_only_conditions=())

    with pytest.raises(OptionError, match="--teacher base: the model toy takes no additional"):
        toy.train_toy(tmp_path, "--teacher", "base", family=family)
    assert not family.passes


def test_captions_that_are_encoded_while_training_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path, texts=True)

    with pytest.raises(OptionError, match="--teacher base: captions are encoded while training here, by"):
        train_image_toy(tmp_path, "--teacher", "base")
