"""Training of a model with two transformers, on a toy family."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modules.errors import OptionError
from networks.adapter import make_network
from networks.options import NetworkOptions
from protocols.families import HIGH_NOISE, LOW_NOISE
from protocols.loading import Placement
from protocols.rules import Expert
from runtime.offload.turns import HostCopy
from tests.modules.fake_device import FakeDevice
from tests.run_pages import read_run_page
from tests.runtime.offload.test_turns import taking_turns
from tests.training import toy
from tests.training.test_resume import train_in_two_processes
from training.experts import ExpertNetworks
from training.learner import find_network_spec
from training.loop import take_step
from training.other_models import OtherFamilies
from training.run import prepare_run, train_network
from training.trainable import LearningRates, prepare_network, share_network

BOTH = toy.ToyFamily(experts=toy.TWO_EXPERTS)
APART = "--lora_per_expert"
PARTS = (LOW_NOISE, HIGH_NOISE)


def train(folder: Path, *arguments: object, family: Any = BOTH) -> dict[str, Tensor]:
    """Train the whole way; returns the tensors of all final files."""
    assert train_network(family, toy.toy_options(folder, *arguments)) == 0
    files = sorted((folder / "output").glob("x*.safetensors"))
    return {f"{path.name}/{name}": tensor for path in files for name, tensor in load_file(path).items()}


def sides(folder: Path, *arguments: object, count: int = 8) -> list[int]:
    """The expert of each micro-batch of a run."""
    with prepare_run(BOTH, toy.toy_options(folder, *arguments)) as run:
        feed = run.feed.start(0, 0)
        return [next(feed).expert for _ in range(count)]


def test_both_transformers_get_micro_batches_and_one_network_learns_from_all(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    assert set(sides(tmp_path)) == {0, 1}

    tensors = toy.train_toy(tmp_path, "--max_train_steps", 3, family=BOTH)

    assert [path.name for path in (tmp_path / "output").iterdir()] == ["x.safetensors"]
    assert toy.metadata_of(tmp_path / "output" / "x.safetensors")["ss_wan_expert"] == "both"
    one = toy.train_toy(tmp_path, "--max_train_steps", 3)  # the low one alone, at the same timesteps
    assert not toy.same(one, tensors)


@pytest.mark.parametrize("module", ["networks.lora", "networks.loha", "networks.lokr", "networks.oft"])
def test_a_shared_network_has_the_same_parameters_in_both(tmp_path: Path, module: str) -> None:
    options = toy.toy_options(tmp_path, "--network_module", module).network
    assert options is not None
    low, high = (
        BOTH.load_dit(Placement(torch.device("cpu")), expert).requires_grad_(False) for expert in (0, 1)
    )
    first, second = (make_network(options, BOTH.lora_module, dit, seed=3) for dit in (low, high))

    trainable = prepare_network(
        first,
        LearningRates(1e-2),
        None,
        torch.device("cpu"),
        find_network_spec(BOTH, NetworkOptions.from_defaults()),
    )
    trainable = share_network(trainable, second, torch.device("cpu"))

    theirs = dict(second.module.named_parameters())
    for name, parameter in first.module.named_parameters():
        assert theirs[name] is parameter
    inputs = torch.randn(1, 2, 1, 2, 2), torch.tensor([500.0]), [torch.ones(1, 1)]
    before = [dit(*inputs) for dit in (low, high)]
    with torch.no_grad():
        for parameter in trainable.parameters:
            parameter.add_(0.1)
    assert all(not torch.equal(dit(*inputs), was) for dit, was in zip((low, high), before, strict=True))
    trainable.start_epoch()
    assert all(module.training for module in trainable.all_modules)
    assert len(trainable.all_modules) == 2


def test_the_expert_of_a_micro_batch_is_known_before_it_is_read(tmp_path: Path) -> None:
    """A process must know it also of the micro-batches that others read."""
    toy.write_caches(tmp_path, batch_size=2)
    words = ["--timestep_sampling", "flux_shift", "--num_timestep_buckets", 4, "--min_timestep", 9]
    with prepare_run(BOTH, toy.toy_options(tmp_path, "--max_train_epochs", 4, *words)) as run:
        feed, count = run.feed.start(0, 0), run.steps.num_batches
        drawn = [next(feed).expert for _ in range(4 * count)]
        told = [run.feed.find_expert((epoch, index)) for epoch in range(4) for index in range(count)]
    assert told == drawn
    assert set(drawn) == {0, 1}


def test_a_step_leaves_the_network_of_an_expert_without_micro_batches_alone(tmp_path: Path) -> None:
    """Neither weight decay nor a moment of the optimizer changes it."""
    toy.write_caches(tmp_path)
    order = sides(tmp_path)
    with prepare_run(BOTH, toy.toy_options(tmp_path, APART, "--optimizer_args", "weight_decay=0.1")) as run:
        feed = run.feed.start(0, 0)
        for index, expert in enumerate(order[: run.steps.num_batches]):
            before = [[one.detach().clone() for one in part] for part in run.model.trainable.by_expert]
            take_step(run, range(index, index + 1), feed)
            for part, (now, kept) in enumerate(zip(run.model.trainable.by_expert, before, strict=True)):
                are_equal = [torch.equal(one, was) for one, was in zip(now, kept, strict=True)]
                assert all(are_equal) if part != expert else not all(are_equal)


@pytest.mark.parametrize("more", [[], [APART]])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, more: list[str]) -> None:
    toy.write_caches(tmp_path)
    options = [*more, "--gradient_accumulation_steps", 2, "--network_dropout", 0.2, "--ema_decay", 0.5]
    options += ["--scale_weight_norms", 0.5, "--save_every_n_steps", 1, "--save_state", "--resume", "latest"]
    expected = train(tmp_path, *options)
    (tmp_path / "output").rename(tmp_path / "whole")

    for count in (3, 7):
        with pytest.raises(toy.Killed):
            train(tmp_path, *options, family=replace(toy.killed_at(count), experts=toy.TWO_EXPERTS))
    found = train(tmp_path, *options)

    assert toy.same(found, expected)
    states = sorted((tmp_path / "whole").glob("x*-state"))
    assert states
    for path in states:
        ours, theirs = toy.state_tensors(path), toy.state_tensors(tmp_path / "output" / path.name)
        assert all(toy.same(ours[part], theirs[part]) for part in ours)


def test_files_of_two_networks_end_with_their_expert_and_expire_together(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    saving = ["--save_every_n_steps", 2, "--save_last_n_steps", 1, "--ema_decay", 0.5, "--max_train_steps", 5]

    train(tmp_path, APART, *saving)

    files = sorted((tmp_path / "output").glob("*.safetensors"))
    stems = ("x", "x-ema", "x-step00000004", "x-step00000004-ema")
    expected = {f"{stem}_{part}.safetensors": part for stem in stems for part in PARTS}
    told = {path.name: f"{toy.metadata_of(path)['ss_wan_expert']}_noise" for path in files}
    assert told == expected


def test_losses_of_the_transformers_are_logged_apart(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    order = sides(tmp_path, count=5)
    toy.train_toy(tmp_path, "--max_train_steps", 5, family=BOTH, has_page=True)

    lines = (tmp_path / "output" / "x-history.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    assert [row["experts"] for row in rows] == [
        {PARTS[expert]: row["loss"]} for row, expert in zip(rows, order, strict=True)
    ]
    assert "Loss of each transformer" in read_run_page(tmp_path / "output")


def test_validation_measures_each_band_in_its_transformer(tmp_path: Path) -> None:
    """At first nothing is learned, so the bands are those of each transformer alone."""
    toy.write_caches(tmp_path)
    options = toy.toy_options(tmp_path, "--validation_split", "0.3")
    asked: list[int] = []

    with prepare_run(BOTH, options) as run:

        def note(expert: int) -> nn.Module:
            asked.append(expert)
            return run.model.dits.on_device(expert)

        assert run.validation is not None
        both, low, high = (
            {name[-3:]: loss for name, loss in run.validation.measure(at, run.autocast).items()}
            for at in (note, lambda _: run.model.dits.on_device(0), lambda _: run.model.dits.on_device(1))
        )
        assert len(run.plan.validation) > 1
    assert asked == [0, 1], "a network is brought once for all items"
    assert [both[band] for band in ("100", "300", "500")] == [low[band] for band in ("100", "300", "500")]
    assert [both[band] for band in ("700", "900")] == [high[band] for band in ("700", "900")]
    assert low["900"] != high["900"]
    with prepare_run(toy.ToyFamily(experts=toy.TWO_EXPERTS[1:]), options) as run:
        assert run.validation is not None
        losses = run.validation.measure(run.model.dits.on_device, run.autocast)
    assert list(losses) == ["validation/loss", "validation/loss_700", "validation/loss_900"]


@pytest.mark.parametrize("swap", [[], ["--blocks_to_swap", 1]])
def test_networks_that_take_turns_train_the_same(tmp_path: Path, swap: list[object]) -> None:
    """Weights that are used while they are not on the device are not numbers."""
    toy.write_caches(tmp_path)
    options, found = toy.toy_options(tmp_path, *swap), []
    for takes_turns in (False, True):
        with prepare_run(BOTH, options) as run:
            copies: dict[nn.Module, HostCopy] = {}
            if takes_turns:
                copies = {dit: taking_turns(dit, FakeDevice()) for dit in run.model.dits.networks}
                dits = ExpertNetworks(run.model.dits.networks, copies)
                run = replace(run, model=replace(run.model, dits=dits))
            feed = run.feed.start(0, 0)
            for index in range(4):
                take_step(run, range(index, index + 1), feed)
                assert sum(copy.is_on_device for copy in copies.values()) == takes_turns
            found.append([one.detach().clone() for one in run.parameters])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@dataclass(frozen=True)
class FiledToy(toy.ToyFamily):
    """A toy whose transformers are files."""

    files: tuple[Path, ...] = ()

    @property
    def dit_files(self) -> tuple[Path, ...]:
        return self.files


class Pair(nn.Module):
    """The trained network of a run, and one that only samples use."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second


