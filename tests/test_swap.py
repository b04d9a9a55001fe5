"""Runs with swapped blocks, from the command lines of the families: their files are those of runs without, to
the bit.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny.families import TWO_LISTS, family_called, write_deep
from tests.tiny.runs import RUN, TinyProject, make_project
from tests.training.toy import same, state_tensors

ADAFACTOR = (
    *("--optimizer_type", "adafactor", "--optimizer_args", "relative_step=False", "scale_parameter=False"),
)
SAMPLES = ("--sample_prompts", "prompts.txt", "--sample_every_n_steps", "2")
FUSED = ("--fused_backward_pass", *ADAFACTOR, "--learning_rate", "1e-2", "--max_grad_norm", "0")


# tests/runtime/offload has two lists of blocks; tests/frame_pack/test_training.py and
# tests/ltx_2/test_training.py have one of these for every day
LATER = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("hunyuan_video", "framepack", "kandinsky", "hunyuan_video_15", "ltx_2", "ltx_2 with sound")
]
OF_IMAGES = (
    "lumina",
    "hunyuan_image",
    "flux",
    "kontext",
    "flux_2",
    "flux_3",
    "z_image",
    "krea2",
    "krea2 edit",
)
OF_IMAGES += ("qwen_image", "qwen_image edit-2511", "qwen_image_21", "qwen_image_21 edit", "anima")
OF_IMAGES += ("moss_image", "moss_image edit", "fibo_2", "fibo_2 edit", "ernie_image", "hidream_o1")
OF_IMAGES += ("hidream_o1 edit", "ideogram4")
IMAGES = [pytest.param(name, marks=pytest.mark.slow) for name in OF_IMAGES]


@pytest.fixture(scope="module", params=["wan t2v-1.3B", *LATER, *IMAGES])
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    """With blocks enough to swap."""
    return make_project(family_called(request.param), tmp_path_factory.mktemp("swap"), write_deep)


def swap_most(project: TinyProject) -> tuple[str, ...]:
    """Swap as many blocks as the family can."""
    default = "4" if project.family.name in TWO_LISTS else "3"
    maximum = {"flux_3": "5", "z_image": "2", "anima": "2"}.get(project.family.name, default)
    return "--blocks_to_swap", maximum, "--img_in_txt_in_offloading"


@pytest.mark.slow_cases("wan t2v-1.3B-fp8")
@pytest.mark.parametrize(
    "usual",
    [
        (),
        ("--gradient_checkpointing", "--fp8_base", "--fp8_scaled"),
        ("--gradient_checkpointing", "--mixed_precision", "bf16"),
    ],
    ids=["kept", "fp8", "bf16"],
)
def test_a_lora_is_trained_to_the_same_bits(
    project: TinyProject, tmp_path: Path, usual: Sequence[str]
) -> None:
    expected = project.train(tmp_path / "plain", *usual)

    found = project.train(tmp_path / "swapped", *usual, *swap_most(project))

    assert same(expected, found)
    assert any(tensor.any() for name, tensor in found.items() if "lora_up" in name or "lora_B" in name)


def test_samples_and_resuming_change_nothing(project: TinyProject, tmp_path: Path) -> None:
    swap = ("--blocks_to_swap", "2", "--gradient_checkpointing")
    expected = project.train(tmp_path / "plain", "--gradient_checkpointing")

    project.train(tmp_path / "first", *swap, *SAMPLES, "--save_state", "--max_train_steps", 2)
    found = project.train(tmp_path / "second", *swap, "--resume", tmp_path / "first" / "x-state")

    assert same(expected, found)


@pytest.mark.parametrize("usual", [(), ("--fp8", "--fp8_scaled")], ids=["plain", "fp8"])
def test_the_same_latents_are_generated(project: TinyProject, tmp_path: Path, usual: Sequence[str]) -> None:
    """Two videos, one after the other."""
    lines = tmp_path / "lines.txt"
    lines.write_text("a cat --d 5\na dog --d 6 --s 2\n", encoding="utf-8")

    expected = project.generate(tmp_path / "plain", "--from_file", lines, *usual)
    found = project.generate(tmp_path / "swapped", "--from_file", lines, *usual, *swap_most(project))

    assert len(found) == 2
    assert all(same(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "more",
    [
        pytest.param((), id="float32", marks=pytest.mark.slow),
        pytest.param(("--full_bf16", "--mixed_precision", "bf16", "--gradient_checkpointing"), id="bf16"),
    ],
)
def test_a_whole_transformer_is_trained_to_the_same_bits(
    project: TinyProject, tmp_path: Path, more: Sequence[str]
) -> None:
    """Saved in between, resumed, and sampled from; both the file and the state hold what the blocks have
    learned.
    """
    if not project.family.train_full:
        pytest.skip("no script trains the whole transformer")
    models = project.family.train[1 : project.family.train.index("--network_module")]

    def train(name: str, *words: object) -> dict[str, Tensor]:
        default = (*RUN, *FUSED, *more, "--output_dir", tmp_path / name)
        project.run(project.family.train_full, *models, *default, *words)
        return load_file(tmp_path / name / "x.safetensors")

    expected = train("plain")
    saved = ("--save_every_n_steps", 2, "--save_state")
    swapped = train("swapped", *swap_most(project)[:2], *SAMPLES, *saved)
    state = tmp_path / "swapped" / "x-step00000002-state"
    resumed = train("resumed", "--blocks_to_swap", 1, "--resume", state)

    assert same(expected, swapped)
    assert same(expected, resumed)
    between = load_file(tmp_path / "swapped" / "x-step00000002.safetensors")
    assert same(between, train("short", "--max_train_steps", 2))
    assert same(between, state_tensors(state)["dit"])
