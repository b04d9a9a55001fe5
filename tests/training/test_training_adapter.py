"""A LoRA that the model has in training steps alone: --training_adapter."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from modules.contract.loading import Placement
from modules.errors import CheckpointError, OptionError
from networks.added import add_loras
from networks.apply import LoraPatch
from networks.loading import LoraUse, read_lora
from networks.names.layouts import TRAINED_EXPERT
from tests.training.test_speed import COMPILED, CPU, KINDS, random, write_file
from tests.training.toy import (
    TWO_EXPERTS,
    Killed,
    ToyFamily,
    killed_at,
    same,
    toy_options,
    train_toy,
    write_caches,
)
from training.run import train_network

pytestmark = pytest.mark.usefixtures("nothing_compiled")

HOW: dict[str, list[object]] = {
    "usual": [],
    "checkpointed": ["--gradient_checkpointing"],
    "swapped": ["--gradient_checkpointing", "--blocks_to_swap", 1],
    "compiled": COMPILED,
    "accumulating": ["--gradient_accumulation_steps", 2],
}


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4) -> None:
    """Within what eight steps of AdamW make of the order in which an addition is summed."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=rtol, atol=rtol, msg=name)


@pytest.mark.parametrize("how", HOW)
def test_training_is_that_of_a_model_merged_with_it(tmp_path: Path, how: str) -> None:
    write_caches(tmp_path)
    path = write_file(tmp_path, KINDS["LoRA"])
    expected = train_toy(tmp_path, *HOW[how], "--base_weights", path, "--base_weights_multiplier", 0.5)
    plain = train_toy(tmp_path, *HOW[how], "--overwrite")

    found = train_toy(
        tmp_path,
        *(*HOW[how], "--training_adapter", path, "--training_adapter_multiplier", 0.5, "--overwrite"),
    )

    assert_close(found, expected)
    assert not same(found, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_trains_as_if_merged(tmp_path: Path, kind: str) -> None:
    write_caches(tmp_path)
    path = write_file(tmp_path, KINDS[kind])
    expected = train_toy(tmp_path, "--base_weights", path)

    assert_close(train_toy(tmp_path, "--training_adapter", path, "--overwrite"), expected)


def test_a_change_of_a_norm_is_in_the_backward_pass_too(tmp_path: Path) -> None:
    """The weight is put back before the backward pass, whose gradients need the changed one."""
    dit = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)).requires_grad_(False)
    path = tmp_path / "norm.safetensors"
    save_file({"lora_unet_1.diff": random(8), "lora_unet_1.diff_b": random(8)}, path)
    lora = read_lora(path)
    merged = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)).requires_grad_(False)
    merged.load_state_dict(dit.state_dict())
    patch = LoraPatch([LoraUse(lora)])
    for name, parameter in merged.named_parameters():
        parameter.data = patch(name, parameter.data)
    adapter = add_loras(dit, [LoraUse(lora)])
    adapter.place_on(CPU, torch.float32)
    x, y = (random(3, 8, seed=5).requires_grad_() for _ in range(2))

    with adapter.turned(is_on=True):
        dit(x).pow(3).sum().backward()
    merged(y).pow(3).sum().backward()

    assert x.grad is not None
    torch.testing.assert_close(x.grad, y.grad)
    assert isinstance(dit[1].weight, torch.nn.Parameter)


