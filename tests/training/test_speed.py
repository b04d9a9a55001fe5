"""Compiled blocks and checkpoints in whole runs with kills in between; samples with LoRAs of their own."""

from pathlib import Path, PureWindowsPath

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from modules.errors import CheckpointError, OptionError
from networks.apply import LoraPatch
from networks.gated_loras import add_loras
from networks.loading import WeightedLora, read_lora
from networks.multipliers import split_multiplier
from protocols.loading import Placement
from tests.training import toy
from tests.training.test_resume import EVERYTHING

CHECKPOINTS = ["--gradient_checkpointing", "--gradient_checkpointing_cpu_offload"]
CHECKPOINTS += ["--gradient_checkpointing_keep", "attention"]
COMPILED = ["--compile", "--compile_args", "eager", "default", "auto", "true"]


pytestmark = pytest.mark.usefixtures("nothing_compiled")


@pytest.mark.slow_cases("compiled")
@pytest.mark.parametrize("how", [CHECKPOINTS, [*CHECKPOINTS, *COMPILED]], ids=["checkpoints", "compiled"])
def test_a_killed_run_ends_with_the_bytes_of_a_plain_one(tmp_path: Path, how: list[str]) -> None:
    toy.write_caches(tmp_path, count=5)
    expected = toy.train_toy(tmp_path, *EVERYTHING)

    assert toy.same(expected, toy.train_with_kills(tmp_path, *EVERYTHING, *how, moments=(1, 8)))


def test_a_backend_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    """Not even the caches are looked for, of which there are none."""
    toy.write_caches(tmp_path, count=0)

    with pytest.raises(OptionError, match=r"no backend ofi here"):
        toy.train_toy(tmp_path, "--dynamo_backend", "ofi")


def test_a_run_that_goes_on_uncompiled_is_told_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    toy.write_caches(tmp_path)
    toy.train_toy(tmp_path, *COMPILED, "--max_train_steps", 2, "--save_state")

    toy.train_toy(tmp_path, "--max_train_steps", 3, "--resume", "latest")

    assert "--compile was True when the state was saved" in caplog.text


CPU = torch.device("cpu")


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


DOWN, UP, BIAS = random(2, 8), random(16, 2), random(16)
KINDS = {
    "LoRA": {"lora_down.weight": DOWN, "lora_up.weight": UP, "alpha": torch.tensor(1.0)},
    "LoRA with bias": {"lora_down.weight": DOWN, "lora_up.weight": UP, "diff_b": BIAS},
    "LoKr": {"lokr_w1": random(4, 2), "lokr_w2": random(4, 4)},
    "LoHa": {"hada_w1_a": UP, "hada_w1_b": DOWN, "hada_w2_a": -UP, "hada_w2_b": 2 * DOWN},
    "difference": {"diff": random(16, 8), "diff_b": BIAS},
}
DORA = {**KINDS["LoRA"], "dora_scale": torch.ones(16, 1)}


def write_file(folder: Path, factors: dict[str, Tensor], module: str = "blocks_0_up") -> Path:
    path = folder / "own style.safetensors"
    save_file({f"lora_unet_{module}.{part}": tensor for part, tensor in factors.items()}, path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_added_is_what_merging_gives_and_switched_off_nothing(tmp_path: Path, kind: str) -> None:
    lora = read_lora(write_file(tmp_path, KINDS[kind]))
    dit = toy.ToyFamily().load_dit(Placement(CPU))
    merged = toy.ToyFamily().load_dit(Placement(CPU, patch=LoraPatch([WeightedLora(lora, 0.5)])))
    inputs = random(1, 2, 1, 4, 4), torch.tensor([500.0]), [torch.ones(1, 1)]
    with torch.no_grad():
        before = dit(*inputs)
        added = add_loras(dit, [WeightedLora(lora, 0.5)])
        with added.switched_on(CPU, torch.float32):
            torch.testing.assert_close(dit(*inputs), merged(*inputs), rtol=1e-5, atol=1e-6)
            assert not torch.equal(dit(*inputs), before)
        assert torch.equal(dit(*inputs), before)


@pytest.mark.slow_cases("compiled")
@pytest.mark.parametrize(
    "how",
    [[], ["--gradient_checkpointing", "--blocks_to_swap", 1], COMPILED, ["--mixed_precision", "bf16"]],
    ids=["usual", "swapped", "compiled", "bf16"],
)
def test_the_run_ends_with_the_same_bits_and_samples_differ(tmp_path: Path, how: list[object]) -> None:
    toy.write_caches(tmp_path)
    path = write_file(tmp_path, KINDS["LoRA"])
    options = [*how, "--sample_prompts", toy.write_prompts(tmp_path), "--sample_every_n_steps", 2]
    options += ["--max_train_steps", 4]
    plain: list[Tensor] = []
    own: list[Tensor] = []

    expected = toy.train_toy(tmp_path, *options, family=toy.ToyFamily(on_decode=plain.append))
    options += ["--sample_lora", f"{path}:3"]
    found = toy.train_toy(tmp_path, *options, family=toy.ToyFamily(on_decode=own.append))

    assert toy.same(found, expected)
    assert all(not torch.equal(one, other) for one, other in zip(plain, own, strict=True))
    images = sorted((tmp_path / "output" / "sample").iterdir())
    texts = {Image.open(image).info["bt_sampled_from"] for image in images}
    assert "x_000002 + own style.safetensors:3" in texts


@pytest.mark.parametrize(
    ("given", "file", "multiplier"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("C:\\x y\\a.safetensors:-1e-1", "C:\\x y\\a.safetensors", -0.1),
        ("C:\\a.safetensors", "C:\\a.safetensors", 1.0),
    ],
)
def test_a_multiplier_stands_behind_the_last_colon(given: str, file: str, multiplier: float) -> None:
    path, found = split_multiplier("--sample_lora", Path(given))

    assert (PureWindowsPath(path), found) == (PureWindowsPath(file), multiplier)


def test_a_name_with_a_colon_in_it_is_taken_as_it_is_if_there_is_such_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: path.name == "a:2")

    assert split_multiplier("--sample_lora", tmp_path / "a:2") == (tmp_path / "a:2", 1.0)


@pytest.mark.parametrize("given", ["no.safetensors:0.8", "no.safetensors", "no:nan", "no:inf"])
def test_a_missing_file_or_a_multiplier_that_is_none_is_refused(tmp_path: Path, given: str) -> None:
    with pytest.raises(OptionError, match="--sample_lora"):
        toy.toy_options(tmp_path, "--sample_lora", given)


@pytest.mark.parametrize("option", ["--sample_lora", "--training_adapter"])
@pytest.mark.parametrize(
    ("factors", "module", "reason"),
    [
        (KINDS["LoRA"], "blocks_7_up", "cannot be used: its names begin with"),
        (KINDS["LoRA"], "blocks_0_down", r"has \[16, 8\], the model \[8, 16\]"),
        (DORA, "blocks_0_up", "is a DoRA"),
    ],
    ids=["another name", "another size", "DoRA"],
)
def test_a_file_that_does_not_fit_is_refused_before_the_first_step(
    tmp_path: Path, option: str, factors: dict[str, Tensor], module: str, reason: str
) -> None:
    toy.write_caches(tmp_path)
    path, family = write_file(tmp_path, factors, module), toy.ToyFamily()
    words = ["--sample_prompts", toy.write_prompts(tmp_path), "--sample_at_first", option, path]

    with pytest.raises(CheckpointError, match=f"{option} .*{reason}"):
        toy.train_toy(tmp_path, *words, family=family)
    assert not family.passes
