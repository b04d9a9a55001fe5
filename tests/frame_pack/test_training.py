"""fpack_train_network.py from the command line to its files: what is said of a LoRA, its start, samples, and
what is refused.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from frame_pack.family import family_for_training
from frame_pack.options import FramePackTrainingOptions
from modules.options import read_options
from modules.parser import add_options
from tests.faults.damage import flipped_data
from tests.faults.messages import assert_one_message, run_here
from tests.frame_pack.projects import FAST, OUTPUT, ProjectOf, train, write_project
from tests.tiny.families import FAMILIES, TinyFamily
from tests.tiny.framepack import write_tiny_framepack
from training.options import read_arguments, training_parser

TRAIN = "fpack_train_network.py"


def without(command: list[str], option: str) -> list[str]:
    """A command without an option and its value."""
    place = command.index(option)
    return command[:place] + command[place + 2 :]


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def refused(family: TinyFamily, folder: Path, *arguments: object, command: list[str] | None = None) -> str:
    """The message of a training that ends before its first step."""
    words = (
        *(command or family.train),
        *OUTPUT,
        "--output_dir",
        folder / "never",
        "--max_train_steps",
        1,
        *arguments,
    )
    code, said = run_here(*words, folder=folder)
    assert "Loading model/dit.safetensors" not in said
    return assert_one_message(code, said)


def test_a_lora_says_what_it_was_trained_on(project_of: ProjectOf, tmp_path: Path) -> None:
    """Without --network_module it is FramePack's own."""
    family, folder = project_of("framepack")
    unnamed = TinyFamily(**{**vars(family), "train": without(family.train, "--network_module")})
    metadata = ("--metadata_title", "A cat", "--training_comment", "for a test", "--guidance_scale", "8")
    train(folder, unnamed, tmp_path, *metadata, "--min_timestep", "100")

    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        found = file.metadata()
    assert found["ss_base_model_version"] == "framepack"
    assert found["ss_network_module"] == "networks.lora_framepack"
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "1.0")
    assert (found["ss_sd_model_name"], found["ss_vae_name"]) == ("dit.safetensors", "vae.safetensors")
    assert (found["ss_guidance_scale"], found["ss_training_comment"]) == ("8.0", "for a test")
    # sections of clips of 5 and 9 frames
    assert (found["ss_num_train_items"], found["ss_num_batches_per_epoch"]) == ("12", "6")
    (dataset,) = json.loads(found["ss_datasets"])
    assert (dataset["video_directory"], dataset["target_frames"]) == ("clips", [5, 9])
    assert found["modelspec.sai_model_spec"] == "1.0.0"
    assert found["modelspec.architecture"] == "framepack/lora"
    assert found["reelsmith_trained_for"] == "videos of FramePack"
    assert found["modelspec.implementation"] == "https://github.com/lllyasviel/FramePack"
    assert (found["modelspec.title"], found["modelspec.resolution"]) == ("A cat", "1280x720")
    assert found["modelspec.timestep_range"] == "100,1000"
    assert len(found["sshs_model_hash"]) == 64


@pytest.mark.parametrize(
    ("switches", "use"),
    [
        ([], "videos of FramePack"),
        (["--f1"], "videos of FramePack-F1"),
        (["--one_frame"], "single pictures"),
        (["--f1", "--one_frame"], "single pictures"),  # with a warning, see frame_pack/options.py
    ],
)
def test_what_a_lora_is_trained_for_is_told_apart(switches: list[str], use: str) -> None:
    parser = training_parser("")
    add_options(parser, FramePackTrainingOptions)
    options = read_options(FramePackTrainingOptions, read_arguments(parser, switches))
    assert family_for_training(options).metadata["trained_for"] == use


def test_no_metadata_keeps_what_other_tools_need(project_of: ProjectOf, tmp_path: Path) -> None:
    family, folder = project_of("framepack")
    train(folder, family, tmp_path, "--no_metadata")

    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        found = file.metadata()
    kept = {name for name in found if name.startswith("ss_")}
    assert "reelsmith_trained_for" not in found
    assert kept == {
        f"ss_{name}"
        for name in ("base_model_version", "network_module", "network_dim", "network_alpha", "network_args")
    }


@pytest.mark.parametrize(
    ("more", "expected"),
    [((), torch.bfloat16), (("--save_precision", "float"), torch.float32)],
    ids=["as the model", "asked for"],
)
def test_a_lora_has_the_dtype_of_the_transformer(
    project_of: ProjectOf, tmp_path: Path, more: tuple[str, ...], expected: torch.dtype
) -> None:
    family, folder = project_of("framepack")
    half = write_tiny_framepack(tmp_path / "model", torch.bfloat16).dit
    tensors, _ = train(folder, family, tmp_path, "--dit", half, "--mixed_precision", "bf16", *more)

    assert {tensor.dtype for tensor in tensors.values()} == {expected}
    assert {name.split(".")[0] for name in tensors} >= {
        "lora_unet_transformer_blocks_0_attn_add_q_proj",
        "lora_unet_transformer_blocks_1_ff_context_net_0_proj",
        "lora_unet_single_transformer_blocks_2_proj_mlp",
    }
    assert not any("norm" in name or "embedder" in name for name in tensors)


