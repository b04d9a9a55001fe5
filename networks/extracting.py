"""Take a LoRA out of a fine-tuned model: the low-rank part of what training changed."""
# Letters: R rank

import time
from collections.abc import Iterable
from logging import getLogger

import torch
from torch import Tensor

from modules.atomic_write import save_tensors
from modules.checkpoints.dits import bare_names
from modules.checkpoints.finite import FiniteCheck
from modules.checkpoints.opening import Checkpoint, open_checkpoint
from modules.console import as_size, in_words, show_box
from modules.devices import choose_device
from modules.errors import CheckpointError
from modules.seeds import derive_seed
from networks.hashes import add_hashes
from networks.image_tools_options import ExtractOptions
from networks.key_formats import OURS
from networks.merging_flux import DTYPES
from networks.module_names import replace_dots

logger = getLogger(__name__)
OVERSAMPLING, POWERS = 16, 4  # of the randomised decomposition
EXACT_BELOW = 512  # sides of matrices that are decomposed in full


def extract(options: ExtractOptions) -> None:
    """Write a LoRA whose product is near the difference of two models, tensor by tensor.

    Factors are U * S and V^T, limited to a quantile of their values; alpha is the rank. Memory: one weight of
    each model. Raises CheckpointError if the models differ in their tensors or have no blocks of FLUX.
    """
    start, device = time.monotonic(), choose_device(options.device)
    dtype = DTYPES[options.save_precision or "float"]
    factors: dict[str, Tensor] = {}
    with open_checkpoint(options.model_org) as one, open_checkpoint(options.model_tuned) as other:
        original, tuned = bare_names(one), bare_names(other)
        names = _weights(original, tuned)
        checks = FiniteCheck(original.path), FiniteCheck(tuned.path)
        for name in names:
            before, after = original.read(name), tuned.read(name)
            checks[0].note(name, before)
            checks[1].note(name, after)
            change = after.to(device, torch.float32) - before.to(device, torch.float32)
            down, up = decompose_change(change, options.dim, options.clamp_quantile, name)
            module = OURS + replace_dots(name.removesuffix(".weight"))
            factors[f"{module}.lora_down.weight"] = down.to("cpu", dtype).contiguous()
            factors[f"{module}.lora_up.weight"] = up.to("cpu", dtype).contiguous()
            factors[f"{module}.alpha"] = torch.tensor(float(len(down)))
        is_chroma = any(name.startswith("distilled_guidance_layer.") for name in original.tensors)
    metadata = _metadata(options, "chroma" if is_chroma else "flux1")
    save_tensors(options.save_to, factors, add_hashes(factors, metadata))
    rows = [
        ("original", str(options.model_org)),
        ("fine-tuned", str(options.model_tuned)),
        ("LoRA", f"{options.save_to} ({as_size(options.save_to.stat().st_size)}), rank {options.dim}"),
        ("modules", str(len(names))),
        ("time", in_words(time.monotonic() - start)),
    ]
    show_box("The LoRA is extracted", rows)


def decompose_change(change: Tensor, rank: int, quantile: float, name: str) -> tuple[Tensor, Tensor]:
    """Return down R x in and up out x R, whose product is near a change of a weight, out x in.

    The singular vectors come from a randomised decomposition (Halko et al. 2011, arXiv 0909.4061), from
    random numbers that depend on the name alone. Small matrices are decomposed in full.
    """
    rank = min(rank, *change.shape)
    width = min(rank + OVERSAMPLING, *change.shape)
    if min(change.shape) <= EXACT_BELOW:
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(derive_seed(0, name))
        basis = change @ torch.randn(change.shape[1], width, generator=generator).to(change.device)
        for _ in range(POWERS):
            basis = change @ (change.T @ torch.linalg.qr(basis)[0])
        basis = torch.linalg.qr(basis)[0]
        small, s, vh = torch.linalg.svd(basis.T @ change, full_matrices=False)
        u = basis @ small
    up, down = u[:, :rank] * s[:rank], vh[:rank]
    if quantile < 1:
        limit = _quantile(torch.cat([up.flatten(), down.flatten()]), quantile)
        up, down = up.clamp(-limit, limit), down.clamp(-limit, limit)
    return down, up


def _quantile(values: Tensor, share: float) -> Tensor:
    """Return a quantile by sorting, as torch.quantile takes 16 million values at most."""
    ordered = values.sort().values
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return torch.lerp(ordered[low], ordered[high], place - low)


def _weights(original: Checkpoint, tuned: Checkpoint) -> list[str]:
    """Return the matrices in blocks. Raises CheckpointError if the models do not have the same."""
    names = _in_blocks(original.tensors)
    if not names:
        raise CheckpointError(
            f"{original.path} has no blocks of FLUX.1 or Chroma, as double_blocks.0.img_attn.qkv.weight.\n"
            "  Give a model with the published names to --model_org and --model_tuned.",
            original.path,
        )
    absent = sorted(set(names) ^ set(_in_blocks(tuned.tensors)))
    if absent:
        raise CheckpointError(
            f"{original.path} and {tuned.path} are not the same model: only one has {absent[0]}. Give a "
            "model and its fine-tuned version.",
            tuned.path,
        )
    for name in names:
        shapes = original.tensors[name].shape, tuned.tensors[name].shape
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{original.path} and {tuned.path} are not the same model: {name} is {list(shapes[0])} and "
                f"{list(shapes[1])}. Give a model and its fine-tuned version.",
                tuned.path,
            )
        for checkpoint in (original, tuned):
            if checkpoint.tensors[name].dtype.itemsize == 1:
                raise CheckpointError(
                    f"{checkpoint.path} stores {name} in 8 bits, too coarse for a difference of models.\n"
                    "  Give the bf16 or fp16 file.",
                    checkpoint.path,
                )
    return names


def _in_blocks(names: Iterable[str]) -> list[str]:
    return [
        name
        for name in names
        if name.startswith(("double_blocks.", "single_blocks."))
        and name.endswith(".weight")
        and "norm" not in name
    ]


def _metadata(options: ExtractOptions, version: str) -> dict[str, str]:
    metadata = {
        "ss_v2": "False",
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": str(options.dim),
        "ss_network_alpha": str(float(options.dim)),
        "ss_network_args": "{}",
        "ss_base_model_version": version,
    }
    if not options.no_metadata:
        kind = "chroma" if version == "chroma" else "flux-1-dev"
        metadata |= {
            "modelspec.architecture": f"{kind}/lora",
            "modelspec.title": f"Extracted LoRA from {options.model_tuned.name}",
        }
    return metadata