@pytest.mark.parametrize("joined", [False, True])
def test_trained_networks_are_as_they_train_next_to_those_of_samples_alone(
    tmp_path: Path, joined: bool
) -> None:
    """Checkpointing depends on the mode."""
    toy.write_caches(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat", encoding="utf-8")
    low, high = tmp_path / "low.safetensors", tmp_path / "high.safetensors"
    for path in (low, high):
        save_file({"weight": torch.zeros(1)}, path)
    family = FiledToy(files=(low,))
    sampling = FiledToy(
        experts=toy.TWO_EXPERTS,
        files=(low, high),
        defaults=replace(family.defaults, experts=toy.TWO_EXPERTS),
    )
    if joined:
        abilities = replace(toy.ToyFamily.abilities, join_sample_networks=Pair)
        sampling = FiledToy(files=(high,), abilities=abilities)
    options = toy.toy_options(
        tmp_path, "--gradient_checkpointing", "--sample_prompts", tmp_path / "prompts.txt"
    )
    with prepare_run(family, options, others=OtherFamilies(sampling=sampling)) as run:
        (trained,), networks = run.model.dits.networks, run.model.sample_dits.networks
        parts = (networks[0].first, networks[0].second) if joined else networks
        assert [part.training for part in parts] == [True, False]
        assert parts[0] is trained
        adapted = [name for name, _ in parts[1].named_parameters() if "lora" in name]
        assert not adapted


def test_a_network_that_stays_trains_while_another_waits(tmp_path: Path) -> None:
    """The other one is on the device for samples alone."""
    trained, other = toy.ToyDit(), toy.ToyDit().requires_grad_(False)
    joined = Pair(trained, other)
    copies: dict[nn.Module, HostCopy] = {joined: taking_turns(other, FakeDevice())}
    training, sampling = ExpertNetworks([trained], copies), ExpertNetworks([joined], copies)
    for dits, network, is_there in ((sampling, joined, True), (training, trained, False)) * 2:
        assert dits.on_device(0) is network
        assert copies[joined].is_on_device == is_there


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo over files")
@pytest.mark.parametrize(("port", "more"), [(29641, []), (29642, [APART])])
def test_two_processes_train_what_one_does_with_twice_the_accumulation(
    tmp_path: Path, port: int, more: list[str]
) -> None:
    toy.write_caches(tmp_path, count=6)
    expected = train(tmp_path, *more, "--gradient_accumulation_steps", 2)
    words = [*more, "--output_dir", tmp_path / "two"]

    train_in_two_processes(tmp_path, port, *words, environment={"TOY_EXPERTS": "1"})

    for name, tensor in expected.items():
        file, _, key = name.partition("/")
        torch.testing.assert_close(load_file(tmp_path / "two" / file)[key], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--network_args dora_wd=true", "learns the norms of.*Use --lora_per_expert"),
        ("--timestep_sampling uniform --max_timestep 500", "no timestep of this run reaches the high"),
        ("--network_weights_high_noise FOLDER/dataset.toml", "add --lora_per_expert"),
    ],
)
def test_what_two_transformers_cannot_do_is_refused_before_they_load(
    tmp_path: Path, words: str, message: str
) -> None:
    toy.write_caches(tmp_path)
    given = [word.replace("FOLDER", str(tmp_path)) for word in words.split()]
    with pytest.raises(OptionError, match=message):
        train(tmp_path, *given)


