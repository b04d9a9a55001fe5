"""What is refused before a run is prepared, and the training loop on a toy family."""

import contextlib
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dataset.batches.items import find_items
from dataset.batches.order import BatchOrder
from dataset.batches.reading import read_batch
from dataset.config import load_dataset_config
from modules.contract.loading import Placement
from modules.errors import MemoryPlanError, OptionError, OutputError, UserError
from modules.flow.schedule import add_noise
from networks.adapter import make_network
from tests.training.toy import (
    LATENT,
    ToyDit,
    ToyFamily,
    same,
    state_tensors,
    toy_options,
    train_toy,
    write_caches,
)
from training.data.feed import Randomness
from training.loop import take_step
from training.optimizers.stepping import StepAfterBackward
from training.run import prepare_run, train_network
from training.training_run import TrainingRun


def test_products_in_fp8_are_refused_at_start_where_the_device_has_none(tmp_path: Path) -> None:
    write_caches(tmp_path)
    watched: list[int] = []

    with pytest.raises(OptionError, match=r"--fp8_fast: the device cpu has no fp8 units"):
        train_toy(
            tmp_path, "--fp8_base", "--fp8_scaled", "--fp8_fast", family=ToyFamily(watch=watched.append)
        )

    assert not watched
    assert not (tmp_path / "output").exists()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder in which nobody may write is needed")
def test_a_logging_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    write_caches(tmp_path, count=0)  # which would be told later

    with pytest.raises(OutputError, match=r"--logging_dir /proc/x cannot be created"):
        train_toy(tmp_path, "--logging_dir", "/proc/x")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder in which nobody may write is needed")
def test_a_folder_that_nothing_can_be_written_to_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    write_caches(tmp_path)
    watched: list[int] = []

    with pytest.raises(OutputError, match=r"--output_dir /proc/self: nothing can be written there"):
        train_toy(tmp_path, "--output_dir", "/proc/self", family=ToyFamily(watch=watched.append))

    assert not watched


def test_weights_are_those_of_a_loop_written_by_hand(tmp_path: Path) -> None:
    """Five micro-batches, three to a step: the second step of each epoch averages over the two that are
    left.
    """
    write_caches(tmp_path, count=5)
    trained = train_toy(
        tmp_path, "--gradient_accumulation_steps", 3, "--max_train_steps", 4, "--max_grad_norm", 0.5
    )

    options, family = toy_options(tmp_path), ToyFamily()
    dit = family.load_dit(Placement(torch.device("cpu"))).requires_grad_(False)
    network = make_network(options.network, family.lora_module, dit, seed=3)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    order = BatchOrder(find_items(load_dataset_config(tmp_path / "dataset.toml"), "toy", LATENT).items, 3)
    for epoch in range(2):
        for group in (range(3), range(3, 5)):
            for index in group:
                batch = read_batch(order.epoch(epoch)[index], LATENT)
                drawn = Randomness(options.timesteps, 3).add(batch, 5 * epoch + index, 5 * epoch + index)
                latents = batch.tensor("latents") * LATENT.scale
                noisy = add_noise(latents, drawn.noise, drawn.sigmas)
                velocity = dit(noisy, drawn.timesteps, batch.tensors["letters"])
                ((velocity - (drawn.noise - latents)) ** 2).mean().div(len(group)).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()

    expected = network.module.state_dict()
    assert trained.keys() == expected.keys()
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_readers_ahead_of_the_loop_change_nothing(tmp_path: Path) -> None:
    write_caches(tmp_path)
    alone = train_toy(tmp_path)

    assert same(alone, train_toy(tmp_path, "--max_data_loader_n_workers", 2))


