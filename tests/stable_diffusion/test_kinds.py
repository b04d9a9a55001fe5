"""What a file is is told by its tensors' names; everything else gets one message that says what it is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from modules import families
from modules.errors import CheckpointError, OptionError, UserError
from tests.stable_diffusion.loaded import load
from tests.tiny.stable_diffusion import (
    single_file_state,
    tokenizer_folder,
    write_folder,
    write_sd2,
    write_sdxl,
)

UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizers"))


def write(path: Path, state: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


@pytest.mark.parametrize(
    ("told", "kind", "is_said"),
    [
        ("--sdxl", "sd2", "--sdxl: {path} is Stable Diffusion 2.x, by its tensors"),
        ("--v1", "sdxl", "--v1: {path} is Stable Diffusion XL, by its tensors"),
        ("--v2", "sdxl", "--v2: {path} is Stable Diffusion XL, by its tensors"),
    ],
)
def test_a_wrong_kind_on_the_command_line_is_corrected(
    told: str, kind: str, is_said: str, tmp_path: Path, tokenizers: Path
) -> None:
    path = {"sd2": write_sd2, "sdxl": write_sdxl}[kind](tmp_path)

    with pytest.raises(OptionError) as raised:
        load(path, told, "--tokenizer_cache_dir", tokenizers)

    assert is_said.format(path=path) in str(raised.value)


OTHERS = {
    "the refiner": (
        {"conditioner.embedders.0.model.ln_final.weight": (8,), f"{UNET}out.0.bias": (8,)},
        "the refiner of Stable Diffusion XL",
    ),
    "SD 3": ({f"{UNET}joint_blocks.0.x_block.attn.proj.bias": (8,)}, "Stable Diffusion 3"),
    "a ControlNet": ({"control_model.time_embed.0.weight": (8, 8)}, "a ControlNet"),
    "Playground": ({"edm_mean": (4,), f"{UNET}out.0.bias": (8,)}, "Playground 2.5"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_models_are_named(case: str, tmp_path: Path) -> None:
    shapes, said = OTHERS[case]
    path = write(tmp_path / "other.safetensors", {name: torch.ones(shape) for name, shape in shapes.items()})

    with pytest.raises(CheckpointError) as raised:
        load(path)

    assert said in str(raised.value)
    assert "Give a checkpoint of Stable Diffusion" in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "channels", "said"), [("sd1", 8, "takes 8 channels"), ("sd1", 5, "takes 5")]
)
def test_other_numbers_of_channels_are_named(
    kind: str, channels: int, said: str, tmp_path: Path, tokenizers: Path
) -> None:
    path = write(tmp_path / "pix2pix.safetensors", single_file_state(kind, in_channels=channels))

    with pytest.raises(CheckpointError, match=said):
        load(path, "--tokenizer_cache_dir", tokenizers)


def cut(*starts: str) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        for name in list(state):
            if name.startswith(starts):
                del state[name]

    return change


def reshape(name: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({name: torch.ones(shape)})


RES = f"{UNET}input_blocks.1.0."
TEXT = "conditioner.embedders.1.model."
DAMAGES = {
    "a block": cut(f"{UNET}input_blocks.4."),
    "an attention": cut(f"{UNET}middle_block.1."),
    "all attention": cut(*(f"{UNET}{side}_blocks.{n}.1." for side in ("input", "output") for n in range(9))),
    "label_emb": cut(f"{UNET}label_emb."),
    "a level of the VAE": cut("first_stage_model.decoder.up.3."),
    "the first text encoder": cut("conditioner.embedders.0."),
    "the projection": cut(f"{TEXT}text_projection"),
    "an odd width": reshape(f"{RES}in_layers.2.weight", 33, 32, 3, 3),
    "text width": reshape(f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight", 128, 96),
    "label width": reshape(f"{UNET}label_emb.0.0.weight", 128, 101),
    "projection": reshape(f"{TEXT}text_projection", 64, 7),
    "fused rows": reshape(f"{TEXT}transformer.resblocks.0.attn.in_proj_weight", 191, 64),
    "few tokens": reshape(f"{TEXT}token_embedding.weight", 20, 64),
    "VAE channels": reshape("first_stage_model.decoder.conv_in.weight", 64, 16, 3, 3),
    "something more": reshape(f"{UNET}adapter.weight", 2, 2),
    "a number beyond all": reshape(f"{UNET}input_blocks.9999.0.in_layers.0.weight", 2),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_gets_one_message(damage: str, tmp_path: Path, tokenizers: Path) -> None:
    state = single_file_state("sdxl")
    DAMAGES[damage](state)
    path = write(tmp_path / "damaged.safetensors", state)

    with pytest.raises(CheckpointError) as raised:
        load(path, "--tokenizer_cache_dir", tokenizers)

    assert "damaged.safetensors" in str(raised.value)


# Folders


def change_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}))


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no vae": (lambda at: shutil.rmtree(at / "vae"), "no folder vae"),
    "no weights": (lambda at: (at / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "unet"),
    "another class": (lambda at: change_json(at / "unet" / "config.json", _class_name="X"), "it is a X"),
    "text": (
        lambda at: change_json(at / "unet" / "config.json", block_out_channels="32"),
        "block_out_channels is '32'",
    ),
    "LCM": (
        lambda at: change_json(at / "unet" / "config.json", time_cond_proj_dim=256),
        "latent consistency",
    ),
    "Kolors": (lambda at: change_json(at / "unet" / "config.json", encoder_hid_dim_type="text_proj"), "Give"),
    "VAE class": (lambda at: change_json(at / "vae" / "config.json", _class_name="AutoencoderTiny"), "Tiny"),
    "VAE mean": (
        lambda at: change_json(at / "vae" / "config.json", latents_mean=[1, 1, 1, 1]),
        "latents_mean",
    ),
    "sample": (
        lambda at: change_json(at / "scheduler" / "scheduler_config.json", prediction_type="sample"),
        "predicts 'sample'",
    ),
    "text kind": (
        lambda at: change_json(at / "text_encoder" / "config.json", model_type="chatglm"),
        "chatglm",
    ),
    "activation": (lambda at: change_json(at / "text_encoder" / "config.json", hidden_act="relu"), "relu"),
}


@pytest.mark.parametrize("damage", FOLDERS)
def test_a_damaged_folder_gets_one_message(damage: str, tmp_path: Path) -> None:
    change, said = FOLDERS[damage]
    path = write_folder("sd1", tmp_path / "folder")
    change(path)

    with pytest.raises(UserError) as raised:
        load(path)

    assert said in str(raised.value)
    assert "folder" in str(raised.value)


def test_a_refiner_folder_is_named(tmp_path: Path) -> None:
    path = write_folder("sdxl", tmp_path / "refiner")
    shutil.rmtree(path / "text_encoder")

    with pytest.raises(CheckpointError, match="refiner of Stable Diffusion XL"):
        load(path)


def test_a_folder_of_something_else_is_described(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")

    with pytest.raises(CheckpointError, match=r"it holds notes\.txt"):
        load(tmp_path)


# Hints for other families' scripts


def test_a_hint_says_which_script_takes_the_file(tmp_path: Path) -> None:
    path = write_sdxl(tmp_path)

    assert families.identify(path) == (
        f"it is a Stable Diffusion XL checkpoint: python gen_img.py --ckpt {path}"
    )
    folder = write_folder("sd1", tmp_path / "sd1")
    assert "gen_img.py" in str(families.identify(folder))