def test_whole_transformers_are_trained_one_at_a_time(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    with pytest.raises(OptionError, match="one at a time"):
        toy.train_toy(tmp_path, family=BOTH, full_dit=True)


def test_options_for_two_transformers_are_refused_for_one(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    with pytest.raises(OptionError, match="--lora_per_expert needs two transformers"):
        toy.train_toy(tmp_path, APART)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (BOTH, replace(BOTH, experts=(Expert(LOW_NOISE, 0.0, 700.0), Expert(HIGH_NOISE, 700.0)))),
        (toy.ToyFamily(), BOTH),
    ],
    ids=["another boundary", "one before"],
)
def test_a_state_is_not_resumed_with_other_transformers(
    tmp_path: Path, first: toy.ToyFamily, second: toy.ToyFamily
) -> None:
    toy.write_caches(tmp_path)
    toy.train_toy(tmp_path, "--max_train_steps", 1, "--save_state", family=first)
    with pytest.raises(OptionError, match="lowest timesteps"):
        toy.train_toy(tmp_path, "--max_train_steps", 2, "--resume", "latest", family=second)


KEEPS = "--preserve_distribution_shape"


@pytest.mark.parametrize(
    ("given", "recommended", "expert"),
    [
        # the table's bounds count from the noisy end
        ("", f"--min_timestep 400 {KEEPS} (or --max_timestep 400 ", None),
        ("--timestep_sampling uniform", f"--max_timestep 600 {KEEPS} (or --min_timestep 600 ", None),
        (f"--min_timestep 400 {KEEPS}", "", "low"),
        (f"--max_timestep 400 {KEEPS}", "", "high"),
        (f"--timestep_sampling uniform --max_timestep 600 {KEEPS}", "", "low"),
    ],
)
def test_one_of_two_transformers_at_all_timesteps_gets_a_recommendation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, given: str, recommended: str, expert: str | None
) -> None:
    toy.write_caches(tmp_path)
    alone = toy.ToyFamily(defaults=replace(toy.ToyFamily().defaults, experts=toy.TWO_EXPERTS))

    toy.train_toy(tmp_path, "--max_train_steps", 1, "--offload_inactive_dit", *given.split(), family=alone)

    assert "--offload_inactive_dit is ignored" in caplog.text
    assert recommended in caplog.text
    assert ("Recommended: " in caplog.text) == bool(recommended)
    assert toy.metadata_of(tmp_path / "output" / "x.safetensors").get("ss_wan_expert") == expert
