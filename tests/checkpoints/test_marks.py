"""What marks of packed layers say, and marks and GGUF headers that lie: one message each."""

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from checkpoints.filling import (
    QuantizedLoading,
    find_quantized_weights,
    linear_weights,
    load_module,
    on_meta_device,
)
from checkpoints.opening import list_tensor_sources, open_checkpoint
from modules.errors import CheckpointError
from tests.tiny.dit_files import write_tensors

INT8 = {"m.0.weight": torch.ones(4, 64, dtype=torch.int8), "m.0.weight_scale": torch.full((4, 1), 0.5)}


def text(mark: Any) -> Tensor:
    return torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)


def marked(mark: Any, **changed: Tensor) -> dict[str, Tensor]:
    found = INT8 | {f"m.0.{name}": one for name, one in changed.items()}
    return {**found, "m.0.comfy_quant": mark if isinstance(mark, Tensor) else text(mark)}


def value(path: Path) -> Tensor:
    with open_checkpoint(path) as checkpoint:
        source = list_tensor_sources(checkpoint)["m.0.weight"]
        return source.build_tensor([checkpoint.read(name) for name in source.names])


@pytest.mark.parametrize("shape", [(4, 1), (4,), (), (1,)])
@pytest.mark.parametrize(
    "layers", [{}, {"m.0": "int8_tensorwise"}, {"0": {"format": "int8_tensorwise"}}, {"gone": "nvfp4"}]
)
def test_both_ways_of_marks_are_read_and_every_shape_of_scales(
    tmp_path: Path, shape: tuple[int, ...], layers: dict[str, Any]
) -> None:
    state = marked({"format": "int8_tensorwise"}, weight_scale=torch.full(shape, 0.5))
    if layers and "gone" not in layers:
        del state["m.0.comfy_quant"]
    path = tmp_path / "a.safetensors"
    save_file(state, path, {"_quantization_metadata": json.dumps({"layers": layers})})

    assert torch.equal(value(path), torch.full((4, 64), 0.5))


def of_four_bits(**changed: Any) -> dict[str, Tensor]:
    state = {"quant_type": "nf4", "blocksize": 64, "shape": [4, 64], **changed}
    beside = {"absmax": torch.ones(4, dtype=torch.uint8), "quant_map": torch.linspace(-1, 1, 16)}
    nested = {"nested_absmax": torch.ones(1), "nested_quant_map": torch.ones(256)}
    tensors = {f"m.0.weight.{name}": one for name, one in (beside | nested).items()}
    tensors["m.0.weight.quant_state.bitsandbytes__nf4"] = text(state)
    return {"m.0.weight": torch.zeros(128, 1, dtype=torch.uint8), **tensors}


BAD = {
    "unknown": (marked({"format": "int3"}), "m.0 has the unknown format 'int3'.*known formats are.*nvfp4"),
    "no_json": (marked(torch.ones(9, dtype=torch.uint8)), "m.0.comfy_quant is not JSON"),
    "deep": (
        marked(torch.full((60_000,), 91, dtype=torch.uint8)),
        "m.0.comfy_quant (is not JSON|has tables)",
    ),
    "long": (marked(torch.zeros(1 << 17, dtype=torch.uint8)), "m.0.comfy_quant is not text"),
    "list": (marked([1]), "instead of a table"),
    "no_format": (marked({}), "m.0: its quantization settings cannot be read"),
    "no_scales": (marked({"format": "nvfp4"}), "m.0 has a weight of"),
    "group": (marked({"format": "int8_tensorwise", "convrot": True}), "64 columns, rotated in groups of 256"),
    "huge": (
        marked({"format": "int8_tensorwise", "convrot": 1, "convrot_groupsize": 1 << 40}),
        "convrot_groupsize",
    ),
    "zero": (marked({"format": "int8_tensorwise"}, weight_scale=torch.zeros(4, 1)), "m.0.weight has scales"),
    "nan": (marked({"format": "int8_tensorwise"}, weight_scale=torch.full((4, 1), torch.nan)), "NaN"),
    "inf": (marked({"format": "int8_tensorwise"}, weight_scale=torch.full((4, 1), torch.inf)), "infinite"),
    "shape": (
        marked({"format": "int8_tensorwise"}, weight_scale=torch.ones(3, 1)),
        "does not fit its weight",
    ),
    "no groups": (
        marked({"format": "asym_w4a8_int8"}, weight_s_rel=torch.ones(4, 0)),
        "64 bytes for 0 columns",
    ),
    "codebook of 6 bits": (
        marked(
            {"format": "asym_w4a8_int8"},
            weight=torch.ones(4, 48, dtype=torch.int8),
            weight_s_rel=torch.ones(4, 4),
            weight_s_channel=torch.ones(4),
            weight_codebook=torch.ones(16),
        ),
        "codebook for 6 bits",
    ),
    **{
        f"bitsandbytes {name}": (of_four_bits(**changed), message)
        for name, changed, message in (
            ("offset", {"nested_offset": float("nan")}, "NaN or infinite"),
            ("long offset", {"nested_offset": int("9" * 400)}, "whole number of 1,329 bits"),
            ("odd", {"shape": [4, 63], "blocksize": 1}, "not whole blocks"),
            ("kind", {"quant_type": ["nf4"]}, "nf4 and fp4 are read"),
        )
    },
}


