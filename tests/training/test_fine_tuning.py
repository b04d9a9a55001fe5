"""Full fine-tuning: the DiT itself learns, in the usual order or with steps inside the backward pass."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import Adafactor

from modules.errors import OptionError
from protocols.loading import Placement
from tests.training import toy
from tests.training.optimizers.test_lr_schedule import Descent
from training.optimizers.stepping import PER_PARAMETER, FusedBackward, ParameterSteps, stochastic_bfloat16
from training.steps import Progress

FUSED = "--fused_backward_pass"
BF16 = ("--full_bf16", "--mixed_precision", "bf16")
UNCLIPPED = ("--max_grad_norm", 0)


def train_dit(folder: Path, *arguments: object, family: Any = None) -> dict[str, Tensor]:
    return toy.train_toy(folder, *arguments, family=family, full_dit=True)


def initial_weights() -> dict[str, Tensor]:
    return dict(toy.ToyFamily().load_dit(Placement(torch.device("cpu"))).state_dict())


def change_dit(monkeypatch: pytest.MonkeyPatch, change: Callable[[nn.Module], object]) -> None:
    """Have the toy's DiT changed whenever it is loaded."""
    load = toy.ToyFamily.load_dit

    def load_changed(self: toy.ToyFamily, placement: Placement, expert: int = 0) -> nn.Module:
        dit = load(self, placement, expert)
        change(dit)
        return dit

    monkeypatch.setattr(toy.ToyFamily, "load_dit", load_changed)


