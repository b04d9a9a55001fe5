"""What the tiny transformers of all families share: random values, shards, fp8."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

SHARDS = 3
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class TinyModel:
    """Paths of a tiny checkpoint set, as given to --dit, --vae, --text_encoder."""

    dit: Path
    vae: Path
    text_encoder: Path

    @property
    def models(self) -> list[str]:
        """The options that name the models of a training or generation."""
        files = ["--dit", str(self.dit), "--vae", str(self.vae)]
        return [*files, "--text_encoder", str(self.text_encoder)]


def draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random values for a tensor of that name, which keep a signal at its size."""
    values = torch.randn(shape, generator=generator)
    if name.endswith((".bias", "modulation", "emb_pos")):
        return 0.1 * values
    if len(shape) == 1:
        return 1 + 0.1 * values  # weights of norms
    return values / values[0].numel() ** 0.5


def draw_state(
    make: Callable[[], nn.Module], seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random weights for a network, which is made without memory."""
    with torch.device("meta"):
        shapes = make().state_dict()
    generator = torch.Generator().manual_seed(seed)
    return {name: draw(name, tuple(tensor.shape), generator).to(dtype) for name, tensor in shapes.items()}


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> Path:
    """Write one file: safetensors, or by its name a torch file, which may hold more than tensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(dict(tensors), path)
    return path


def frozen(network: Network, state: Mapping[str, Tensor]) -> Network:
    """The network with these weights, which do not learn."""
    network.load_state_dict(dict(state))
    return network.eval().requires_grad_(False)


def write_shards(folder: Path, state: Mapping[str, Tensor], stem: str) -> Path:
    """As the official repository: numbered files and an index. Returns the index."""
    folder.mkdir(parents=True, exist_ok=True)
    names, weight_map = list(state), {}
    for number in range(SHARDS):
        file = f"{stem}-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = {name: state[name] for name in names[number::SHARDS]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return index


def as_fp8(state: Mapping[str, Tensor], dialect: str) -> dict[str, Tensor]:
    """Matrices in float8_e4m3fn, plain or with scales beside them; the rest in bfloat16."""
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if tensor.ndim < 2 or not name.endswith(".weight"):
            stored[name] = tensor.to(torch.bfloat16)
            continue
        if dialect == "fp8" or tensor.ndim > 2:
            stored[name] = tensor.to(torch.float8_e4m3fn)
            continue
        peak = tensor.abs().amax(dim=1, keepdim=True) if dialect == "fp8_row_scale" else tensor.abs().max()
        scale = peak.float() / 448  # the largest float8_e4m3fn
        ending = "weight_scale" if dialect == "fp8_weight_scale" else "scale_weight"
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        stored[name.removesuffix("weight") + ending] = scale
    if dialect == "fp8_scaled":
        stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
        some = next(name for name in stored if name.endswith(".scale_weight"))
        stored[some.replace("scale_weight", "scale_input")] = torch.ones(())
    return stored


def write_dialect(
    path: Path, state: Mapping[str, Tensor], dialect: str, to_diffusers: Callable[..., dict[str, Tensor]]
) -> Path:
    """Write a transformer in one of the layouts that all families have. Returns what a user gives to --dit.

    to_diffusers: the same weights under the names there.
    """
    match dialect:
        case "safetensors":
            save_file(dict(state), path, metadata={"format": "pt"})
        case "sharded":
            return write_shards(path.parent, state, "diffusion_pytorch_model")
        case "prefixed":
            save_file({"model.diffusion_model." + key: tensor for key, tensor in state.items()}, path)
        case "diffusers":
            save_file(to_diffusers(state), path)
        case "diffusers_sharded":
            return write_shards(
                path.parent / "transformer", to_diffusers(state), "diffusion_pytorch_model"
            ).parent
        case _:
            save_file(as_fp8(state, dialect), path)
    return path
