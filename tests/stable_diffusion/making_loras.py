"""Tiny LoRA files for tiny Stable Diffusion checkpoints, in the dialects that are found in the wild."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from modules.parser import parse_options
from networks.module_names import to_alias
from networks.names.stable_diffusion import SDXL
from stable_diffusion.contract import Model
from stable_diffusion.loras import ChosenLoras, load_networks
from stable_diffusion.network_options import AddedNetworkOptions

RANK = 3
Factors = dict[str, Tensor]
Result = tuple[Tensor, ...]


def random(*shape: int, seed: str, scale: float = 0.3) -> Tensor:
    """Numbers that depend on the seed's text alone."""
    generator = torch.Generator().manual_seed(sum(ord(letter) * (i + 1) for i, letter in enumerate(seed)))
    return torch.randn(*shape, generator=generator) * scale


def unet_modules(model: Model, only: Callable[[str], bool] = lambda path: True) -> dict[str, nn.Module]:
    """Matrices and convolutions of the U-Net, by diffusers' paths."""
    named = model.unet.named_modules()
    return {path: one for path, one in named if isinstance(one, (nn.Linear, nn.Conv2d)) and only(path)}


def text_modules(model: Model) -> dict[str, nn.Module]:
    """Matrices of the text encoders by sd-scripts' names: `lora_te1_text_model_encoder_layers_0_mlp_fc1`."""
    return {
        f"{tower.lora_prefix}_text_model_{path.replace('.', '_')}": one
        for tower in model.texts
        for path, one in tower.network.named_modules()
        if isinstance(one, nn.Linear)
    }


def low_rank(name: str, module: nn.Module, alpha: float = 2.0) -> Factors:
    """A LoRA of a module, as sd-scripts shapes it."""
    out, *rest = module.weight.shape  # type: ignore[operator]
    ones = [1] * (len(rest) - 1)
    return {
        "lora_down.weight": random(RANK, *rest, seed=name),
        "lora_up.weight": random(out, RANK, *ones, seed=f"{name} up"),
        "alpha": torch.tensor(alpha),
    }


def kohya_name(path: str, kind: str) -> str:
    """As sd-scripts names a module of the U-Net: SDXL's as the released file does."""
    name = path.replace(".", "_")
    return f"lora_unet_{to_alias(name, SDXL) if kind == 'sdxl' else name}"


def write(
    path: Path, modules: Mapping[str, Mapping[str, Tensor]], metadata: dict[str, str] | None = None
) -> Path:
    """Write `name.part` tensors."""
    tensors = {
        f"{name}.{part}": one.contiguous()
        for name, factors in modules.items()
        for part, one in factors.items()
    }
    save_file(tensors, path, metadata)
    return path


def write_kohya(
    path: Path, model: Model, only: Callable[[str], bool] = lambda path: True, texts: bool = True
) -> Path:
    """A LoRA of sd-scripts for the U-Net and the text encoders."""
    found = unet_modules(model, only)
    kind = model.kind.name
    modules = {kohya_name(name, kind): low_rank(name, module) for name, module in found.items()}
    if texts:
        modules |= {name: low_rank(name, module) for name, module in text_modules(model).items()}
    return write(path, modules)


def in_places(path: str) -> bool:
    """Of each sort of module one or more."""
    ends = (
        "conv1",
        "conv_shortcut",
        "downsamplers.0.conv",
        "upsamplers.0.conv",
        "proj_in",
        "attn2.to_k",
        "net.2",
    )
    return path.endswith(("conv_in", "time_emb_proj", *ends))


def network_options(*words: object) -> AddedNetworkOptions:
    options: AddedNetworkOptions
    (options,) = parse_options(None, [str(word) for word in words], AddedNetworkOptions)
    return options


def put_in(model: Model, *words: object) -> ChosenLoras | None:
    return load_networks(network_options("--network_weights", *words), model)


@torch.no_grad()
def results(model: Model) -> Result:
    """What the U-Net and each text encoder compute from the same input."""
    ids = torch.arange(6)[None]
    texts = [tower.network(ids, torch.tensor([5])) for tower in model.texts]
    width = model.unet.config.cross_attention_dim
    added = None
    if model.kind.name == "sdxl":
        added = {"text_embeds": random(1, 64, seed="pooled"), "time_ids": torch.full((1, 6), 64.0)}
    sample = random(1, 4, 4, 4, seed="sample", scale=1).to(model.dtype)
    context = random(1, 7, width, seed="context", scale=1).to(model.dtype)
    out = model.unet(sample, 500.0, context, added_cond_kwargs=added, return_dict=False)[0]
    return out, *texts