@pytest.mark.parametrize("how", HOW)
def test_samples_and_validation_are_without_it_to_the_bit(tmp_path: Path, how: str) -> None:
    """Before the first step the network changes nothing, so that samples are the model's own."""
    write_caches(tmp_path)
    path = write_file(tmp_path, KINDS["LoRA"])
    (tmp_path / "prompts.txt").write_text("a cat --s 2 --d 1\n", encoding="utf-8")
    options = [
        *(*HOW[how], "--sample_prompts", tmp_path / "prompts.txt", "--sample_at_first"),
        *("--validation_split", 0.2, "--learning_rate", 0, "--sample_every_n_steps", 3),
    ]
    plain: list[Tensor] = []
    train_toy(tmp_path, *options, family=ToyFamily(on_decode=plain.append), has_page=True)
    history = tmp_path / "output" / "x-history.jsonl"
    losses = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]
    adapted: list[Tensor] = []
    train_toy(
        tmp_path,
        *(*options, "--training_adapter", path, "--overwrite"),
        family=ToyFamily(on_decode=adapted.append),
        has_page=True,
    )
    again = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]

    assert len(plain) == len(adapted) >= 2
    assert all(torch.equal(one, other) for one, other in zip(plain, adapted, strict=True))
    validated, steps = (
        [[line[kind] for line in lines if kind in line] for lines in (losses, again)]
        for kind in ("losses", "loss")
    )
    assert validated[0] == validated[1]
    assert steps[0] != steps[1]


def test_samples_with_a_lora_of_their_own_are_those_without_the_adapter(tmp_path: Path) -> None:
    write_caches(tmp_path)
    (tmp_path / "other").mkdir()
    path, other = write_file(tmp_path, KINDS["LoRA"]), write_file(tmp_path / "other", KINDS["LoHa"])
    (tmp_path / "prompts.txt").write_text("a cat --s 2 --d 1\n", encoding="utf-8")
    options = [
        *("--sample_prompts", tmp_path / "prompts.txt", "--sample_at_first", "--sample_lora", other),
        *("--max_train_steps", 1),
    ]
    plain: list[Tensor] = []
    train_toy(tmp_path, *options, family=ToyFamily(on_decode=plain.append))
    adapted: list[Tensor] = []

    train_toy(
        tmp_path,
        *(*options, "--training_adapter", path, "--overwrite"),
        family=ToyFamily(on_decode=adapted.append),
    )

    assert torch.equal(plain[0], adapted[0])


def test_the_file_says_that_it_was_there_and_nothing_else(tmp_path: Path) -> None:
    write_caches(tmp_path)
    path = write_file(tmp_path, KINDS["LoRA"])
    plain = train_toy(tmp_path, "--learning_rate", 0)
    before = metadata_of(tmp_path / "output" / "x.safetensors")

    found = train_toy(tmp_path, "--learning_rate", 0, "--training_adapter", path, "--overwrite")

    after = metadata_of(tmp_path / "output" / "x.safetensors")
    assert same(found, plain)
    assert after.keys() - before.keys() == {"ss_training_adapter"}
    assert after["ss_training_adapter"] == "own style.safetensors:1"
    train_toy(tmp_path, "--learning_rate", 0, "--training_adapter", path, "--no_metadata", "--overwrite")
    assert "ss_training_adapter" not in metadata_of(tmp_path / "output" / "x.safetensors")


STATES = ["--save_every_n_steps", 3, "--save_state", "--resume", "latest"]


def test_a_resumed_run_ends_with_equal_bytes_and_needs_the_same_file(tmp_path: Path) -> None:
    write_caches(tmp_path)
    path = write_file(tmp_path, KINDS["LoRA"])
    adapter = ["--training_adapter", path]
    expected = train_toy(tmp_path, *STATES, *adapter)
    options = toy_options(tmp_path, *STATES, *adapter, "--output_dir", tmp_path / "killed")
    with pytest.raises(Killed):
        train_network(killed_at(5), options)

    other = write_file(tmp_path, {**KINDS["LoRA"], "alpha": torch.tensor(2.0)})
    with pytest.raises(OptionError, match=r"--training_adapter: own style.safetensors:1, \w+ in the state"):
        train_network(ToyFamily(), options)
    without = toy_options(tmp_path, *STATES, "--output_dir", tmp_path / "killed")
    with pytest.raises(OptionError, match="--training_adapter: own style.*None now"):
        train_network(ToyFamily(), without)
    write_file(tmp_path, KINDS["LoRA"])
    stronger = toy_options(
        tmp_path,
        *(*STATES, *adapter, "--training_adapter_multiplier", 2, "--output_dir", tmp_path / "killed"),
    )
    with pytest.raises(OptionError, match="--training_adapter: own style.safetensors:1, .*:2, "):
        train_network(ToyFamily(), stronger)

    assert other == path
    assert train_network(ToyFamily(), options) == 0
    assert same(load_file(tmp_path / "killed" / "x.safetensors"), expected)


