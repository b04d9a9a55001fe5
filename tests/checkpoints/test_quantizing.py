"""tools/quantise.py: files with layers in 8 bits, as other programs read them, and the way back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.opening import list_tensor_sources, open_checkpoint
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.packing import pack_file
from tests.tiny import z_image
from tests.tiny.families import family_called
from tests.tiny.runs import TinyProject

TOOL = "tools/quantise.py"
SAY = ("--prompt", "a cat", "--seed", "1", "--dit_dtype", "float32")
MAX_ERROR = {
    "int8": 0.02,
    "convrot": 0.01,
    "fp8": 0.04,
}  # of |difference| in |weight|; rows of 96 normal values


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    folder = tmp_path_factory.mktemp("quantised")
    family = family_called("z_image")
    family.prepare(folder)
    return TinyProject(family, folder)


def values(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, as networks are filled with them."""
    with open_checkpoint(path) as checkpoint:
        return {
            name: source.build_tensor([checkpoint.read(part) for part in source.names])
            for name, source in list_tensor_sources(checkpoint).items()
        }


def kitchen_value(tensors: dict[str, Tensor], stem: str) -> Tensor:
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    mark = json.loads(bytes(tensors[f"{stem}.comfy_quant"].tolist()))
    weight, scale = tensors[f"{stem}.weight"], tensors[f"{stem}.weight_scale"]
    if mark["format"] == "float8_e4m3fn":
        assert scale.shape == ()  # ComfyUI has one for a weight
        found: Tensor = kitchen.dequantize_per_tensor_fp8(weight, scale, torch.float32)
    elif mark.get("convrot"):
        found = kitchen.dequantize_int8_convrot_weight(weight, scale, mark["convrot_groupsize"])
    else:
        found = kitchen.dequantize_int8_simple(weight, scale)
    return found


@pytest.mark.parametrize("form", MAX_ERROR)
def test_comfy_kitchen_reads_the_same_values(project: TinyProject, tmp_path: Path, form: str) -> None:
    """From the layout with joined queries, keys and values; names stay those of the file."""
    source, output = tmp_path / "dit.safetensors", tmp_path / f"{form}.safetensors"
    plain = {f"model.diffusion_model.{n}": t for n, t in z_image.comfy_state(z_image.tiny_state()).items()}
    save_file(plain, source, {"author": "someone", "modelspec.hash_sha256": "0x1"})

    said = succeed_here(TOOL, source, "--form", form, "--output", output, folder=tmp_path)

    ours, stored = values(output), load_file(output)
    stems = [name.removesuffix(".comfy_quant") for name in stored if name.endswith(".comfy_quant")]
    assert ours.keys() == plain.keys()
    assert len(stems) == 2 * 5  # of both blocks: the joined projection, that of the output, three of the rest
    for name, tensor in plain.items():
        if name.removesuffix(".weight") in stems:
            torch.testing.assert_close(ours[name], kitchen_value(stored, name.removesuffix(".weight")))
            assert 1e-4 < float((ours[name] - tensor).abs().sum() / tensor.abs().sum()) < MAX_ERROR[form]
        else:
            assert torch.equal(ours[name], tensor)
    with safe_open(output, "pt") as file:
        assert file.metadata() == {"format": "pt", "author": "someone"}
    assert "modelspec.hash_sha256" in said

    back = tmp_path / "back.safetensors"
    succeed_here(TOOL, output, "--form", "bf16", "--output", back, folder=tmp_path)
    widened = load_file(back)
    assert widened.keys() == plain.keys()
    for name, tensor in ours.items():
        is_layer = name.removesuffix(".weight") in stems
        assert torch.equal(widened[name], tensor.to(torch.bfloat16) if is_layer else tensor)


def test_a_written_file_generates_what_the_option_makes_of_the_16_bits(project: TinyProject) -> None:
    dit = project.folder / "model" / "dit.safetensors"
    (asked,) = project.generate("asked", *SAY, "--convrot_int8")
    project.run(TOOL, dit, "model/small.safetensors", "--form", "convrot")

    dit.rename(dit.with_name("plain.safetensors"))
    dit.with_name("small.safetensors").rename(dit)
    (read,) = project.generate("read", *SAY)
    (again,) = project.generate("again", *SAY, "--convrot_int8")  # what the file has already
    dit.with_name("plain.safetensors").replace(dit)

    assert asked.keys() == read.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in asked.items())
    assert all(torch.equal(again[name], tensor) for name, tensor in asked.items())