@pytest.fixture
def _idle_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that no gradient reaches; weight decay and momentum step it all the same."""

    def add_idle(dit: nn.Module) -> None:
        dit.idle = nn.Parameter(torch.ones(3, 3, dtype=dit.get_submodule("head").weight.dtype))

    change_dit(monkeypatch, add_idle)


# --- steps inside the backward pass
# -----------------------------------------------------------------------------------------------

PACKAGES = {"AdamW8bit": "bitsandbytes", "Lion8bit": "bitsandbytes", "Lion": "lion_pytorch"}
PACKAGES |= {"Prodigy": "prodigyopt", "AdamWScheduleFree": "schedulefree"}
OPTIMIZERS = [
    ["Adafactor"],
    ["Adafactor", "relative_step=False", "beta1=0.9", "weight_decay=0.1"],
    ["AdamW", "amsgrad=True", "foreach=True"],
    ["torch.optim.Adafactor"],
    *([name] for name in sorted(PER_PARAMETER["torch"] - {"Adafactor", "Muon"})),
    ["AdamW8bit"],
    ["Lion8bit"],
    ["Lion", "weight_decay=0.1"],
]


def require_package(optimizer: str) -> None:
    package = PACKAGES.get(optimizer)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is missing")


WAYS = {" ".join(words): (words, ()) for words in OPTIMIZERS}
WAYS |= {f"{' '.join(words)} bf16": (words, BF16) for words in (*OPTIMIZERS[:3], ["AdamW8bit"])}


@pytest.mark.slow_cases(
    "Adafactor bf16",
    "Adafactor relative_step=False beta1=0.9 weight_decay=0.1 bf16",
    "AdamW amsgrad=True foreach=True bf16",
    "AdamW8bit bf16",
    # torch's, as those that stay: Adam with moments, SGD without a state, RMSprop with a mean of squares
    *("ASGD", "Adadelta", "Adagrad", "AdamW", "Adamax", "NAdam", "RAdam", "Rprop"),
    "Lion8bit",  # in 8 bits as AdamW8bit
)
@pytest.mark.usefixtures("_idle_weight")
@pytest.mark.parametrize("way", WAYS)
def test_steps_inside_the_backward_pass_give_the_same_bits(tmp_path: Path, way: str) -> None:
    """Weights, and all that the optimizer keeps, after several steps of a schedule."""
    (name, *arguments), precision = WAYS[way]
    require_package(name)
    toy.write_caches(tmp_path, batch_size=2)
    words = [*UNCLIPPED, *precision, "--gradient_checkpointing", "--lr_scheduler", "linear"]
    words += ["--lr_warmup_steps", 2, "--max_train_steps", 5, "--save_state", "--optimizer_type", name]
    words += ["--optimizer_args", *arguments] if arguments else []
    expected = train_dit(tmp_path, *words)

    found = train_dit(tmp_path, *words, FUSED, "--output_dir", tmp_path / "fused")

    assert toy.same(expected, found)
    states = [toy.state_tensors(tmp_path / folder / "x-state")["optimizer"] for folder in ("output", "fused")]
    assert toy.same(*states)
    assert not torch.equal(found["embed.weight"].float(), initial_weights()["embed.weight"])


def test_only_one_gradient_exists_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy.write_caches(tmp_path)
    counts: list[int] = []
    step = ParameterSteps.step

    def counted(self: ParameterSteps, parameter: nn.Parameter) -> None:
        counts.append(sum(name.grad is not None for name in self.names))
        step(self, parameter)

    monkeypatch.setattr(ParameterSteps, "step", counted)
    train_dit(tmp_path, FUSED, *UNCLIPPED, "--max_train_steps", 3)

    assert len(counts) == 3 * len(initial_weights())
    assert set(counts) == {1}


def test_each_gradient_is_clipped_by_itself(tmp_path: Path) -> None:
    """Against the same written by hand, from the gradients of a run that takes no step."""
    toy.write_caches(tmp_path)
    rate, limit = 0.5, 2.6
    default = ["--optimizer_type", "SGD", "--learning_rate", rate, "--max_train_steps", 1]

    plain = train_dit(tmp_path, *default, *UNCLIPPED)
    clipped = train_dit(tmp_path, *default, FUSED, "--max_grad_norm", limit)

    norms = []
    for name, before in initial_weights().items():
        gradient = (before - plain[name]) / rate
        norms.append(float(gradient.norm()))
        expected = before - rate * gradient * min(1.0, limit / (norms[-1] + 1e-6))
        torch.testing.assert_close(clipped[name], expected, rtol=1e-4, atol=1e-7)
    assert min(norms) < limit < max(norms)  # some were clipped, some were not


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--gradient_accumulation_steps 2", "--gradient_accumulation_steps 2"),
        ("--mixed_precision fp16", "--mixed_precision fp16"),
        ("--optimizer_type Prodigy", "one learning rate from the gradients of all weights"),
        ("--optimizer_type AdamWScheduleFree", "counts its steps for all weights together"),
        (f"--optimizer_type {Descent.__module__}.Descent", "not known to step each weight by itself"),
    ],
)
@pytest.mark.parametrize("way", [(), ("--check",), ("--plan",)], ids=["train", "check", "plan"])
def test_where_it_would_not_be_exact_it_is_refused_with_the_reason(
    tmp_path: Path, words: str, expected: str, way: tuple[str, ...]
) -> None:
    require_package(words.split()[1])
    toy.write_caches(tmp_path)

    with pytest.raises(OptionError, match=f"{FUSED}.*{expected}|{expected}.*{FUSED}"):
        train_dit(tmp_path, FUSED, *words.split(), *way)


# --- weights in bf16
# ------------------------------------------------------------------------------------------------------------


def test_stochastic_rounding_gives_a_neighbour_and_the_value_on_average() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.tensor([1.0, 1.001, -1.001, 0.3, 1e-30, -3e38, 0.0])

    drawn = torch.stack([stochastic_bfloat16(values, generator).float() for _ in range(4000)])

    below = values.view(torch.int32).bitwise_and(-(1 << 16)).view(torch.float32)
    above = (below.view(torch.int32) + (1 << 16)).view(torch.float32)
    assert bool(((drawn == below) | (drawn == above)).all())
    assert bool((drawn[:, [0, 6]] == values[[0, 6]]).all())  # what bf16 can say stays
    spread = (above - below).abs()
    assert bool(((drawn.double().mean(0) - values).abs() <= 0.03 * spread).all())
    assert bool((stochastic_bfloat16(torch.tensor([torch.inf, -torch.inf]), generator).isinf()).all())


def test_steps_far_below_bf16s_precision_are_not_lost() -> None:
    """Fifty steps of 1e-5 on weights near 1, where bf16 goes on in steps of 4e-3 and rounding to the nearest
    would stand still.
    """
    weight = nn.Parameter(torch.linspace(1, 1.9, 100 * 200).view(100, 200).bfloat16())
    start = weight.detach().float()
    optimizer = torch.optim.SGD([weight], lr=1e-5)
    progress = Progress(seed=3, session_id=0, started_at=0.0)
    steps = ParameterSteps(optimizer, {weight: "dit.weight"}, progress)

    for progress.step in range(50):
        weight.grad = torch.ones_like(weight)
        steps.step(weight)

    assert weight.dtype == torch.bfloat16
    assert float((weight.detach().float() - start).mean()) == pytest.approx(-5e-4, rel=0.1)


def test_fused_steps_leave_weights_that_the_step_does_not_reach() -> None:
    """As those of sound in a step of silent clips: momentum and decay would move them."""
    names = ("video", "audio", "skipped")
    weights = {name: nn.Parameter(torch.ones(3)) for name in names}
    video, audio, skipped = weights.values()
    optimizer = torch.optim.AdamW(weights.values(), lr=0.1, weight_decay=0.1)
    progress = Progress(seed=3, session_id=0, started_at=0.0)
    steps = ParameterSteps(optimizer, {weight: name for name, weight in weights.items()}, progress)
    fused = FusedBackward(steps, [*weights.values()], max_norm=0)
    (video + audio + skipped).sum().backward()
    fused.finish([*weights.values()])
    before = {name: weight.detach().clone() for name, weight in weights.items()}

    (2 * video).sum().backward()
    norm = fused.finish([video, skipped])

    moved = [name for name in names if not torch.equal(weights[name].detach(), before[name])]
    assert moved == ["video", "skipped"]
    assert float(norm) == pytest.approx(2 * 3**0.5)
    assert float(fused.finish([])) == 0


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.AdamW, {"weight_decay": 0.0}),
        (Adafactor, {"relative_step": False, "scale_parameter": False}),
    ],
    ids=["AdamW", "Adafactor"],
)
def test_a_rate_of_1e_5_moves_weights_only_if_rounding_is_stochastic(
    kind: type[torch.optim.Optimizer], settings: dict[str, Any]
) -> None:
    """Ten steps of about 1e-5: next to 1, numbers of bf16 are 1/128 apart, so one in 78 weights moves."""
    start = torch.linspace(1, 1.9, 200 * 200).view(200, 200).bfloat16()
    moved = {}
    for is_stochastic in (True, False):
        weight = nn.Parameter(start.clone())
        optimizer: Any = kind([weight], lr=1e-5, **settings)
        progress = Progress(seed=3, session_id=0, started_at=0.0)
        steps = ParameterSteps(optimizer, {weight: "dit.weight"}, progress)
        for progress.step in range(10):
            weight.grad = torch.ones_like(weight)
            if is_stochastic:
                steps.step(weight)
            else:
                optimizer.step()
        moved[is_stochastic] = int((weight.detach() != start).sum())

    assert moved[False] == 0
    assert moved[True] == pytest.approx(start.numel() * 10 * 1e-5 * 128, rel=0.25)


def test_training_keeps_the_weights_in_bf16(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    start = toy.ToyFamily().load_dit(Placement(torch.device("cpu"))).bfloat16().state_dict()

    trained = train_dit(tmp_path, *BF16, "--optimizer_type", "AdamW", "--save_state")

    assert {tensor.dtype for tensor in trained.values()} == {torch.bfloat16}
    assert not any(torch.equal(trained[name], tensor) for name, tensor in start.items())
    moments = toy.state_tensors(tmp_path / "output" / "x-state")["optimizer"]
    assert {tensor.dtype for tensor in moments.values()} == {torch.float32}


def test_fp16_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--full_fp16 is refused: .*--full_bf16"):
        toy.toy_options(tmp_path, "--full_fp16", full_dit=True)


# --- what learns, what is saved
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [(), (FUSED,)], ids=["usual", "fused"])
def test_the_rest_of_the_model_stays_as_it_is(tmp_path: Path, fused: tuple[str, ...]) -> None:
    toy.write_caches(tmp_path)
    parts = ("blocks.1.up", "head")

    trained = train_dit(
        tmp_path, *fused, "--trainable_modules", *parts, "--optimizer_args", "weight_decay=0.1"
    )

    changed = {name for name, tensor in initial_weights().items() if not torch.equal(tensor, trained[name])}
    assert changed == {name for name in trained if name.startswith(parts)}


def test_a_part_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    with pytest.raises(OptionError, match="nonsense"):
        train_dit(tmp_path, "--trainable_modules", "nonsense")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", torch.float32),
        ("--save_precision bf16", torch.bfloat16),
        ("--save_precision fp16", torch.float16),
    ],
)
def test_the_file_is_the_model_in_the_precision_asked_for(
    tmp_path: Path, words: str, expected: torch.dtype
) -> None:
    toy.write_caches(tmp_path)
    retention = ["--save_every_n_steps", 3, "--save_last_n_steps", 2]

    saved = train_dit(tmp_path, *words.split(), *retention)

    shapes = {name: value.shape for name, value in initial_weights().items()}
    assert {name: tensor.shape for name, tensor in saved.items()} == shapes
    assert {tensor.dtype for tensor in saved.values()} == {expected}
    files = sorted(path.name for path in (tmp_path / "output").iterdir())
    assert files == ["x-step00000006.safetensors", "x.safetensors"]
    metadata = toy.metadata_of(tmp_path / "output" / "x.safetensors")
    assert metadata["modelspec.architecture"] == "toy"
    assert metadata["ss_steps"] == "8"
    assert "ss_network_module" not in metadata


def test_a_tensor_that_is_kept_in_another_dtype_is_saved_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.write_caches(tmp_path)
    change_dit(monkeypatch, lambda dit: dit.get_submodule("head").float())

    saved = train_dit(tmp_path, *BF16, FUSED, "--max_train_steps", 1)

    wide = {name for name, tensor in saved.items() if tensor.dtype == torch.float32}
    assert wide == {"head.weight", "head.bias"}


# --- going on
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow_cases("fused", "part")
@pytest.mark.parametrize(
    "how",
    [
        (FUSED, "--optimizer_type", "Adafactor"),  # it finds its own rate
        (FUSED, "--optimizer_type", "AdamW", *BF16, "--lr_scheduler", "cosine"),
        (*BF16, "--optimizer_type", "AdamW", "--gradient_accumulation_steps", "2"),
        ("--trainable_modules", "blocks", "--optimizer_type", "SGD", "--optimizer_args", "momentum=0.9"),
    ],
    ids=["fused", "fused bf16", "bf16", "part"],
)
def test_a_killed_run_ends_with_equal_bytes(tmp_path: Path, how: tuple[str, ...]) -> None:
    toy.write_caches(tmp_path)
    words = [*how, "--save_every_n_steps", 2, "--save_state", "--resume", "latest"]
    expected = train_dit(tmp_path, *words)

    assert toy.same(expected, toy.train_with_kills(tmp_path, *words, moments=(0, 3, 2), full_dit=True))
    ours, theirs = (toy.state_tensors(tmp_path / folder / "x-state") for folder in ("output", "killed"))
    assert all(toy.same(ours[part], theirs[part]) for part in ("dit", "optimizer"))


def test_samples_and_validation_come_from_the_model_that_learns(tmp_path: Path) -> None:
    toy.write_caches(tmp_path, count=6)
    words = [FUSED, *UNCLIPPED, "--validation_split", "0.2"]
    alone = train_dit(tmp_path, *words)
    found: list[Tensor] = []

    prompts = toy.write_prompts(tmp_path, "a cat --f 5 --s 2 --d 1\n")
    words += ["--sample_prompts", prompts, "--sample_every_n_steps", 4, "--validate_every_n_steps", 2]
    trained = train_dit(tmp_path, *words, family=toy.ToyFamily(on_decode=found.append))

    assert toy.same(alone, trained)
    assert len(found) == 2
    assert not torch.equal(found[0], found[1])  # the model had learned meanwhile
