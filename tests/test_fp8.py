"""Options of fp8 weights from the command line to files, in every family: training, resuming, generation,
text encoders.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from modules.errors import CheckpointError
from tests.tiny.dit_files import as_fp8
from tests.tiny.families import FAMILIES, LTX_2, Command, TinyFamily
from tests.tiny.project import write_lora

OUTPUT = ["--output_dir", "output", "--seed", "1", "--max_data_loader_n_workers", "0"]
SIZE = ["--video_size", "32", "32", "--infer_steps", "2", "--device", "cpu"]
TRAINED = [
    ["--fp8_base"],
    ["--fp8_base", "--fp8_scaled"],
    ["--fp8_base", "--fp8_scaled", "--upcast_quantization"],
]
GENERATED = [
    ["--fp8"],
    ["--fp8_scaled"],
    ["--fp8_scaled", "--fp8", "--upcast_quantization"],
    ["--fp8_scaled", "--upcast_linear"],
]
TEXTS_IN_FP8 = {  # option, and the tensor in caches that it changes
    "wan t2v-1.3B": ("--fp8_t5", "t5"),
    "hunyuan_video": ("--fp8_llm", "llm"),
    "framepack": ("--fp8_llm", "llama_vec"),
    "hunyuan_image": ("--fp8_vl", "vlm_embed"),
    "qwen_image": ("--fp8_vl", "vl_embed"),
    "qwen_image edit-2511": ("--fp8_vl", "vl_embed"),
    "z_image": ("--fp8_llm", "llm_embed"),
    "flux": ("--fp8_t5", "t5_out"),
    "kontext": ("--fp8_t5", "t5_vec"),
    "flux_2": ("--fp8_text_encoder", "ctx_vec"),
    "ltx_2 with sound": ("--gemma_load_in_8bit", "prompt_embeds"),
}
# of the first tests/frame_pack has what is its own
SLOW = {"framepack", "lumina", "hunyuan_image", "flux", "flux_2", "kontext", "qwen_image"}
SLOW |= {"qwen_image edit-2511", "z_image", "ltx_2 with sound"}
CHOSEN = [
    pytest.param(family, id=family.name, marks=pytest.mark.slow if family.name in SLOW else ())
    for family in FAMILIES
    if family.name in {"wan t2v-1.3B", "hunyuan_video", *SLOW}
]


def run(*command: str) -> None:
    """A root script within this process: quicker than a process of its own."""
    importlib.import_module(command[0].removesuffix(".py")).main(list(command[1:]))


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Of all tensors together, relative to the second."""
    assert one.keys() == other.keys()
    apart = sum(float((one[name].float() - other[name].float()).square().sum()) for name in other)
    return float((apart / sum(float(tensor.float().square().sum()) for tensor in other.values())) ** 0.5)