def test_gguf_reads_q8_0(project: TinyProject, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    dit = project.folder / "model" / "dit.safetensors"
    plain = {name: tensor.bfloat16() for name, tensor in load_file(dit).items()}
    source, output = tmp_path / "dit.safetensors", tmp_path / "dit.gguf"
    save_file(plain, source, {"author": "someone"})

    succeed_here(TOOL, source, "--form", "q8_0", "--output", output, folder=tmp_path)

    reader, ours = gguf.GGUFReader(output), values(output)
    assert reader.get_field("general.architecture").contents() == "lumina2"
    assert reader.get_field("author").contents() == "someone"
    kinds = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    assert kinds.keys() == plain.keys()
    assert [*kinds.values()].count(gguf.GGMLQuantizationType.Q8_0) == 2 * 7
    for tensor in reader.tensors:
        theirs = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        mine = plain[tensor.name].float()
        theirs = theirs.reshape(mine.shape)
        torch.testing.assert_close(ours[tensor.name].float(), theirs)
        is_layer = tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0
        assert float((theirs - mine).abs().sum()) <= (0.01 if is_layer else 0) * float(mine.abs().sum())

    back = tmp_path / "back.safetensors"
    succeed_here(TOOL, output, "--form", "bf16", "--output", back, folder=tmp_path)
    widened = load_file(back)
    assert all(torch.equal(widened[name].float(), ours[name].bfloat16().float()) for name in plain)


def test_padded_weights_become_as_large_as_the_model_has_them(tmp_path: Path) -> None:
    """mxfp8 stores rows and columns rounded up to 32."""
    pytest.importorskip("comfy_kitchen")
    state = z_image.tiny_state(dim=80, time_dim=80, num_heads=5, num_kv_heads=5)
    save_file(state, tmp_path / "dit.safetensors")
    packed = pack_file(tmp_path / "dit.safetensors", "mxfp8")
    expected = load_file(tmp_path / "dit.safetensors")  # now of the values

    succeed_here(TOOL, packed, "--form", "bf16", "--output", tmp_path / "back.safetensors", folder=tmp_path)

    found = load_file(tmp_path / "back.safetensors")
    assert {name: tensor.shape for name, tensor in found.items()} == {n: t.shape for n, t in state.items()}
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=2**-7, atol=1e-6)


def test_what_it_cannot_do_is_refused_by_name(project: TinyProject, tmp_path: Path) -> None:
    model = project.folder / "model"

    def refused(*words: object, holds: tuple[str, ...]) -> None:
        assert_one_message(*run_here(TOOL, *words, folder=tmp_path), *holds)

    small, dit = tmp_path / "small.safetensors", model / "dit.safetensors"
    succeed_here(TOOL, dit, "--form", "int8", "--output", small, folder=tmp_path)
    refused(small, "--form", "fp8", "--output", "x.safetensors", holds=("is quantized already", "16 bits"))
    refused(dit, "--form", "bf16", "--output", "x.safetensors", holds=("has no quantized weights",))
    refused(dit, "--form", "int8", "--output", dit, holds=("one of the files to read",))
    refused(dit, "--form", "q8_0", "--output", "x.safetensors", holds=("ends in .gguf",))
    refused(
        model / "vae.safetensors", "--form", "int8", "--output", "x.safetensors", holds=("a VAE", "Pass the")
    )
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    for words in (["lora.safetensors"], ["--input", "lora.safetensors"]):
        out = ("--form", "int8", "--output", "x.safetensors")
        refused(*words, *out, holds=("lora.safetensors is a LoRA", "Pass the model that it was trained for"))
    encoder = model / "text_encoder"
    refused(encoder, "--form", "q8_0", "--output", "x.gguf", holds=("is for transformers", "int8"))
    tensors = load_file(dit)
    tensors["layers.0.feed_forward.w1.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    refused(
        tmp_path / "nan.safetensors", "--form", "convrot", "--output", "x.safetensors",
        holds=("layers.0.feed_forward.w1.weight", "NaN or infinite"),
    )  # fmt: skip
    assert not [*tmp_path.glob("x.*"), *tmp_path.glob("*.tmp")]