def test_samples_validation_and_saving_change_nothing(tmp_path: Path) -> None:
    write_caches(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat --f 5 --s 2 --d 1\na dog --s 2\n", encoding="utf-8")
    dropout = ["--network_args", "rank_dropout=0.5", "--validation_split", "0.2"]
    plain = train_toy(tmp_path, *dropout)

    samples = ["--sample_prompts", tmp_path / "prompts.txt", "--sample_every_n_steps", 3, "--sample_at_first"]
    watched = train_toy(
        tmp_path, *dropout, *samples, "--validate_every_n_steps", 2, "--save_every_n_steps", 1, "--save_state"
    )

    assert same(plain, watched)


def test_epochs_replace_steps(tmp_path: Path) -> None:
    write_caches(tmp_path, count=5)
    family = ToyFamily()

    train_toy(tmp_path, "--max_train_epochs", 3, "--gradient_accumulation_steps", 2, family=family)

    assert len(family.passes) == 15


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_item(tmp_path: Path) -> None:
    write_caches(tmp_path, bad=2)

    with pytest.raises(UserError, match=r"step \d+.*clip2"):
        train_network(ToyFamily(), toy_options(tmp_path, "--save_every_n_steps", 1))
    assert all(
        tensor.isfinite().all()
        for path in (tmp_path / "output").glob("*.safetensors")
        for tensor in load_file(path).values()
    )


def test_too_little_memory_is_told_with_what_helps(tmp_path: Path) -> None:
    write_caches(tmp_path)

    def fill_up(_: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. And much more")

    with pytest.raises(MemoryPlanError, match=r"(?s)CUDA out of memory\.\n.*--gradient_checkpointing"):
        train_network(ToyFamily(watch=fill_up), toy_options(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_and_the_same_command_goes_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    write_caches(tmp_path)
    expected = train_toy(tmp_path, "--output_name", "x")
    other = [*("--output_dir", tmp_path / "stopped"), "--resume", "latest"]

    def interrupt(passes: int) -> None:
        if passes == 3:
            os.kill(os.getpid(), number)

    assert train_network(ToyFamily(watch=interrupt), toy_options(tmp_path, *other)) == 0
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {
        "x-step00000004.safetensors",
        "x-step00000004-state",
    }

    assert train_network(ToyFamily(), toy_options(tmp_path, *other)) == 0
    assert same(expected, load_file(tmp_path / "stopped" / "x.safetensors"))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_mixed_precision_trains_float32_factors_of_a_half_precision_model(tmp_path: Path) -> None:
    write_caches(tmp_path)

    tensors = train_toy(
        tmp_path, "--mixed_precision", "bf16", "--save_state", family=ToyFamily(dtype=torch.bfloat16)
    )

    state = state_tensors(tmp_path / "output" / "x-state")["network"]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def scaled(run: TrainingRun, scaler: torch.amp.GradScaler) -> TrainingRun:
    assert isinstance(run.stepping, StepAfterBackward)
    return replace(run, scaler=scaler, stepping=replace(run.stepping, scaler=scaler))


def test_scaled_gradients_give_the_same_step_and_an_overflow_gives_none(tmp_path: Path) -> None:
    """fp16's gradient scaler; on the CPU it is put in by hand."""
    write_caches(tmp_path)
    weights = {}
    for scale in (None, 2.0**10, float("inf")):
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        with prepare_run(ToyFamily(), toy_options(tmp_path, "--gradient_accumulation_steps", 2)) as prepared:
            run = prepared if scaler is None else scaled(prepared, scaler)
            with contextlib.closing(run.feed.start(0, 0)) as micro_batches:
                take_step(run, range(2), micro_batches)
            weights[scale] = {
                name: tensor.clone() for name, tensor in run.trainable.modules["network"].state_dict().items()
            }
            initial = make_network(
                run.options.network, "networks.lora_wan", ToyDit(), seed=3
            ).module.state_dict()

    for name, tensor in weights[None].items():
        torch.testing.assert_close(weights[2.0**10][name], tensor, rtol=1e-5, atol=1e-7)
    assert same(weights[float("inf")], initial)
    assert not same(weights[None], initial)