@pytest.fixture(scope="module", params=CHOSEN)
def project(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TinyFamily, Path]:
    """A family's files with caches."""
    family: TinyFamily = request.param
    folder = tmp_path_factory.mktemp("fp8")
    family.prepare(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(*family.cache_latents)
        run(*family.cache_texts)
    return family, folder


@pytest.fixture
def family(project: tuple[TinyFamily, Path], monkeypatch: pytest.MonkeyPatch) -> TinyFamily:
    monkeypatch.chdir(project[1])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return project[0]


def trained(family: TinyFamily, name: str, *more: str) -> dict[str, Tensor]:
    """The LoRA of a run with these options."""
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate keeps it for the life of a process
    run(*family.train, *OUTPUT, "--output_name", name, *more)
    return load_file(f"output/{name}.safetensors")


def generated(family: TinyFamily, folder: Path, *more: str) -> dict[str, Tensor]:
    """The latents of a generation with these options, with those of its sound."""
    words = ["--prompt", "a cat", "--seed", "7", "--output_type", "latent", "--save_path", str(folder)]
    run(*family.generate, *SIZE, *words, *more)
    (path,) = folder.glob("*_latent.safetensors")
    return load_file(path)


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[float]:
    """The difference of each part, picture and sound."""
    assert found.keys() == expected.keys()
    return [difference({name: found[name]}, {name: expected[name]}) for name in expected]


def load_weights() -> dict[str, Tensor]:
    """The tensors of the transformer."""
    if not Path(LTX_2).exists():
        return load_file("model/dit.safetensors")
    start = "model.diffusion_model."
    whole = load_file(LTX_2)
    return {name.removeprefix(start): tensor for name, tensor in whole.items() if name.startswith(start)}


def with_dit(command: Command, path: Path) -> Command:
    """The same command with another transformer."""
    if "--ltx2_checkpoint" in command:  # the file of all other parts
        return [*command, "--dit", str(path)]
    return [
        str(path) if before in {"--dit", "--pretrained_model_name_or_path"} else word
        for before, word in zip(["", *command], command, strict=False)
    ]


@pytest.mark.parametrize("how", TRAINED, ids=" ".join)
def test_training_with_fp8_weights_learns_nearly_the_same(family: TinyFamily, how: list[str]) -> None:
    """With plain gradient descent the factor `up` is after one step the gradient itself, times the learning
    rate.
    """
    one_step = ["--optimizer_type", "SGD", "--max_train_steps", "1", "--learning_rate", "1"]
    expected = trained(family, "plain", *one_step)
    found = trained(family, "fp8", *one_step, *how)

    ups = [
        {name: t for name, t in lora.items() if name.endswith("lora_up.weight")} for lora in (found, expected)
    ]
    # weights that are off by 2.25 % (a plain cast of these small ones: 4 %) through a few layers
    assert 1e-3 < difference(*ups) < (0.2 if "--fp8_scaled" in how else 0.4)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    with safe_open("output/fp8.safetensors", "pt") as file:
        assert file.metadata()["ss_fp8_base"] == "True"


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_resumed_run_with_fp8_weights_ends_with_equal_bytes(family: TinyFamily, precision: str) -> None:
    how = ["--fp8_base", "--fp8_scaled", "--mixed_precision", precision, "--gradient_checkpointing"]
    whole = trained(family, "whole", *how, "--max_train_steps", "3")
    trained(family, "half", *how, "--max_train_steps", "2", "--save_state")
    resumed = trained(family, "resumed", *how, "--max_train_steps", "3", "--resume", "output/half-state")

    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("how", GENERATED, ids=" ".join)
def test_generation_with_fp8_weights_makes_nearly_the_same(
    family: TinyFamily, tmp_path: Path, how: list[str]
) -> None:
    expected, found = generated(family, tmp_path / "plain"), generated(family, tmp_path / "fp8", *how)
    assert all(1e-4 < one < (0.05 if "--fp8_scaled" in how else 0.1) for one in apart(found, expected))


def test_loras_are_merged_before_the_rounding(
    project: tuple[TinyFamily, Path], family: TinyFamily, tmp_path: Path
) -> None:
    """A LoRA and --fp8_scaled give what the merged model does with --fp8_scaled."""
    lora = tmp_path / "lora.safetensors"
    if "wan" in family.name:
        write_lora(lora, project[1] / "model" / "dit.safetensors")
    else:
        lora = Path("output/for_merging.safetensors").absolute()
        trained(family, "for_merging", "--max_train_steps", "2", "--learning_rate", "0.1")
    say = ["--lora_weight", str(lora), "--lora_multiplier", "0.9"]
    run(
        *family.generate,
        *say,
        *("--prompt", "", "--save_path", str(tmp_path)),
        *("--save_merged_model", str(tmp_path / "merged.safetensors"), "--device", "cpu"),
    )

    merged = TinyFamily(
        **{**vars(family), "generate": with_dit(family.generate, tmp_path / "merged.safetensors")}
    )
    expected = generated(merged, tmp_path / "from_merged", "--fp8_scaled")
    found = generated(family, tmp_path / "from_lora", "--fp8_scaled", *say)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dialect", ["fp8", "fp8_scaled"])
def test_released_fp8_files_stay_in_fp8_and_give_what_they_give_multiplied_out(
    family: TinyFamily, tmp_path: Path, dialect: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(as_fp8(load_weights(), dialect), tmp_path / "dit.safetensors")
    here = TinyFamily(**{**vars(family), "generate": with_dit(family.generate, tmp_path / "dit.safetensors")})
    expected = generated(here, tmp_path / "plain")
    with caplog.at_level("INFO"):
        found = generated(here, tmp_path / "fp8", "--fp8")

    assert "linear layers stay in fp8" in caplog.text
    # both compute in bf16; modulation, where it is in fp8, is then multiplied in float32
    # guided 3.5 times, and a picture of few tokens: that enlarges the rounding
    wide = {"hunyuan_image": 3e-2, "qwen_image": 3e-2, "qwen_image edit-2511": 3e-2, "z_image": 3e-2}
    limits = {"lumina": 2e-2, **wide}
    limit = limits.get(family.name, 1e-2)
    assert max(apart(found, expected)) < limit
    with pytest.raises(CheckpointError, match="--fp8_scaled: .*already in fp8"):
        generated(here, tmp_path / "again", "--fp8_scaled")

    train = TinyFamily(**{**vars(family), "train": with_dit(family.train, tmp_path / "dit.safetensors")})
    lora = trained(train, "released", "--fp8_base", "--max_train_steps", "1", "--mixed_precision", "bf16")
    assert all(tensor.isfinite().all() for tensor in lora.values())


def _skip_without_fp8_texts(family: TinyFamily) -> None:
    if family.name not in TEXTS_IN_FP8:
        pytest.skip("its text encoders are kept in 16 bits")


def test_text_encoders_in_fp8_give_nearly_the_same_and_caches_of_their_own(family: TinyFamily) -> None:
    _skip_without_fp8_texts(family)
    option, key = TEXTS_IN_FP8[family.name]

    def caches() -> dict[str, dict[str, Tensor]]:
        return {path.name: load_file(path) for path in sorted(Path("cache").glob("*_te.safetensors"))}

    before = caches()
    run(*family.cache_texts, option)  # the caches are there, but were made with other weights
    after = caches()
    try:
        assert before.keys() == after.keys()
        for name, tensors in after.items():
            # dtype is part of the names: the usual one comes out
            assert tensors.keys() == before[name].keys()
            change = difference(
                *({part: t for part, t in found.items() if key in part} for found in (tensors, before[name]))
            )
            # T5's attention is not scaled: of random weights it is sharp
            assert 1e-4 < change < (0.3 if option == "--fp8_t5" else 0.15)
    finally:
        run(*family.cache_texts)  # for the other tests of this project
    assert all(
        torch.equal(tensor, before[name][part])
        for name, found in caches().items()
        for part, tensor in found.items()
    )