@pytest.mark.parametrize("turns", [[], ["--offload_inactive_dit"]], ids=["both", "turns"])
def test_two_transformers_have_it_both_unless_the_file_is_for_one(
    tmp_path: Path, turns: list[object]
) -> None:
    write_caches(tmp_path)
    path, steps = write_file(tmp_path, KINDS["LoRA"]), ["--max_train_steps", 12, *turns]
    family = ToyFamily(experts=TWO_EXPERTS)
    both = train_toy(tmp_path, *steps, "--base_weights", path, family=family)
    assert_close(train_toy(tmp_path, *steps, "--training_adapter", path, "--overwrite", family=family), both)

    tensors = {f"lora_unet_blocks_0_up.{part}": tensor for part, tensor in KINDS["LoRA"].items()}
    save_file(tensors, path, {TRAINED_EXPERT: "high"})
    empty = tmp_path / "empty.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, empty)
    words = ("--base_weights", empty, "--base_weights_high_noise", path, "--overwrite")
    one = train_toy(tmp_path, *steps, *words, family=family)
    found = train_toy(tmp_path, *steps, "--training_adapter", path, "--overwrite", family=family)
    assert_close(found, one)
    assert not same(one, both)


@pytest.mark.parametrize(
    ("factors", "module", "reason"),
    [
        (KINDS["LoRA"], "blocks_7_up", "--training_adapter .* does not fit this model, which has no"),
        (KINDS["LoRA"], "blocks_0_down", r"--training_adapter .*has \[16, 8\], the model \[8, 16\]"),
        (
            {**KINDS["LoRA"], "dora_scale": torch.ones(16, 1)},
            "blocks_0_up",
            "--training_adapter .* is a DoRA",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_the_first_step(
    tmp_path: Path, factors: dict[str, Tensor], module: str, reason: str
) -> None:
    write_caches(tmp_path)
    path, family = write_file(tmp_path, factors, module), ToyFamily()

    with pytest.raises(CheckpointError, match=reason):
        train_network(family, toy_options(tmp_path, "--training_adapter", path))
    assert not family.passes


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--training_adapter", "no.safetensors"], "--training_adapter no.safetensors: no such file"),
        (["--training_adapter_multiplier", 2], "needs --training_adapter"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, words: list[object], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        toy_options(tmp_path, *words)


@pytest.mark.parametrize(
    "words",
    [
        ["--training_adapter", "a.safetensors"],
        ["--training_adapter_multiplier", 2],
        ["--teacher", "base"],
        ["--teacher_weight", 1],
    ],
)
def test_training_the_model_itself_refuses_them(tmp_path: Path, words: list[object]) -> None:
    with pytest.raises(OptionError, match=f"{words[0]} is not supported yet: the model itself is trained"):
        toy_options(tmp_path, *words, whole_dit=True)


def test_a_model_is_as_it_was_while_the_adapter_is_off(tmp_path: Path) -> None:
    lora = read_lora(write_file(tmp_path, KINDS["LoRA"]))
    dit = ToyFamily().load_dit(Placement(CPU))
    inputs = random(1, 2, 1, 4, 4), torch.tensor([500.0]), [torch.ones(1, 1)]
    with torch.no_grad():
        before = dit(*inputs)
        adapter = add_loras(dit, [LoraUse(lora)])
        adapter.place_on(CPU, torch.float32)
        with adapter.turned(is_on=True):
            assert not torch.equal(dit(*inputs), before)
            with adapter.turned(is_on=False):
                assert torch.equal(dit(*inputs), before)
            assert not torch.equal(dit(*inputs), before)
        assert torch.equal(dit(*inputs), before)
