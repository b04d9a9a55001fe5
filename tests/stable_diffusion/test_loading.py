"""Single files and folders become the networks that diffusers itself makes of them."""

import json
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modules.errors import CheckpointError, OptionError
from stable_diffusion.checkpoints import band_convolutions
from stable_diffusion.contract import Model
from stable_diffusion.files import VAE
from stable_diffusion.folders import read_folder_unet
from stable_diffusion.released_names import VAE_LEVELS, ldm_vae_name, map_vae_names_to_diffusers
from tests.commands import ROOT
from tests.stable_diffusion.loaded import change_json, load, save
from tests.tiny import stable_diffusion as tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tiny checkpoints: KIND.safetensors, folders KIND, and tokenizers."""
    folder = tmp_path_factory.mktemp("tiny models")
    tiny.tokenizer_folder(folder / "tokenizers")
    for kind, write in tiny.WRITERS.items():
        write(folder)
        tiny.write_folder(kind, folder / kind)
    return folder


def quick(folder: Path, ckpt: str | Path, *others: object) -> Model:
    return load(folder / ckpt, "--tokenizer_cache_dir", folder / "tokenizers", *others)


def assert_equal_states(network: nn.Module, state: dict[str, Tensor]) -> None:
    found = network.state_dict()
    assert found.keys() == state.keys()
    unequal = [name for name in state if not torch.equal(found[name], state[name])]
    assert not unequal


@pytest.mark.slow_cases("sd1-single", "sdxl-single")
@pytest.mark.parametrize("layout", ["single", "folder"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_all_tensors_are_those_of_the_checkpoint(kind: str, layout: str, folder: Path) -> None:
    model = quick(folder, kind if layout == "folder" else f"{kind}.safetensors")

    assert model.kind.name == kind
    assert_equal_states(model.unet, tiny.unet_state(kind))
    assert_equal_states(model.vae, tiny.vae_state())
    assert model.vae.config.scaling_factor == tiny.KINDS[kind].latent_scale == model.kind.latent_scale
    for number, tower in enumerate(model.text_encoders):
        projected = kind == "sdxl" and number == 1
        state = tiny.text_state(kind, number, projected=projected)
        stored = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
        assert ("text_projection.weight" in stored) == projected
        assert_equal_states(tower.network, stored)
        assert tower.lora_prefix == model.kind.lora_prefixes[number]
    networks = (model.unet, model.vae, *(tower.network for tower in model.text_encoders))
    assert not any(one.training or any(each.requires_grad for each in one.parameters()) for one in networks)


def test_an_inpainting_model_takes_nine_channels(folder: Path, tmp_path: Path) -> None:
    model = quick(folder, tiny.write_sd1(tmp_path, channels=9))

    assert model.is_inpainting
    assert not quick(folder, "sd1.safetensors").is_inpainting
    assert model.unet.conv_in.weight.shape[1] == 9


@pytest.mark.slow_cases("few layers", "many layers")
@pytest.mark.parametrize(
    "sizes",
    [
        {"layers_per_block": 1},
        {"layers_per_block": 3},
        {
            "transformer_layers_per_block": ((1, 1), (2, 1)),
            "reverse_transformer_layers_per_block": ((2, 1, 3), (1, 1, 1)),
        },
    ],
    ids=["few layers", "many layers", "depths that differ within a level"],
)
def test_layers_and_depths_are_counted_in_the_file(sizes: Any, tmp_path: Path, folder: Path) -> None:
    path = tiny.write_sdxl(tmp_path, **sizes)

    assert_equal_states(quick(folder, path).unet, tiny.unet_state("sdxl", **sizes))


# Precision


@pytest.mark.parametrize(
    ("options", "dtype", "vae_dtype"),
    [
        (("--fp16",), torch.float16, torch.float16),
        (("--bf16",), torch.bfloat16, torch.bfloat16),
        (("--fp16", "--no_half_vae"), torch.float16, torch.float32),
    ],
)
def test_options_choose_the_precision(
    options: tuple[str, ...],
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = quick(folder, "sdxl.safetensors", *options)

    assert (model.dtype, model.vae_dtype) == (dtype, vae_dtype)
    assert {each.dtype for each in model.unet.parameters()} == {dtype}
    assert {each.dtype for each in model.vae.parameters()} == {vae_dtype}
    assert {each.dtype for tower in model.text_encoders for each in tower.network.parameters()} == {dtype}
    assert ("overflows in float16" in caplog.text) == (vae_dtype == torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_files_of_lower_precision_load(dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() and tensor.ndim > 1 else tensor
        for name, tensor in tiny.single_file_state("sd1").items()
    }

    model = quick(folder, save(tmp_path / "low.safetensors", state))

    name = "mid_block.attentions.0.proj_in.weight"
    assert torch.equal(model.unet.state_dict()[name], tiny.unet_state("sd1")[name].to(dtype).float())


# Containers and folders


def test_torch_files_are_read_without_running_code(folder: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": tiny.single_file_state("sd1"), "global_step": 7}, tmp_path / "sd1.ckpt")

    assert_equal_states(quick(folder, tmp_path / "sd1.ckpt").unet, tiny.unet_state("sd1"))


def test_averages_are_ignored_and_mentioned(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {"model_ema.decay": torch.tensor(0.9), "model_ema.diffusion_modelout2weight": torch.ones(2)}
    caplog.set_level("INFO")

    quick(folder, save(tmp_path / "ema.safetensors", tiny.single_file_state("sd1") | extra))

    assert "2 averaged tensors (model_ema.) are not used" in caplog.text


def test_the_text_encoder_may_lack_a_prefix(folder: Path, tmp_path: Path) -> None:
    full = "cond_stage_model.transformer.text_model."
    state = {
        key.replace(full, "cond_stage_model.transformer."): tensor
        for key, tensor in tiny.single_file_state("sd1").items()
    }

    (tower,) = quick(folder, save(tmp_path / "sd1.safetensors", state)).text_encoders

    name = "final_layer_norm.weight"
    assert torch.equal(tower.network.state_dict()[name], tiny.text_state("sd1")[f"text_model.{name}"])


def test_a_folder_may_have_other_file_names(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder / "sdxl", tmp_path / "sdxl")
    unet = copy / "unet" / "diffusion_pytorch_model.safetensors"
    unet.rename(unet.with_name("diffusion_pytorch_model.fp16.safetensors"))
    (copy / "unet" / "diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"not looked at")
    vae = copy / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(vae), vae.with_suffix(".bin"))
    vae.unlink()
    text = copy / "text_encoder" / "model.safetensors"
    torch.save(load_file(text), text.with_name("pytorch_model.bin"))
    text.unlink()

    model = quick(folder, copy)

    assert_equal_states(model.unet, tiny.unet_state("sdxl"))
    assert_equal_states(model.vae, tiny.vae_state())


def test_the_tokenizers_of_a_folder_are_its_own(folder: Path) -> None:
    first, second = load(folder / "sdxl").text_encoders  # no --tokenizer_cache_dir

    assert first.tokenize("a dog") == second.tokenize("a dog") != []


# VAE


def old_names(name: str) -> str:
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return name


@pytest.mark.parametrize(
    "layout", ["released", "prefixed", "diffusers", "old diffusers", "folder", "pipeline"]
)
def test_another_vae_takes_the_place_of_the_own(layout: str, folder: Path, tmp_path: Path) -> None:
    state = {name: tensor + 0.25 for name, tensor in tiny.vae_state().items()}
    released = tiny.ldm_vae(state)
    layouts = {
        "released": {**released, "loss.logvar": torch.zeros(1), "model_ema.decay": torch.ones(1)},
        "prefixed": {f"first_stage_model.{name}": tensor for name, tensor in released.items()},
        "old diffusers": {old_names(name): tensor for name, tensor in state.items()},
    }
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    path.parent.mkdir()
    save(path, layouts.get(layout, state))
    if layout in ("folder", "pipeline", "old diffusers"):
        shutil.copy(folder / "sd1" / "vae" / "config.json", path.parent)
    given = {"folder": path.parent, "old diffusers": path.parent, "pipeline": tmp_path}.get(layout, path)

    model = quick(folder, "sd1.safetensors", "--vae", given)

    assert_equal_states(model.vae, state)


def test_released_names_of_a_vae_are_read_as_diffusers_reads_them() -> None:
    with torch.device("meta"):
        network = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * VAE_LEVELS,
            up_block_types=("UpDecoderBlock2D",) * VAE_LEVELS,
            block_out_channels=(32, 64, 64, 32),
            layers_per_block=2,
        )
    released = {ldm_vae_name(name).removeprefix(VAE): weight for name, weight in network.state_dict().items()}
    levels = [""] * VAE_LEVELS
    config = {"down_block_types": levels, "up_block_types": levels}
    theirs = {id(weight): name for name, weight in convert_ldm_vae_checkpoint(released, config).items()}

    ours = map_vae_names_to_diffusers(released, VAE_LEVELS)

    assert {name: ours.get(name, name) for name in released} == {
        name: theirs[id(weight)] for name, weight in released.items()
    }
    assert len(ours) > 200


@pytest.mark.slow
def test_the_vae_of_a_checkpoint_is_recognized_without_diffusers(folder: Path) -> None:
    """`new`, checks and the caching of captions read its names; diffusers takes seconds to import."""
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from checkpoints.opening import open_checkpoint
from stable_diffusion.checkpoints import read_vae
with open_checkpoint(Path("sdxl.safetensors")) as checkpoint:
    read_vae(checkpoint, "--ckpt", 1.0)
print(sorted(sys.modules.keys() & {{"diffusers", "transformers", "torch._dynamo"}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, encoding="utf-8", check=True
    )
    assert done.stdout == "[]\n"


def test_a_vae_without_half_of_a_pair_is_one_message(folder: Path, tmp_path: Path) -> None:
    released = tiny.ldm_vae(tiny.vae_state())
    lost = next(name for name in released if name.endswith("upsample.conv.bias"))
    path = save(tmp_path / "vae.safetensors", {name: one for name, one in released.items() if name != lost})

    with pytest.raises(CheckpointError, match=r"missing: decoder\.up_blocks\.0\.upsamplers\.0\.conv\.bias"):
        quick(folder, "sd1.safetensors", "--vae", path)


@pytest.mark.parametrize("slices", [3, 16])
def test_slices_of_the_vae_change_nothing(slices: int) -> None:
    full, sliced = AutoencoderKL(**tiny.VAE).eval(), AutoencoderKL(**tiny.VAE).eval()
    for vae in (full, sliced):
        vae.load_state_dict(tiny.vae_state())
    latents, pixels = torch.randn(1, 4, 9, 2), torch.randn(1, 3, 72, 16)

    band_convolutions(sliced, slices)

    with torch.no_grad():
        found, wanted = (
            (vae.decode(latents).sample, vae.encode(pixels).latent_dist.mean) for vae in (sliced, full)
        )
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


def test_a_slice_takes_no_more_rows_than_it_needs() -> None:
    """The greatest picture that a convolution sees is a band with one more row on each side."""
    seen = []
    conv = nn.Conv2d(1, 1, 3, padding=1)
    band_convolutions(nn.Sequential(conv), 4)

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.nn.functional.conv2d:
                seen.append(args[0].shape[2])
            return func(*args, **(kwargs or {}))

    with Watch(), torch.no_grad():
        conv(torch.randn(1, 1, 32, 5))

    assert seen == [10, 10, 10, 10]


def test_xformers_without_a_gpu_is_refused_before_loading(folder: Path) -> None:
    for option in ("--xformers", "--diffusers_xformers"):
        with pytest.raises(OptionError, match=f"{option} runs on CUDA devices only"):
            quick(folder, "missing.safetensors", option)


# What files say of themselves


def test_marks_in_an_xl_file_tell_how_it_was_trained(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tiny.single_file_state("sdxl") | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    caplog.set_level("INFO")

    model = quick(folder, save(tmp_path / "v.safetensors", state))

    assert model.predicts_velocity
    assert model.zero_terminal_snr
    assert caplog.text.count("predicts v") == 1
    plain = quick(folder, "sdxl.safetensors", "--v_parameterization")
    assert plain.predicts_velocity
    assert not plain.zero_terminal_snr


@pytest.mark.slow
def test_a_folder_says_in_its_scheduler_what_it_predicts(folder: Path, tmp_path: Path) -> None:
    path = tiny.write_folder("sd1", tmp_path / "v", velocity=True)

    assert load(path).predicts_velocity
    assert not load(folder / "sd1").predicts_velocity
    with pytest.raises(OptionError, match="v_parameterization"):
        load(folder / "sd1", "--v_parameterization")


def test_a_file_that_left_the_unused_layer_out_already_keeps_all_others(folder: Path, tmp_path: Path) -> None:
    state = tiny.single_file_state("sd2")
    start = "cond_stage_model.model.transformer.resblocks."
    first = {name: one for name, one in state.items() if name.startswith(f"{start}0.")}
    for number in range(1, 23):
        state |= {name.replace(f"{start}0.", f"{start}{number}."): one.clone() for name, one in first.items()}

    model = quick(folder, save(tmp_path / "sd2.safetensors", state))

    assert model.text_encoders[0].network.num_layers == 23


def test_a_name_on_the_hub_is_fetched(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder / "sd1")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)

    model = load("runwayml/stable-diffusion-v1-5")

    assert model.path == folder / "sd1"
    assert asked[0][0] == "runwayml/stable-diffusion-v1-5"
    assert "unet/diffusion_pytorch_model.safetensors" in asked[0][1]


def test_config_of_a_folder_counts_where_tensors_are_silent(tmp_path: Path) -> None:
    path = tiny.write_folder("sd1", tmp_path)
    change_json(path / "unet" / "config.json", attention_head_dim=4, _diffusers_version="0.6")

    assert load(path).unet.mid_block.attentions[0].transformer_blocks[0].attn1.heads == 4


@pytest.mark.parametrize("layers", [10**9, [2, [10**9]]])
def test_more_layers_than_tensors_are_refused_before_they_are_made(tmp_path: Path, layers: object) -> None:
    path = tiny.write_folder("sd1", tmp_path)
    change_json(path / "unet" / "config.json", transformer_layers_per_block=layers)

    with pytest.raises(CheckpointError, match="it has more layers than its file has tensors"):
        load(path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"down_block_types": ["DownBlock2D"] * 100_000}, "different lengths"),
        ({"up_block_types": 5}, "not a list of names"),
        ({"down_block_types": [["DownBlock2D"]] * 4}, "not a list of names"),
        ({"layers_per_block": [2]}, "neither a number nor one for each level"),
        ({"layers_per_block": "two"}, "neither a number nor one for each level"),
        ({"cross_attention_dim": [64]}, "not a number"),
    ],
)
def test_levels_that_do_not_go_together_are_refused_in_a_line(
    tmp_path: Path, settings: dict[str, object], says: str
) -> None:
    path = tiny.write_folder("sd1", tmp_path)
    change_json(path / "unet" / "config.json", **settings)

    with pytest.raises(CheckpointError, match=says) as caught:
        load(path)

    assert len(str(caught.value)) < 600


def test_settings_that_a_folder_lacks_are_those_of_diffusers(tmp_path: Path) -> None:
    path = tiny.write_folder("sd1", tmp_path)
    file = path / "unet" / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    del settings["down_block_types"], settings["in_channels"]
    file.write_text(json.dumps(settings), encoding="utf-8")

    with ExitStack() as files, pytest.raises(CheckpointError, match="different lengths"):
        read_folder_unet(path, files)
