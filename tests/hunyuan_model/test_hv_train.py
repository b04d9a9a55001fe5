"""Full fine-tuning of a tiny HunyuanVideo from the command line."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hunyuan_model.checkpoints import load_dit
from protocols.loading import Placement
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.tiny.hunyuan import write_tiny_hunyuan
from tests.tiny.hunyuan_dit import tiny_state, write_dit
from tests.tiny.hunyuan_encoders import CLIP_DIM, LLM_DIM
from tests.tiny.project import write_clips, write_dataset, write_image

SCRIPT = "hv_train.py"
DATASET = ("--dataset_config", "dataset.toml")
VAE = ("--vae", "model/vae.safetensors", "--vae_dtype", "float32")
ENCODERS = ("--text_encoder1", "model/text_encoder", "--text_encoder2", "model/text_encoder_2")
SHORT = (
    *(*DATASET, "--sdpa", "--seed", "7", "--max_data_loader_n_workers", "0", "--output_name", "x"),
    *("--max_train_steps", "3"),
)
ADAFACTOR = (
    *("--optimizer_type", "adafactor", "--optimizer_args", "relative_step=False"),
    "scale_parameter=False",
)
FUSED = (
    *("--fused_backward_pass", *ADAFACTOR, "--learning_rate", "1e-2", "--max_grad_norm", "0"),
    "--gradient_checkpointing",
)


def cached(folder: Path, kind: str, *more: str) -> Path:
    """Models, clips, caches."""
    write_tiny_hunyuan(folder / "model", kind)
    write_clips(folder / "clips", count=2)
    write_dataset(folder, frames="5")
    write_image(folder / "start.png", 32, 32)
    for script, *arguments in (
        ("cache_latents.py", *VAE, *more),
        ("cache_text_encoder_outputs.py", *ENCODERS),
    ):
        succeed_here(script, *DATASET, *arguments, folder=folder)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cached(tmp_path_factory.mktemp("t2v"), "t2v")


def dit_of(project: Path) -> list[str]:
    """The transformer by its whole path: what is known of a file is kept by its path for the life of a
    process.
    """
    return ["--dit", str(project / "model" / "dit.safetensors")]


def train(
    project: Path, output: Path, *arguments: object, dit: list[str] | None = None
) -> dict[str, torch.Tensor]:
    """Run the script; returns the tensors of the file it ends with."""
    succeed_here(
        SCRIPT, *(dit or dit_of(project)), *SHORT, "--output_dir", output, *arguments, folder=project
    )
    return load_file(output / "x.safetensors")


def test_bf16_weights_learn_and_what_computes_in_float32_stays_float32(project: Path, tmp_path: Path) -> None:
    bf16 = ("--full_bf16", "--mixed_precision", "bf16")

    trained = train(project, tmp_path / "out", *FUSED, *bf16)
    rounded = train(project, tmp_path / "rounded", *FUSED, *bf16, "--save_precision", "bf16")

    dtypes = {name.partition(".")[0]: tensor.dtype for name, tensor in trained.items()}
    assert dtypes["double_blocks"] == dtypes["single_blocks"] == torch.bfloat16
    assert dtypes["time_in"] == dtypes["vector_in"] == torch.float32
    assert all(torch.equal(rounded[name], tensor.bfloat16()) for name, tensor in trained.items())
    dit = load_dit(tmp_path / "out" / "x.safetensors", Placement(torch.device("cpu")))
    assert dit.compute_dtype == torch.bfloat16
    with safe_open(tmp_path / "out" / "x.safetensors", "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "hunyuan-video"


def test_image_to_video_models_are_fine_tuned_too(tmp_path: Path) -> None:
    project = cached(tmp_path / "i2v", "i2v", "--i2v")

    trained = train(
        project,
        tmp_path / "out",
        *FUSED,
        "--dit_in_channels",
        "32",
        "--trainable_modules",
        "single_blocks",
        "img_in",
    )

    before = load_file(project / "model" / "dit.safetensors")
    assert trained["img_in.proj.weight"].shape[1] == 32
    changed = {
        name.partition(".")[0] for name, tensor in before.items() if not torch.equal(trained[name], tensor)
    }
    assert changed == {"single_blocks", "img_in"}


def test_a_bf16_checkpoint_is_trained_in_float32(project: Path, tmp_path: Path) -> None:
    state = tiny_state("t2v", dtype=torch.bfloat16, text_dim=LLM_DIM, pooled_dim=CLIP_DIM)

    trained = train(
        project,
        tmp_path / "out",
        *FUSED,
        "--mixed_precision",
        "bf16",
        dit=["--dit", str(write_dit(tmp_path, state))],
    )

    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dit_dtype", "bfloat16"], ["--dit_dtype", "--full_bf16"]),
        (["--img_in_txt_in_offloading"], ["--img_in_txt_in_offloading", "these layers are trained"]),
        (
            ["--fused_backward_pass", "--gradient_accumulation_steps", "2"],
            ["--gradient_accumulation_steps 2"],
        ),
        (["--fused_backward_pass", "--optimizer_type", "LBFGS"], ["--optimizer_type LBFGS"]),
        (["--dit_in_channels", "32"], ["--dit_in_channels 32"]),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(
    arguments: list[str], words: list[str], project: Path, tmp_path: Path
) -> None:
    code, said = run_here(
        SCRIPT, *dit_of(project), *SHORT, "--output_dir", tmp_path, *arguments, folder=project
    )

    assert_one_message(code, said, *words)
