"""Files of packed weights, made by the libraries of their forms, and the same weights unpacked."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Parts = dict[str, Tensor]  # by what the name of a weight goes on with; "": the weight itself
Pack = Callable[[Tensor], tuple[Parts, Tensor, dict[str, object]]]  # tensors, value, mark


def int8(weight: Tensor) -> tuple[Parts, Tensor, dict[str, object]]:
    from comfy_kitchen.backends.eager.quantization import dequantize_int8_simple, quantize_int8_rowwise

    stored, scale = quantize_int8_rowwise(weight)
    parts = {"": stored, "_scale": scale.reshape(-1, 1)}
    return parts, dequantize_int8_simple(stored, scale.reshape(-1, 1)), {"format": "int8_tensorwise"}


def convrot(weight: Tensor) -> tuple[Parts, Tensor, dict[str, object]]:
    from comfy_kitchen.backends.eager.quantization import (
        dequantize_int8_convrot_weight,
        quantize_int8_convrot_weight,
    )

    size = 256 if weight.shape[1] % 256 == 0 else 16
    stored, scale = quantize_int8_convrot_weight(weight, size)
    value = dequantize_int8_convrot_weight(stored, scale, size)
    mark = {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": size}}
    return {"": stored, "_scale": scale}, value, mark


def mxfp8(weight: Tensor) -> tuple[Parts, Tensor, dict[str, object]]:
    from comfy_kitchen.backends.eager.quantization import dequantize_mxfp8, quantize_mxfp8

    stored, scales = quantize_mxfp8(weight, pad_32x=True)
    value = dequantize_mxfp8(stored, scales, torch.float32)[: weight.shape[0], : weight.shape[1]]
    return {"": stored, "_scale": scales.view(torch.uint8)}, value, {"format": "mxfp8"}


def nvfp4(weight: Tensor) -> tuple[Parts, Tensor, dict[str, object]]:
    from comfy_kitchen.backends.eager.quantization import dequantize_nvfp4, quantize_nvfp4

    scale = weight.abs().max() / (448 * 6)
    stored, scales = quantize_nvfp4(weight, scale, pad_16x=True)
    value = dequantize_nvfp4(stored, scale, scales, torch.float32)[: weight.shape[0], : weight.shape[1]]
    return {"": stored, "_scale": scales, "_scale_2": scale}, value, {"format": "nvfp4"}


def bitsandbytes(weight: Tensor) -> tuple[Parts, Tensor, dict[str, object]]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    stored, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    packed = {f".{name}": one for name, one in state.as_dict(packed=True).items()}
    return {"": stored, **packed}, dequantize_4bit(stored, state).reshape(weight.shape), {}


FORMS: dict[str, Pack] = {
    **{"int8": int8, "convrot": convrot, "mxfp8": mxfp8, "nvfp4": nvfp4, "nf4": bitsandbytes}
}
GGUF_KINDS = ("Q8_0", "Q5_0", "Q4_0", "Q4_K", "Q6_K", "BF16")


def is_packed(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a weight of a linear layer of a block, whose rows are whole blocks of 64."""
    return (
        re.match(r".*\.\d+\..+\.weight", name) is not None and tensor.ndim == 2 and tensor.shape[1] % 64 == 0
    )


def pack_file(path: Path, form: str, header: bool = False) -> Path:
    """Write the weights of a safetensors file packed beside it, and unpacked in its place.

    header: say the forms in the metadata too, without the names' prefix. Returns the packed file's path.
    """
    plain, new, layers = {}, {}, {}
    for name, tensor in load_file(path).items():
        plain[name] = new[name] = tensor
        if is_packed(name, tensor):
            parts, value, mark = FORMS[form](tensor.float())
            plain[name] = value.float()
            new |= {name + end: part.contiguous() for end, part in parts.items()}
            if mark:
                layer = name.removesuffix(".weight")
                layers[layer] = mark
                text = json.dumps(mark, indent=1).encode()
                new[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})} if header else None
    packed = path.with_name(f"{path.stem}-{form}.safetensors")
    save_file(new, packed, metadata)
    save_file({name: tensor.contiguous() for name, tensor in plain.items()}, path)
    return packed


def gguf_file(path: Path, kind: str) -> Path:
    """Write a GGUF file of a safetensors file's weights beside it, and these in its place.

    Kinds that the package cannot write have blocks of random bytes with small scales.
    """
    import gguf

    theirs = gguf.GGMLQuantizationType[kind]
    weights, size = gguf.GGML_QUANT_SIZES[theirs]
    packed = path.with_name(f"{kind}.bin")  # the beginning says what it is, not the name
    writer = gguf.GGUFWriter(packed, "wan")
    plain = {}
    for number, (name, tensor) in enumerate(load_file(path).items()):
        plain[name] = tensor
        if not is_packed(name, tensor) or tensor.shape[1] % weights:
            writer.add_tensor(name, tensor.float().numpy())
            continue
        if kind.endswith("_K"):
            random = torch.Generator().manual_seed(number)
            count = tensor.shape[0] * tensor.shape[1] // weights
            blocks = torch.randint(0, 256, (count, size), generator=random, dtype=torch.uint8)
            halves = {"Q4_K": (0, 2), "Q6_K": (208,)}[kind]
            for start in halves:
                blocks[:, start : start + 2] = torch.full((count, 1), 1e-5).half().view(torch.uint8)
            stored = blocks.view(tensor.shape[0], -1).numpy()
        else:
            stored = gguf.quants.quantize(tensor.float().numpy(), theirs)
        writer.add_tensor(name, stored, raw_dtype=theirs)
        value = torch.from_numpy(gguf.quants.dequantize(stored, theirs))
        plain[name] = value.reshape(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file({name: tensor.contiguous() for name, tensor in plain.items()}, path)
    return packed


def text_encoder_gguf(path: Path, architecture: str) -> Path:
    """Write a text encoder in Q8_0 beside its file, with the names that the package gguf has for it."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], 99)
    packed = path.with_name("text_encoder.bin")
    writer = gguf.GGUFWriter(packed, architecture.lower())
    for name, tensor in load_file(path).items():
        data = tensor.float().numpy()
        theirs = names.get_name(name, try_suffixes=(".weight",))
        assert theirs is not None
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(theirs, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(theirs, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return packed
