"""Whole transformers of picture families, by their scripts: files in 16 and in 8 bits, and plans."""

import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from krea2.files import find_release
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.tiny.families import OUTPUT, TinyFamily, family_called
from tests.tiny.runs import make_project

FUSED = ("--full_bf16", "--fused_backward_pass", "--max_grad_norm", "0", "--optimizer_type", "adafactor")
KEPT = ("--optimizer_args", "relative_step=False", "scale_parameter=False", "warmup_init=False")
BF16 = ("--mixed_precision", "bf16", "--learning_rate", "1e-2", *FUSED, *KEPT)
DAILY = "krea2"
NAMES = (
    *("krea2", "flux", "chroma", "lumina", "hunyuan_image"),
    *("flux_2", "flux_3", "qwen_image_21", "kontext", "z_image", "qwen_image"),
)


def whole_words(family: TinyFamily) -> list[str]:
    models = family.train[1 : family.train.index("--network_module")]
    return [family.train_whole, *models, *OUTPUT]


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name != DAILY)) for name in NAMES], scope="module"
)
def project(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TinyFamily, Path]:
    family, folder = family_called(request.param), tmp_path_factory.mktemp("whole")
    make_project(family, folder)
    path = folder / "model" / "dit.safetensors"
    narrow = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(narrow, path)
    return family, folder


def test_a_file_in_bf16_has_the_names_and_dtypes_of_its_source(project: tuple[TinyFamily, Path]) -> None:
    """Also layers that compute in float32; a resumed run ends with equal bytes."""
    family, folder = project
    words = [
        *whole_words(family),
        *BF16,
        "--max_train_steps",
        "2",
        "--save_every_n_steps",
        "1",
        "--save_state",
    ]

    printed = io.StringIO()
    assert run_here(*words, "--plan", folder=folder, printed=printed)[0] == 0
    assert "optimizer" in printed.getvalue()
    assert not (folder / "output").exists()
    succeed_here(*words, folder=folder)

    before, after = (
        load_file(folder / name) for name in ("model/dit.safetensors", "output/lora.safetensors")
    )
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in after.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in before.items()
    }
    moved = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    # of Qwen-Image, what the last block makes of the text has no effect
    assert len(moved) > 0.85 * len(before)
    state = "output/lora-step00000001-state"
    succeed_here(*words, "--resume", state, "--output_dir", "resumed", folder=folder)
    resumed = load_file(folder / "resumed" / "lora.safetensors")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in after.items())


def test_a_base_in_8_bits_is_refused_at_once(project: tuple[TinyFamily, Path]) -> None:
    family, folder = project
    state = load_file(folder / "model" / "dit.safetensors")
    small = {
        name: tensor.to(torch.float8_e4m3fn) if "s.0." in name and tensor.ndim == 2 else tensor
        for name, tensor in state.items()
    }
    path = folder / "model" / "small.safetensors"
    save_file(small, path)
    words = whole_words(family)
    words[words.index("model/dit.safetensors")] = str(path)

    for more in ((), ("--plan",)):
        code, said = run_here(*words, "--max_train_steps", "1", *more, folder=folder)
        assert_one_message(
            code, said, "small.safetensors is in float8_e4m3fn", "Give the bf16 file of the model ("
        )
        assert "Loading" not in said


def test_turbo_is_given_as_what_is_trained(tmp_path: Path) -> None:
    """Files say it to generation whatever they are called; samples on Turbo are refused by name."""
    family = family_called("krea2")
    make_project(family, tmp_path)
    words = [*whole_words(family), "--max_train_steps", "1"]

    code, said = run_here(*words, "--turbo_dit", "model/turbo.safetensors", folder=tmp_path)
    assert_one_message(code, said, "--turbo_dit is refused", "does not contain", "--dit_variant turbo")
    said = succeed_here(*words, "--dit_variant", "turbo", folder=tmp_path)

    assert "is Krea 2 Turbo: --dit_variant turbo" in said
    assert find_release(tmp_path / "output" / "lora.safetensors") == (
        True,
        "its ss_krea2_dit_variant is turbo",
    )
    raw = succeed_here(*words, "--dit_variant", "raw", "--overwrite", folder=tmp_path)
    assert "few steps" not in raw
    assert find_release(tmp_path / "output" / "lora.safetensors") == (
        False,
        "its ss_krea2_dit_variant is raw",
    )
