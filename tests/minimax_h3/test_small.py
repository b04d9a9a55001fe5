"""MiniMax-H3 on small cards: int8 files as distributed, and plans of memory of the released sizes."""

import json
import math
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_kitchen.backends.eager.quantization import (
    dequantize_int8_convrot_weight,
    quantize_int8_convrot_weight,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.stored.forms import get_quantized_weight
from minimax_h3.dit_checkpoints import load_dit
from minimax_h3.model import H3Model
from modules.speed_options import Quantization
from protocols.loading import Placement
from tests.commands import run_script
from tests.faults.messages import succeed_here
from tests.manifests import WIDTHS, tensor_list, write_hollow
from tests.minimax_h3.test_training import CLIPS, Project
from tests.minimax_h3.tiny_dit import released, their_dit
from tests.tiny.minimax_h3 import TinyH3, write_tiny_h3, write_tokenizer

SCRIPT = "minimax_h3_generate_video.py"
CPU = torch.device("cpu")
ROUNDED = r"blocks\.\d+\.(attn\.(qkv|out)_proj|mlp\.fc[12]|adaln_proj\.linear)"  # of files in circulation
WIDTHS_OF_GROUPS: dict[str, Any] = {
    **{"hidden_size": 256, "num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 256},
    **{"time_embed_dim": 64, "text_dim": 64, "num_layers": 2},
}


def round_file(path: Path) -> Path:
    """Write the transformer's blocks in int8 as distributed, and the values of that file in its place.

    Groups have 256 columns, those of `adaln_proj` 64. Pruned files have its few columns in float16 instead.
    """
    plain: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    for name, tensor in load_file(path).items():
        plain[name] = made[name] = tensor
        layer = re.fullmatch(rf"({ROUNDED})\.weight", name)
        if layer is None:
            continue
        size = 64 if ".adaln_proj." in name else 256
        if tensor.shape[1] % size:
            plain[name] = made[name] = tensor.half()
            continue
        codes, scale = quantize_int8_convrot_weight(tensor, size)
        plain[name] = dequantize_int8_convrot_weight(codes, scale, size).contiguous()
        mark = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": size}
        made[name] = codes
        made[f"{layer[1]}.weight_scale"] = scale
        made[f"{layer[1]}.comfy_quant"] = torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)
    rounded = path.with_name(f"{path.stem}_int8_convrot.safetensors")
    save_file(made, rounded)
    save_file(plain, path)
    return rounded


def prune(tensors: dict[str, Tensor], whole: H3Model) -> dict[str, Tensor]:
    """Put a table of 1025 times, 8 wide, in place of the network that embeds them."""
    pruned = {name: tensor for name, tensor in tensors.items() if not name.startswith("time_embedder.")}
    times = whole._embed_timesteps(torch.linspace(0, 1, 1025).tolist(), CPU)
    generator = torch.Generator().manual_seed(2)
    for name, tensor in pruned.items():
        if name.endswith("adaln_proj.linear.weight"):
            pruned[name] = torch.randn(len(tensor), 8, generator=generator) / 8
    return {**pruned, "adaln_t_table": times[:, :8].contiguous()}


@pytest.fixture(scope="module", params=["whole", "pruned"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyH3:
    """A transformer that is as wide as groups of columns are; its values are those of the rounded file."""
    folder = tmp_path_factory.mktemp(request.param)
    made = write_tiny_h3(folder / "model")
    tensors = released(their_dit(**WIDTHS_OF_GROUPS).state_dict())
    save_file(tensors, made.dit)
    if request.param == "pruned":
        save_file(prune(tensors, load_dit(made.dit, Placement(CPU))), made.dit)
    round_file(made.dit)
    return made


def rounded_of(files: TinyH3) -> Path:
    return files.dit.with_name(f"{files.dit.stem}_int8_convrot.safetensors")


def test_an_int8_file_holds_the_values_that_it_was_made_of(files: TinyH3) -> None:
    plain = load_dit(files.dit, Placement(CPU))

    rounded = load_dit(rounded_of(files), Placement(CPU))

    values = dict(plain.named_modules())
    stored = {
        name: found for name, layer in rounded.named_modules() if (found := get_quantized_weight(layer))
    }
    is_pruned = rounded.config.table_rows > 0
    assert {name for name in values if re.fullmatch(ROUNDED, name)} - stored.keys() == (
        {"blocks.0.adaln_proj.linear", "blocks.1.adaln_proj.linear"} if is_pruned else set()
    )
    for name, weight in stored.items():
        torch.testing.assert_close(weight.dequantize(), values[name].weight.float(), atol=1e-6, rtol=1e-5)


def latents_in(folder: Path) -> Tensor:
    (path,) = folder.glob("*_latent.safetensors")
    return torch.cat([tensor.flatten() for tensor in load_file(path).values()])


def test_an_int8_file_makes_nearly_the_clip_of_its_values(tmp_path: Path, files: TinyH3) -> None:
    """Tokens are rounded to int8 on their way, by rows."""
    made = []
    words = ["--prompt", "a cat", "--video_size", "32", "64", "--video_length", "5", "--seed", "3"]
    words += ["--allow_experimental_duration", "--infer_steps", "2", "--output_type", "latent"]
    for number, dit in enumerate((files.dit, rounded_of(files))):
        folder = tmp_path / str(number)
        folder.mkdir()
        models = [*files.words, "--dit", str(dit), "--dit_dtype", "float32"]
        succeed_here(SCRIPT, *models, *words, "--save_path", ".", "--device", "cpu", folder=folder)
        made.append(latents_in(folder))
    error = (made[1] - made[0]).norm() / made[0].norm()
    assert 1e-5 < error < 0.03


def hollow_int8(path: Path) -> Path:
    """The pruned file in int8 as distributed, of its full size, without data; its header says the forms."""
    tensors = tensor_list("minimax-h3-dit-pruned")
    layers = {}
    for name, (_, shape) in list(tensors.items()):
        layer = re.fullmatch(rf"({ROUNDED})\.weight", name)
        if layer is None or shape[1] == 8:
            continue
        layers[layer[1]] = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}
        tensors[name] = "I8", shape
        tensors[f"{layer[1]}.weight_scale"] = "F32", (shape[0], 1)
    header: dict[str, Any] = {"__metadata__": {"_quantization_metadata": json.dumps({"layers": layers})}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * {**WIDTHS, "I8": 1}[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return path


def cut_text_encoder(path: Path) -> Path:
    """The first 50 layers, as single files have them."""
    tensors = tensor_list("qwen3-vl-32b")
    kept = {}
    for name, entry in tensors.items():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if layer is None or int(layer[1]) < 50:
            kept[name] = entry
    return write_hollow(path, kept)


@pytest.mark.slow  # half a minute each
@pytest.mark.parametrize(("form", "maximum"), [("bf16", 7.0), ("int8", 5.0)])
def test_480p_with_48_blocks_in_host_memory_is_planned_on_16_gib(
    tmp_path: Path, form: str, maximum: float
) -> None:
    """Of the released sizes: 124 frames of 832x480. The text encoder has layers in host memory too."""
    dit = tmp_path / "minimax_h3_fl2va.safetensors"
    if form == "int8":
        hollow_int8(dit)
    else:
        write_hollow(dit, tensor_list("minimax-h3-dit"))
    text = tmp_path / "text"
    text.mkdir()
    models = {
        "--dit": dit,
        "--video_vae": write_hollow(tmp_path / "vae.safetensors", tensor_list("minimax-h3-video-vae")),
        "--audio_vae": write_hollow(tmp_path / "sound.safetensors", tensor_list("minimax-h3-audio-vae")),
        "--text_encoder": cut_text_encoder(text / "qwen3vl_32b_minimax_h3_bf16.safetensors"),
        "--tokenizer": write_tokenizer(tmp_path / "tokenizer"),
    }
    words = [str(word) for pair in models.items() for word in pair]
    clip = ["--prompt", "a cat", "--video_size", "480", "832", "--video_length", "124", "--save_path", "out"]

    memory = ["--blocks_to_swap", "48", "--plan", "16"]
    said = run_script(SCRIPT, *words, *clip, *memory, folder=tmp_path).stdout

    denoising, host = gib_of(said, "denoising")
    assert denoising < maximum
    assert gib_of(said, "weights of the transformer")[0] < denoising
    assert 48 / 50 * (60 if form == "bf16" else 18) < host
    assert "48 blocks swapped" in said
    assert gib_of(said, r"text encoder vl \(largest\)")[1] > 30
    assert "Fits" in said
    if form == "int8":
        assert "int8" in said


def gib_of(said: str, row: str) -> tuple[float, float]:
    """The figures of a row of the plan: of the device, and of the host."""
    found = re.search(rf"^ *{row} +([\d.]+)(?: +([\d.]+))?", said, re.MULTILINE)
    assert found is not None, said
    return float(found[1]), float(found[2] or 0)


def test_an_int8_file_is_trained_on(tmp_path: Path, files: TinyH3) -> None:
    """With nearly the losses of its values, a clip held out, and four modules of each block."""
    project = Project(tmp_path)
    project.cache(CLIPS)
    run = ["--output_dir", "out", "--learning_rate", 1e-4, "--seed", 5, "--max_data_loader_n_workers", 0]
    run += ["--max_train_steps", 2, "--validation_split", 0.5, "--validate_every_n_steps", 1]
    for name, dit in (("plain", files.dit), ("int8", rounded_of(files))):
        project.train("--dit", dit, *run, "--output_name", name)

    assert project.losses("int8") == pytest.approx(project.losses("plain"), rel=0.03)
    assert len(project.losses("int8")) >= 2
    saved = project.saved("int8")
    assert len(saved) == 3 * 4 * WIDTHS_OF_GROUPS["num_layers"]
    assert all(tensor.isfinite().all() for tensor in saved.values())


@pytest.mark.slow
def test_training_with_48_blocks_in_host_memory_is_planned_on_16_gib(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.cache([replace(clip, text=torch.zeros(len(clip.text), 5120)) for clip in CLIPS])
    write_hollow(tmp_path / "dit.safetensors", tensor_list("minimax-h3-dit"))
    memory = ["--mixed_precision", "bf16", "--gradient_checkpointing", "--blocks_to_swap", "48"]
    words = [*project.words, "--output_dir", "out", "--output_name", "lora", *memory, "--plan", "16"]

    said = run_script("minimax_h3_train_network.py", *words, folder=tmp_path).stdout

    assert gib_of(said, "weights of the transformer")[0] < 5
    assert "48 blocks swapped" in said
    assert "Fits" in said


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "h3.safetensors"])
def test_a_file_is_rounded_to_the_bytes_of_the_file_in_circulation(tmp_path: Path, name: str) -> None:
    """Shards have their rows by head; the int8 file that is made of them has them stacked."""
    state = their_dit(**WIDTHS_OF_GROUPS).state_dict()
    save_file(released(state, is_interleaved="-of-" in name), tmp_path / name)
    save_file(released(state), tmp_path / "stacked.safetensors")
    expected = load_file(round_file(tmp_path / "stacked.safetensors"))

    words = ["--form", "convrot", "--device", "cpu", "--output", "int8.safetensors"]
    succeed_here("tools/quantise.py", "--model", name, *words, folder=tmp_path)

    made = load_file(tmp_path / "int8.safetensors")
    assert made.keys() == expected.keys()
    for tensor, value in expected.items():
        if tensor.endswith("comfy_quant"):
            assert json.loads(bytes(made[tensor].tolist())) == json.loads(bytes(value.tolist()))
        elif value.dtype == torch.int8:  # sums of another order: values between two codes
            error = (made[tensor].int() - value.int()).abs()
            assert error.max() <= 1
            assert error.count_nonzero() <= 1e-4 * error.numel()
        else:
            torch.testing.assert_close(made[tensor], value, atol=0, rtol=1e-6)
    assert load_dit(tmp_path / "int8.safetensors", Placement(CPU)).config.num_layers == 2


def test_a_pruned_file_keeps_its_few_columns_when_it_is_rounded(tmp_path: Path) -> None:
    save_file(released(their_dit(**WIDTHS_OF_GROUPS).state_dict()), tmp_path / "whole.safetensors")
    full = load_dit(tmp_path / "whole.safetensors", Placement(CPU))
    save_file(prune(load_file(tmp_path / "whole.safetensors"), full), tmp_path / "pruned.safetensors")

    words = ["--form", "convrot", "--device", "cpu", "--output", "int8.safetensors"]
    succeed_here("tools/quantise.py", "--model", "pruned.safetensors", *words, folder=tmp_path)

    made = load_file(tmp_path / "int8.safetensors")
    assert made["blocks.0.adaln_proj.linear.weight"].is_floating_point()
    assert made["blocks.0.attn.qkv_proj.weight"].dtype == torch.int8


@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "h3.safetensors"])
def test_layers_that_are_rounded_while_loading_are_those_of_the_file_in_circulation(
    tmp_path: Path, name: str
) -> None:
    state = their_dit(**WIDTHS_OF_GROUPS).state_dict()
    save_file(released(state, is_interleaved="-of-" in name), tmp_path / name)

    rounded = load_dit(tmp_path / name, Placement(CPU, quantization=Quantization("rows", form="int8")))

    stored = {name for name, layer in rounded.named_modules() if get_quantized_weight(layer) is not None}
    assert stored == {name for name, _ in rounded.named_modules() if re.fullmatch(ROUNDED, name)}
