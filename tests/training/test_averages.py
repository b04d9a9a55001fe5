"""The average of the trained weights (EMA): what it is, where it is saved, that it resumes to the bit."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from modules.errors import CheckpointError, OptionError
from modules.offload.block_swap import swap_of
from tests.modules.fake_device import FakeDevice
from tests.modules.swap_cases import CASES, gradients, learner
from tests.training.planning.test_rehearsal import CHECKPOINTED, wan, wan_batch
from tests.training.toy import ToyFamily, same, toy_options, train_toy, train_with_kills, write_caches
from training.averages import make_average
from training.learning_options import AverageOptions
from training.planning.memory import predict
from training.run import train_network
from training.saving.states import SavedState, read_state, write_state
from training.trainable import Trainable

EMA = ["--ema_decay", "0.5"]
WHOLE = {
    "float32": [],
    "bf16, fused, swapped": [
        *("--optimizer_type", "Adafactor", "--optimizer_args", "relative_step=False"),
        *("--mixed_precision", "bf16", "--full_bf16", "--fused_backward_pass", "--max_grad_norm", 0),
        *("--blocks_to_swap", 1, "--gradient_checkpointing"),
    ],
}


def by_hand(folder: Path, steps: int, decay: float, every: int = 1) -> dict[str, Tensor]:
    """The average of the weights that a run saved at each step."""
    average: dict[str, Tensor] = {}
    for step in range(1, steps + 1):
        weights = load_file(folder / f"x-step{step:08d}.safetensors")
        if step % every:
            continue
        share = 1 - min(decay, (1 + step) / (10 + step)) ** every
        for name, weight in weights.items():
            start = load_file(folder / "start.safetensors")[name] if name not in average else average[name]
            average[name] = start + share * (weight.float() - start)
    return average


def test_the_average_of_a_lora_leaves_swapped_blocks_where_they_are() -> None:
    device = FakeDevice()
    dit, network = learner(CASES[0], 3, checkpointing=True, device=device)
    parameters = list(network.parameters())
    trainable = Trainable(
        modules={"network": network}, groups=[{"params": parameters}], group_names=("unet",), writes={}
    )
    optimizer = torch.optim.SGD(parameters, 0.1)
    average = make_average(AverageOptions.usual(ema_decay=0.5), [dit], trainable, optimizer, keeps=True)
    swap = swap_of(dit)
    assert swap is not None

    def in_slots() -> list[int | None]:
        return [slot.unit and slot.unit.position for ring in swap.rings for slot in ring.slots]

    gradients(CASES[0], dit, network)
    before = in_slots()
    average.after_step()
    assert in_slots() == before != [None, None]


@pytest.mark.parametrize("every", [1, 3])
def test_the_average_is_that_of_the_weights_of_each_step(tmp_path: Path, every: int) -> None:
    write_caches(tmp_path)
    train_toy(tmp_path, "--max_train_steps", 1, "--learning_rate", 0)
    (tmp_path / "output" / "x.safetensors").rename(tmp_path / "start.safetensors")
    (tmp_path / "output").mkdir(exist_ok=True)

    train_toy(tmp_path, *EMA, "--ema_update_every", every, "--save_every_n_steps", 1)

    (tmp_path / "start.safetensors").rename(tmp_path / "output" / "start.safetensors")
    found = load_file(tmp_path / "output" / "x-ema.safetensors")
    expected = by_hand(tmp_path / "output", 8, 0.5, every)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
    with safe_open(tmp_path / "output" / "x-ema.safetensors", "pt") as file:
        assert (file.metadata()["ss_ema_decay"], file.metadata()["ss_ema_steps"]) == ("0.5", "8")
        assert "sshs_model_hash" in file.metadata()


@pytest.mark.parametrize("moment", [1, 5])
def test_a_killed_run_ends_with_the_same_average(tmp_path: Path, moment: int) -> None:
    write_caches(tmp_path, count=5)
    options = [*EMA, "--ema_update_every", 2, "--save_every_n_steps", 3, "--save_state", "--resume", "latest"]
    train_toy(tmp_path, *options)
    train_with_kills(tmp_path, *options, moments=(moment,))

    expected = load_file(tmp_path / "output" / "x-ema.safetensors")
    assert same(expected, load_file(tmp_path / "killed" / "x-ema.safetensors"))


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_model_has_one_too_in_the_dtype_of_its_weights(tmp_path: Path, kind: str) -> None:
    write_caches(tmp_path)
    options = [*WHOLE[kind], *EMA, "--save_every_n_steps", 3, "--save_state", "--resume", "latest"]
    plain = train_toy(tmp_path, *WHOLE[kind], whole_dit=True)
    expected = train_toy(tmp_path, *options, whole_dit=True)
    train_with_kills(tmp_path, *options, moments=(5,), whole_dit=True)

    average = load_file(tmp_path / "output" / "x-ema.safetensors")
    assert same(plain, expected)
    assert same(average, load_file(tmp_path / "killed" / "x-ema.safetensors"))
    assert {name: one.dtype for name, one in average.items()} == {
        name: one.dtype for name, one in plain.items()
    }
    assert not same(average, plain)


def test_it_begins_with_the_weights_of_a_state_that_has_none(tmp_path: Path) -> None:
    write_caches(tmp_path)
    state = train_toy(tmp_path, "--max_train_steps", 4, "--save_state")

    train_toy(tmp_path, *EMA, "--max_train_steps", 5, "--resume", "latest", "--learning_rate", "1e-2")

    after = load_file(tmp_path / "output" / "x.safetensors")
    average = load_file(tmp_path / "output" / "x-ema.safetensors")
    for name, tensor in state.items():
        torch.testing.assert_close(average[name], tensor + (1 - 2 / 11) * (after[name] - tensor))


def test_samples_show_the_average_if_asked(tmp_path: Path) -> None:
    write_caches(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat --s 2 --d 1\n", encoding="utf-8")
    options = [*EMA, "--sample_prompts", tmp_path / "prompts.txt", "--sample_every_n_steps", 4]
    pictures: list[Tensor] = []
    expected = train_toy(tmp_path, *options, "--sample_ema", family=ToyFamily(on_decode=pictures.append))
    weights = tmp_path / "output" / "x-ema.safetensors"
    train_network(
        ToyFamily(on_decode=pictures.append),
        toy_options(
            tmp_path,
            *[*options[2:4], "--sample_at_first", "--network_weights", weights, "--max_train_steps", 1],
            *["--output_dir", tmp_path / "other"],
        ),
    )

    assert torch.equal(pictures[1], pictures[2])  # after the last step, and of the file
    assert same(expected, train_toy(tmp_path))


def test_samples_of_a_whole_model_with_its_average_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--sample_ema"):
        toy_options(tmp_path, *EMA, "--sample_ema", whole_dit=True)


def test_an_optimizer_that_averages_itself_is_named(tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    write_caches(tmp_path)

    with pytest.raises(OptionError, match="AdamWScheduleFree saves an average"):
        train_toy(tmp_path, *EMA, "--optimizer_type", "AdamWScheduleFree")


def test_the_average_of_other_weights_is_refused(tmp_path: Path) -> None:
    write_caches(tmp_path)
    train_toy(tmp_path, *EMA, "--max_train_steps", 2, "--save_state")
    state = tmp_path / "output" / "x-state"
    saved = read_state(state)
    assert isinstance(saved, SavedState)
    saved.parts["ema"] = dict(list(saved.parts["ema"].items())[1:])
    write_state(state, saved)

    with pytest.raises(CheckpointError, match="average"):
        train_toy(tmp_path, *EMA, "--resume", "latest")


def test_the_plan_counts_it(tmp_path: Path) -> None:
    family, options = wan(tmp_path, *CHECKPOINTED)
    batch = wan_batch(1)
    plain = predict(family, options, batch, torch.device("cpu"))
    family, options = wan(tmp_path, *CHECKPOINTED, *EMA)
    found = predict(family, options, batch, torch.device("cpu"))

    assert found.device(0) > plain.device(0)