@pytest.mark.parametrize("name", BAD)
def test_marks_that_lie_are_refused_by_the_layer(tmp_path: Path, name: str) -> None:
    state, message = BAD[name]
    path = write_tensors(tmp_path / "a.safetensors", state)

    with pytest.raises(CheckpointError, match=message):
        value(path)


def header(count: int, keys: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, count, keys) + rest


def tensor(name: bytes, shape: tuple[int, ...], kind: int, start: int) -> bytes:
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Q", len(name)) + name + axes + struct.pack("<IQ", kind, start)


def shape_key(name: bytes, *shape: int) -> bytes:
    key = b"comfy.gguf.orig_shape." + name
    return struct.pack("<Q", len(key)) + key + struct.pack(f"<IIQ{len(shape)}i", 9, 5, len(shape), *shape)


def encoder(name: bytes) -> bytes:
    return header(2, 0, tensor(b"token_embd.weight", (), 0, 0) + tensor(name, (), 0, 32)) + bytes(128)


BROKEN = {
    "empty": (b"GGUF", "claims more than"),
    "version": (b"GGUF" + bytes(20), "its version is 0"),
    "many tensors": (header(1 << 60), "claims more than"),
    "many keys": (header(0, 1 << 60), "claims more than"),
    "long text": (header(0, 1, struct.pack("<Q", 1 << 62)), "claims more than"),
    "long list": (header(0, 1, struct.pack("<QcIIQ", 1, b"a", 9, 4, 1 << 60)), "claims more than"),
    "list of lists": (header(0, 1, struct.pack("<QcIIQ", 1, b"a", 9, 9, 1)), "a list has values"),
    "big": (header(1, 0, tensor(b"a", (1 << 30, 1 << 30), 0, 0)), "impossible shape"),
    "axes": (header(1, 0, tensor(b"a", (1,) * 9, 0, 0)), "9 axes"),
    "twice": (header(2, 0, tensor(b"a", (1,), 0, 0) * 2 + bytes(64)), "occurs twice"),
    "beyond": (header(1, 0, tensor(b"a", (64,), 0, 0)), "is at bytes"),
    "shared": (
        header(2, 0, tensor(b"a", (8,), 0, 0) + tensor(b"b", (8,), 0, 0) + bytes(128)),
        "is at bytes",
    ),
    "uneven": (header(1, 0, tensor(b"a", (33,), 8, 0) + bytes(64)), "rows of 32"),
    "kind": (header(1, 0, tensor(b"a", (32,), 77, 0) + bytes(64)), "unknown GGUF type 77.*Q4_K"),
    "same name": (encoder(b"model.embed_tokens.weight"), "are the same tensor"),
    "no axes": (encoder(b"blk.0.attn_q.weight"), r"does not divide rows of \(\)"),
    "other shape": (
        header(1, 1, shape_key(b"a", 4, 9) + tensor(b"a", (32,), 0, 0)) + bytes(256),
        r"a is stored as \(32,\), but comfy.gguf.orig_shape. says \(4, 9\)",
    ),
    "negative shape": (header(1, 1, shape_key(b"a", -4, -8) + tensor(b"a", (32,), 0, 0)), "a is stored as"),
    "long shape": (header(0, 1, shape_key(b"a", *[1] * 9)), "a list of 9 values"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_gguf_headers_that_lie_are_refused(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    (tmp_path / "a.gguf").write_bytes(content)

    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "a.gguf")


def test_a_kind_that_only_the_package_reads_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "a.gguf").write_bytes(header(1, 0, tensor(b"m.0", (256,), 18, 0) + bytes(256)))
    with pytest.raises(CheckpointError, match=r"a\.gguf: m\.0 is of GGUF type 18, .* Run: pip install gguf"):
        open_checkpoint(tmp_path / "a.gguf")


def test_infinite_scales_of_gguf_are_refused(tmp_path: Path) -> None:
    block = b"\x00\x7c" + bytes(32)
    data = header(1, 0, tensor(b"m.0.weight", (32,), 8, 0))
    (tmp_path / "a.gguf").write_bytes(data + bytes(-len(data) % 32) + block)

    with pytest.raises(CheckpointError, match=r"m\.0\.weight has scales that are NaN or infinite"):
        value(tmp_path / "a.gguf")


def test_text_encoders_get_the_names_of_transformers_and_llamas_rows_in_order(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    rows = torch.randn(16, 32)  # two heads of eight
    writer = gguf.GGUFWriter(tmp_path / "a.bin", "llama")
    writer.add_head_count(2)
    permuted = rows.unflatten(0, (2, 2, 4)).transpose(1, 2).flatten(0, 2)
    for name, one in {"token_embd": rows, "blk.0.attn_q": permuted, "blk.0.ffn_down": rows}.items():
        writer.add_tensor(f"{name}.weight", one.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with open_checkpoint(tmp_path / "a.bin") as checkpoint:
        names = {"model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"}
        assert checkpoint.tensors.keys() == {f"{name}.weight" for name in names}
        assert all(torch.equal(checkpoint.read(name), rows) for name in checkpoint.tensors)


class Joined(nn.Module):
    """A layer with rows of 48 columns, one with rows of 512, and a token."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(48, 16, bias=False), nn.Linear(512, 4, bias=False)
        self.token = nn.Parameter(torch.empty(1, 1, 32))


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_tensors_of_gguf_get_the_shapes_that_the_header_or_the_model_says(tmp_path: Path, kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    number = gguf.GGMLQuantizationType[kind]
    values = {"narrow.weight": torch.randn(16, 48), "wide.weight": torch.randn(4, 512)}
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "krea2")
    for name, weight in values.items():  # as rows of 256
        writer.add_array(f"comfy.gguf.orig_shape.{name}", list(weight.shape))
        packed = gguf.quants.quantize(weight.view(-1, 256).numpy(), number)
        writer.add_tensor(name, packed, raw_dtype=number)
    token = torch.randn(32)  # without its leading sides
    writer.add_tensor("token", token.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with on_meta_device():
        module = Joined()

    with open_checkpoint(tmp_path / "a.gguf") as checkpoint:
        sources = list_tensor_sources(checkpoint)
        kept = find_quantized_weights(
            linear_weights(module), sources, checkpoint.tensors, format_is_requested=False
        )
        load_module(
            module,
            checkpoint,
            sources,
            device=torch.device("cpu"),
            dtype=lambda *_: torch.float32,
            quantized=QuantizedLoading(None, quantized_in_file=kept),
        )

    assert kept == (set() if kind == "F16" else {"wide.weight"})
    torch.testing.assert_close(module.token, token.view(1, 1, 32))
    for name, weight in values.items():
        packed = gguf.quants.quantize(weight.view(-1, 256).numpy(), number)
        expected = torch.from_numpy(gguf.quants.dequantize(packed, number).astype("float32")).view(
            weight.shape
        )
        x = torch.eye(weight.shape[1])
        made = module.get_submodule(name.removesuffix(".weight"))(x).T
        torch.testing.assert_close(made, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("weight_packed", torch.int32),
        ("codes", torch.int16),
        ("Qidxs", torch.int64),
        ("weight.data_lp", torch.uint8),
        ("weight_8", torch.float8_e4m3fn),
    ],
)
def test_weights_of_an_unknown_quantiser_are_called_so(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    state = {
        f"m.0.{name}": torch.zeros(4, 8, dtype=dtype),
        "m.0.bias": torch.zeros(4),
        "m.0.norms": torch.ones(4),
    }
    path = write_tensors(tmp_path / "a.safetensors", state)

    with open_checkpoint(path) as checkpoint, pytest.raises(CheckpointError) as error:
        list_tensor_sources(checkpoint)

    assert f"quantized in an unknown format: it has m.0.{name} in" in str(error.value)
    assert "opy it again" not in str(error.value)


def test_places_and_texts_of_tokenizers_are_no_packed_weights(tmp_path: Path) -> None:
    state = {
        "embeddings.position_ids": torch.arange(8).view(2, 4),
        "cond.spiece_model": torch.zeros(64, dtype=torch.uint8),
        "norm.num_batches_tracked": torch.tensor(3),
        "m.0.weight": torch.ones(4, 4),
        "m.0.mask": torch.ones(4, 4, dtype=torch.bool),
    }
    with open_checkpoint(write_tensors(tmp_path / "a.safetensors", state)) as checkpoint:
        assert list_tensor_sources(checkpoint).keys() == state.keys()