def test_a_run_goes_on_from_a_lora_and_beside_another(project_of: ProjectOf, tmp_path: Path) -> None:
    """--network_weights with --dim_from_weights takes its ranks from the file; --base_weights are part of the
    frozen weights.
    """
    family, folder = project_of("framepack")
    ranks = ("--network_dim", "6", "--network_alpha", "3")
    first, _ = train(folder, family, tmp_path / "first", *ranks, *FAST)
    lora = tmp_path / "first" / "lora.safetensors"

    further, _ = train(
        folder,
        family,
        tmp_path / "second",
        "--network_weights",
        lora,
        "--dim_from_weights",
        "--learning_rate",
        "0",
    )
    assert same(first, further)

    beside, said = train(
        folder, family, tmp_path / "third", "--base_weights", lora, "--base_weights_multiplier", "0.5"
    )
    alone, _ = train(folder, family, tmp_path / "fourth")
    assert "39 weights changed, multiplier 0.5" in said
    assert not same(beside, alone)


@pytest.mark.slow  # four trainings; tests/modules has the parts
def test_swapped_blocks_in_fp8_and_checkpointed_give_the_same_bits(
    project_of: ProjectOf, tmp_path: Path
) -> None:
    family, folder = project_of("framepack f1")
    blocks = write_tiny_framepack(tmp_path / "model", double_blocks=3, single_blocks=6).dit
    usual = ("--dit", blocks, "--fp8_base", "--fp8_scaled", "--gradient_checkpointing")
    expected, _ = train(folder, family, tmp_path / "plain", *usual, steps=2)

    found, _ = train(
        folder,
        family,
        tmp_path / "swapped",
        *usual,
        "--blocks_to_swap",
        "4",
        "--img_in_txt_in_offloading",
        steps=2,
    )

    assert same(expected, found)
    assert any(tensor.any() for name, tensor in found.items() if "lora_up" in name)
    assert "at most 4" in refused(family, folder, "--dit", blocks, "--blocks_to_swap", 5)


# --- caches
# ------------------------------------------------------------------------------------------------------------


def test_caches_of_hunyuan_video_are_named_where_those_of_framepack_are_missing(tmp_path: Path) -> None:
    hunyuan, framepack = (
        next(each for each in FAMILIES if each.name == name) for name in ("hunyuan_video", "framepack")
    )
    folder = write_project(tmp_path, hunyuan)
    write_tiny_framepack(folder / "model")

    said = refused(framepack, folder)

    assert "no latent cache" in said
    assert "clip 0_00000-001_0032x0032_hv.safetensors is for another model" in said
    for word in (
        "python fpack_cache_latents.py",
        "python fpack_cache_text_encoder_outputs.py",
        "--image_encoder",
    ):
        assert word in said


@pytest.mark.parametrize(
    ("name", "switch"), [("framepack f1", "--f1"), ("framepack one frame", "--one_frame")]
)
def test_the_command_for_missing_caches_makes_those_that_are_trained(
    project_of: ProjectOf, tmp_path: Path, name: str, switch: str
) -> None:
    family, folder = project_of(name)
    config = tmp_path / "dataset.toml"
    text = (folder / "dataset.toml").read_text(encoding="utf-8")
    config.write_text(text.replace("/cache", "/nowhere"), encoding="utf-8")

    said = refused(family, folder, "--dataset_config", config)

    (line,) = (line for line in said.splitlines() if "fpack_cache_latents.py" in line)
    assert line.split()[-1] == switch


def test_a_damaged_section_is_named_with_the_command_that_mends_it(
    project_of: ProjectOf, tmp_path: Path
) -> None:
    family, folder = project_of("framepack")
    shutil.copytree(folder / "cache", tmp_path / "cache")
    text = (folder / "dataset.toml").read_text(encoding="utf-8")
    config = tmp_path / "dataset.toml"
    config.write_text(
        text.replace(f"{folder.as_posix()}/cache", f"{tmp_path.as_posix()}/cache"), encoding="utf-8"
    )
    name = "clip 2_00000-009-0001_0032x0032_fp.safetensors"
    flipped_data(folder / "cache" / name, tmp_path / "cache" / name)

    words = (
        *family.train,
        *OUTPUT,
        "--output_dir",
        tmp_path / "out",
        "--max_train_epochs",
        1,
        "--dataset_config",
        config,
    )
    code, said = run_here(*words, folder=folder)

    assert_one_message(code, said, name, "python fpack_cache_latents.py")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_one_frame_learns_from_the_target_alone(project_of: ProjectOf, tmp_path: Path) -> None:
    """What the cache holds: the picture as the only target, its controls and the black frame behind them, and
    no coarse latents.
    """
    _, folder = project_of("framepack one frame")
    (cache,) = (folder / "cache").glob("picture 1_*_fp.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(cache).items()}

    assert shapes["latents_1x4x4_float16"] == (16, 1, 4, 4)
    assert shapes["latents_clean_1x4x4_float16"] == (16, 3, 4, 4)
    assert not any("_2x_1x" in name or "_4x_1x" in name for name in shapes)
    tensors = load_file(cache)
    # as the table says, and one after the window
    assert tensors["clean_latent_indices_int64"].tolist() == [0, 3, 2]
    assert tensors["latent_indices_int64"].tolist() == [1]
    # the second control is transparent at its left
    assert not tensors["latents_clean_1x4x4_float16"][:, 1, :, 0].any()
