"""What a file is is told by its tensors' names, also of released files at full size, without data."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from encoders.clip_checkpoints import ClipTextConfig
from encoders.clip_layers import ClipText
from modules.errors import CheckpointError, UserError
from protocols import families
from tests.manifests import TensorList, write_hollow
from tests.stable_diffusion.loaded import change_json, load, save
from tests.tiny import stable_diffusion as tiny

UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tokenizer_folder(tmp_path_factory.mktemp("tokenizers"))


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
    path = save(tmp_path / "other.safetensors", {name: torch.ones(shape) for name, shape in shapes.items()})

    with pytest.raises(CheckpointError, match=f"(?s){said}.*Pass a checkpoint of Stable Diffusion"):
        load(path)


def test_another_number_of_channels_is_named(tmp_path: Path, tokenizers: Path) -> None:
    path = save(tmp_path / "pix2pix.safetensors", tiny.single_file_state("sd1", in_channels=8))

    with pytest.raises(CheckpointError, match="takes 8 channels"):
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
    "an attention": cut(f"{UNET}middle_block.1."),
    "all attention": cut(*(f"{UNET}{side}_blocks.{n}.1." for side in ("input", "output") for n in range(9))),
    "label_emb": cut(f"{UNET}label_emb."),
    "a level of the VAE": cut("first_stage_model.decoder.up.3."),
    "the first text encoder": cut("conditioner.embedders.0."),
    "the projection": cut(f"{TEXT}text_projection"),
    "an odd width": reshape(f"{RES}in_layers.2.weight", 33, 32, 3, 3),
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
    state = tiny.single_file_state("sdxl")
    DAMAGES[damage](state)
    path = save(tmp_path / "damaged.safetensors", state)

    with pytest.raises(CheckpointError, match=r"damaged\.safetensors"):
        load(path, "--tokenizer_cache_dir", tokenizers)


# Folders


UNET_CONFIG, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
# a file, what is changed in it, and what the message has to say
FOLDERS: list[tuple[str, dict[str, object], str]] = [
    (UNET_CONFIG, {"_class_name": "X"}, "it is a X"),
    (UNET_CONFIG, {"block_out_channels": "32"}, "block_out_channels is '32'"),
    (UNET_CONFIG, {"time_cond_proj_dim": 256}, "latent consistency"),
    (UNET_CONFIG, {"encoder_hid_dim_type": "text_proj"}, "Pass"),
    ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "Tiny"),
    ("vae/config.json", {"latents_mean": [1, 1, 1, 1]}, "latents_mean"),
    (SCHEDULER, {"prediction_type": "sample"}, "predicts 'sample'"),
    (SCHEDULER, {"beta_start": float("nan")}, "beta_start is nan; .* trained with 0.00085"),
    (SCHEDULER, {"beta_end": True}, "beta_end is True"),
    (SCHEDULER, {"beta_schedule": "linear"}, "beta_schedule is linear"),
    (SCHEDULER, {"trained_betas": [0.1, 0.2]}, "trained_betas is .* trained with none"),
    (SCHEDULER, {"num_train_timesteps": 10**12}, "num_train_timesteps is 1000000000000"),
    ("text_encoder/config.json", {"model_type": "chatglm"}, "chatglm"),
    ("text_encoder/config.json", {"hidden_act": "relu"}, "relu"),
]


@pytest.mark.parametrize(("file", "values", "said"), FOLDERS)
def test_a_folder_that_says_something_else_gets_one_message(
    file: str, values: dict[str, object], said: str, tmp_path: Path
) -> None:
    path = tiny.write_folder("sd1", tmp_path / "folder")
    change_json(path / file, **values)

    with pytest.raises(UserError, match=f"(?s)folder.*{said}"):
        load(path)


@pytest.mark.parametrize(
    ("kind", "missing", "said"),
    [
        ("sd1", "vae", "no folder vae"),
        ("sd1", "unet/diffusion_pytorch_model.safetensors", "unet"),
        ("sdxl", "text_encoder", "refiner of Stable Diffusion XL"),
    ],
)
def test_what_a_folder_lacks_is_named(kind: str, missing: str, said: str, tmp_path: Path) -> None:
    path = tiny.write_folder(kind, tmp_path / "folder")
    (path / missing).rename(tmp_path / "away")

    with pytest.raises(CheckpointError, match=said):
        load(path)


def test_a_hint_to_users_of_other_scripts_says_which_takes_the_file(tmp_path: Path) -> None:
    file, folder = tiny.write_sdxl(tmp_path), tiny.write_folder("sd1", tmp_path / "sd1")

    scripts = (
        "sdxl_train_network.py and sdxl_generate_image.py; for `new` --family stable_diffusion --task xl"
    )
    assert families.identify(file) == f"it is a Stable Diffusion XL checkpoint. Its scripts are {scripts}"
    assert "sd_generate_image.py" in str(families.identify(folder))


META = torch.device("meta")
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
CLIP_L = ClipTextConfig(49408, 77, 768, 3072, 12, 12)
VIT_H = ClipTextConfig(49408, 77, 1024, 4096, 16, 24, "gelu")
BIG_G = ClipTextConfig(49408, 77, 1280, 5120, 20, 32, "gelu")
TENSORS = {"sd1": 686, "sd2": 686, "sdxl": 1680}  # of the U-Net
# heads of the U-Net's levels, layers of each text encoder, parameters of the U-Net
INFO = {
    "sd1": ({8}, [12], 859_520_964),
    "sd2": ({5, 10, 20}, [23], 865_910_724),
    "sdxl": ({10, 20}, [12, 32], 2_567_463_684),
}


def text(config: ClipTextConfig) -> dict[str, Tensor]:
    names = ClipText(config).state_dict()
    return {f"text_model.{name}": tensor for name, tensor in names.items()}


def released(kind: str) -> dict[str, Tensor]:
    """Names and shapes of a released single file; tensors on the meta device."""
    with META:
        unet = UNet2DConditionModel(**tiny.RELEASED_UNETS[kind]).state_dict()
        vae = AutoencoderKL(**VAE).state_dict()
        parts = {"model.diffusion_model.": tiny.ldm_unet(unet), "first_stage_model.": tiny.ldm_vae(vae)}
        assert len(unet) == TENSORS[kind]
        if kind == "sd1":
            parts["cond_stage_model.transformer."] = text(CLIP_L)
        elif kind == "sd2":
            unused = {"text_projection.weight": torch.empty(1024, 1024)}
            parts["cond_stage_model.model."] = tiny.open_clip({**text(VIT_H), **unused})
        else:
            parts["conditioner.embedders.0.transformer."] = text(CLIP_L)
            parts["conditioner.embedders.1.model."] = tiny.open_clip(
                {**text(BIG_G), "text_projection.weight": torch.empty(1280, 1280)}
            )
    return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}


@pytest.mark.slow_cases("sd2", "sdxl")
@pytest.mark.parametrize("kind", tiny.RELEASED_UNETS)
def test_a_released_file_is_recognised_and_fits_as_a_whole(kind: str, tmp_path: Path) -> None:
    tensors: TensorList = {name: ("F16", tuple(one.shape)) for name, one in released(kind).items()}
    path = write_hollow(tmp_path / f"{kind}.safetensors", tensors)

    model = load(
        path, "--tokenizer_cache_dir", tiny.tokenizer_folder(tmp_path), "--fp16", "--no_half_vae", device=META
    )

    assert model.kind.name == kind
    assert len(model.unet.state_dict()) == TENSORS[kind]
    theirs = {
        name: value for name, value in tiny.RELEASED_UNETS[kind].items() if name != "attention_head_dim"
    }
    found = {name: model.unet.config[name] for name in theirs}
    assert found == theirs
    heads, layers, parameters = INFO[kind]
    firsts = [name for name, _ in model.unet.named_modules() if name.endswith("transformer_blocks.0.attn1")]
    assert {model.unet.get_submodule(name).heads for name in firsts} == heads
    assert [tower.network.num_layers for tower in model.text_encoders] == layers
    assert sum(one.numel() for one in model.unet.parameters()) == parameters
