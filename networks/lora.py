"""LoRA for the Linear layers of a network's blocks: `--network_module networks.lora`, whatever the network.

Which modules take part is stated by the network's `DitSpec`: those in its lists of blocks, except
`lora_exclude`. `networks/lora_<family>.py` are this module under the names that LoRA tuners know.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from logging import getLogger
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modules.atomic_write import save_tensors
from modules.contract.family import DitSpec
from modules.errors import CheckpointError, OptionError
from modules.run_blocks import spec_of
from networks.deltas import DORA, LORA, Factors, group_by_module, rank_of
from networks.hashes import add_hashes, saved_dtype
from networks.key_formats import OURS, add_missing_alphas, to_native
from networks.loading import list_some, read_lora, warn_of_other_family
from networks.lora_layer import DropoutSeed, LoraLayer
from networks.lora_settings import LoraSettings, read_settings
from networks.module_names import choose_family, replace_dots
from networks.parts import for_model

logger = getLogger(__name__)


class Attachable(Protocol):
    """A layer that puts itself into the module it was built for."""

    def attach(self) -> None: ...


def create_arch_network_from_weights(
    multiplier: float,
    weights_sd: Mapping[str, Tensor],
    text_encoders: object = None,
    unet: nn.Module | None = None,
    **arguments: Any,
) -> "LoraNetwork":
    """Build a network with the modules, ranks and alphas of a LoRA file's tensors, but not their values."""
    return build_network_from_weights(multiplier, weights_sd, unet, arguments)


def create_arch_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: object,
    text_encoders: object,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **arguments: Any,
) -> "LoraNetwork":
    """Build a network on the modules that the DiT's spec and the patterns choose, by the call that LoRA
    tuners share.

    `vae` and `text_encoders` are not used. Raises OptionError if no module is left.
    """
    settings = read_settings(network_dim, network_alpha, neuron_dropout, arguments)
    layers = {
        name: LoraLayer(module, rank, alpha, settings.decomposes)
        for name, (module, rank, alpha) in choose_modules(unet, settings).items()
    }
    return LoraNetwork(layers, settings, multiplier)


def check_settings(
    rank: int | None, alpha: float | None, dropout: float | None, arguments: Mapping[str, Any]
) -> None:
    """Raise OptionError if a setting cannot be used. Nothing of the model is needed."""
    read_settings(rank, alpha, dropout, arguments)


def choose_modules(
    unet: nn.Module, settings: LoraSettings
) -> dict[str, tuple[nn.Linear | nn.Conv2d, int, float]]:
    """Return the modules that the DiT's spec and the patterns choose, by our names, with rank and alpha.

    Raises OptionError if no module is left.
    """
    spec = spec_of(unet)
    settings = replace(settings, exclude=(*settings.exclude, *map(_anywhere, spec.lora_exclude)))
    found = {}
    for path, module in _modules_in_blocks(unet, spec):
        size = _size(module, settings)
        chosen = size is not None and settings.takes(path)
        if settings.verbose:
            logger.info(
                f"  {path}: {f'rank {size[0]}, alpha {size[1]:g}' if size and chosen else 'left out'}"
            )
        if size is not None and chosen:
            found[OURS + replace_dots(path)] = (module, *size)
    if not found:
        raise OptionError(
            "--network_args exclude_patterns: the LoRA has no module left. Exclude fewer, or add some with "
            "include_patterns"
        )
    return found


def build_network_from_weights(
    multiplier: float, weights: Mapping[str, Tensor], unet: nn.Module | None, arguments: Mapping[str, Any]
) -> "LoraNetwork":
    """Build a network with the modules, ranks and alphas of these tensors (any dialect).

    Modules that the model does not have are logged. Raises CheckpointError if nothing fits, or if the tensors
    are not a plain LoRA.
    """
    if unet is None:
        raise TypeError("create_arch_network_from_weights needs unet")
    for key in sorted(_FROM_FILE & {key for key, value in arguments.items() if value is not None}):
        logger.warning(
            f"--network_args {key} is ignored because --dim_from_weights takes the modules and ranks from "
            "the file"
        )
    others = {key: value for key, value in arguments.items() if key in _BESIDE_FILE}
    settings = read_settings(None, None, arguments.get("neuron_dropout"), others)
    known = {
        OURS + replace_dots(path): module
        for path, module in unet.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    native = for_model(
        to_native(weights).tensors, lambda name: known[name].weight.shape[0] if name in known else None
    )
    stored = group_by_module(add_missing_alphas(native))
    layers, missed = {}, []
    for name, factors in stored.items():
        if LORA[0] not in factors or not isinstance(factors.get("alpha"), Tensor):
            raise CheckpointError(f"--dim_from_weights needs a plain LoRA; {name} has {', '.join(factors)}")
        if name in known:
            rank, alpha = factors[LORA[0]].shape[0], float(factors["alpha"])
            layers[name] = LoraLayer(known[name], rank, alpha, DORA in factors)
        else:
            missed.append(name)
    if not layers:
        raise CheckpointError(
            f"--dim_from_weights: the model has none of the file's modules, such as {list_some(missed, 3)}"
        )
    if missed:
        logger.warning(
            f"--dim_from_weights: {len(missed)} modules of the file are not in this model: "
            f"{list_some(missed)}"
        )
    return LoraNetwork(layers, settings, multiplier)


_FROM_FILE = {"conv_dim", "conv_alpha", "include_patterns", "exclude_patterns", "dora_wd"}
_BESIDE_FILE = {"rank_dropout", "module_dropout", "loraplus_lr_ratio", "verbose"}


def _anywhere(part: str) -> re.Pattern[str]:
    """A pattern that matches, from its start, every module path with this part in it."""
    return re.compile(f".*{re.escape(part)}")


def _modules_in_blocks(unet: nn.Module, spec: DitSpec) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Yield (path, module) of each Linear and Conv2d inside a block, in the model's order."""
    lists = tuple(f"{name}." for name in spec.block_lists)
    for path, module in unet.named_modules():
        if path.startswith(lists) and isinstance(module, (nn.Linear, nn.Conv2d)):
            yield path, module


def _size(module: nn.Linear | nn.Conv2d, settings: LoraSettings) -> tuple[int, float] | None:
    """Return (rank, alpha), or None if the module gets no LoRA."""
    if isinstance(module, nn.Linear) or module.kernel_size == (1, 1):
        return settings.rank, settings.alpha
    return None if settings.conv_rank is None else (settings.conv_rank, settings.conv_alpha)


class LoraNetwork(nn.Module):
    """LoRAs of a model. The state dict has the tensors of a LoRA file in our dialect."""

    def __init__(
        self, layers: Mapping[str, LoraLayer], settings: LoraSettings, multiplier: float = 1.0
    ) -> None:
        super().__init__()
        self.settings = settings
        self._seed = DropoutSeed()
        self.layers = list(layers.values())
        for index, (name, layer) in enumerate(layers.items()):
            layer.set_dropouts(settings.dropouts, self._seed, index)
            self.add_module(name, layer)
        self.set_multiplier(multiplier)
        ranks = sorted({layer.rank for layer in self.layers})
        logger.info(f"LoRA on {len(self.layers)} modules, rank {list_some([str(rank) for rank in ranks])}")

    def apply_to(
        self,
        text_encoders: object,
        unet: nn.Module,
        apply_text_encoder: bool = False,
        apply_unet: bool = True,
    ) -> None:
        """Put the LoRAs into the model they were built for.

        Raises ValueError if they are requested for text encoders.
        """
        attach_layers(self.layers, apply_text_encoder, apply_unet)

    def set_multiplier(self, multiplier: float) -> None:
        self.multiplier = multiplier
        for layer in self.layers:
            layer.multiplier = multiplier

    def set_dropout_seed(self, seed: int) -> None:
        """Seed all dropout masks until the next call; call before each micro-batch."""
        self._seed.value = seed
        if self.settings.dropouts:
            tables = self._seed.tables(len(self.layers), self.layers[0].lora_down.weight.device)
            for layer, table in zip(self.layers, tables.unbind(), strict=True):
                layer.seed_table = table

    def prepare_optimizer_params(
        self, unet_lr: float | None = None, **_: Any
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return parameter groups for the optimizer, and a name of each for logs.

        With LoRA+ the up matrices are a second group.
        """
        rate = {} if unet_lr is None else {"lr": unet_lr}
        ratio = self.settings.loraplus_lr_ratio
        if ratio is None:
            return [{"params": list(self.parameters()), **rate}], ["unet"]
        ups = [layer.lora_up.weight for layer in self.layers]
        fast = set(map(id, ups))
        others = [weight for weight in self.parameters() if id(weight) not in fast]
        faster = {key: value * ratio for key, value in rate.items()}
        return [{"params": others, **rate}, {"params": ups, **faster}], ["unet", "unet plus"]

    def prepare_grad_etc(self, unet: nn.Module) -> None:
        self.requires_grad_(True)

    def on_epoch_start(self, unet: nn.Module) -> None:
        self.train()

    def on_step_start(self) -> None:
        """Do nothing; the interface requires this method."""

    def get_trainable_params(self) -> Iterator[nn.Parameter]:
        return self.parameters()

    def load_weights(self, file: str | Path) -> list[str]:
        """Start from a LoRA file of any dialect; returns (and warns of) the modules that only one side has.

        The file's alphas come along. Raises CheckpointError if a module has other factors or sizes here, or
        none is here.
        """
        path = Path(file)
        own = group_by_module(self.state_dict())
        lora = read_lora(path)
        warn_of_other_family(lora, choose_family(name.removeprefix(OURS) for name in own))
        fitted = for_model(lora.tensors, lambda name: len(own[name][LORA[1]]) if name in own else None)
        stored = group_by_module(add_missing_alphas(fitted))
        wrong = [
            name for name, factors in stored.items() if name in own and not _same_shapes(factors, own[name])
        ]
        unknown = [name for name in stored if name not in own]
        if wrong:
            examples = [f"{name} has {_shapes(stored[name])}, here {_shapes(own[name])}" for name in wrong]
            raise CheckpointError(
                f"--network_weights {path} does not fit this network in {len(wrong)} of {len(stored)} "
                "modules:\n"
                + "".join(f"  {example}\n" for example in examples[:3])
                + f"  {_remedy(stored, own, wrong[0])}",
                path,
            )
        fitting = {name: factors for name, factors in stored.items() if name in own}
        if not fitting:
            raise CheckpointError(
                f"--network_weights {path} does not fit this network: there is no {unknown[0]}. Give a LoRA "
                "for this model, or "
                "another --network_module.",
                path,
            )
        return fill_network(self, path, stored, own)

    def save_weights(
        self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None
    ) -> None:
        """Write a LoRA file, completely or not at all, with the hashes of its tensors in the metadata."""
        tensors = saved_dtype(self.state_dict(), dtype)
        save_tensors(Path(file), tensors, add_hashes(tensors, metadata or {}))

    @torch.no_grad()
    def apply_max_norm_regularization(
        self, max_norm: float, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scale down both factors of each LoRA whose norm ||alpha / rank * up @ down|| is above `max_norm`.

        Returns the number of scaled LoRAs, and mean and largest norm afterwards, as tensors on the network's
        device, so that the host need not wait for them. `device` is ignored.
        """
        norms = torch.stack([_norm(layer) for layer in self.layers])
        ratios = (max_norm / norms.clamp(min=max_norm / 2)).clamp(max=1)
        for layer, root in zip(self.layers, ratios.sqrt(), strict=True):
            layer.lora_down.weight.mul_(root)
            layer.lora_up.weight.mul_(root)
        after = norms * ratios
        return (ratios < 1).sum(), after.mean(), after.max()


def attach_layers(layers: Iterable[Attachable], to_text_encoders: bool, to_model: bool) -> None:
    """Put layers into the model they were built for.

    Raises ValueError if they are requested for text encoders.
    """
    if to_text_encoders:
        raise ValueError("this network has no modules for text encoders")
    if to_model:
        for layer in layers:
            layer.attach()


def fill_network(
    network: nn.Module, path: Path, stored: Mapping[str, Factors], own: Mapping[str, Factors]
) -> list[str]:
    """Copy the modules that both sides have; return (and warn of) those that only one side has.

    stored: of the file. own: of the network, with the shapes of the file's.
    """
    fitting = [name for name in stored if name in own]
    network.load_state_dict(
        {
            # some tools store alpha as a list with one element
            f"{name}.{part}": tensor.reshape(own[name][part].shape)
            for name in fitting
            for part, tensor in stored[name].items()
        },
        strict=False,
    )
    problems = [f"{name} is not in this network" for name in stored if name not in own]
    problems += [f"{name} is not in the file" for name in own if name not in stored]
    if problems:
        logger.warning(f"{path}: {len(fitting)} modules loaded, {len(problems)} not: {list_some(problems)}")
    return problems


def _norm(layer: LoraLayer) -> Tensor:
    """Return the Frobenius norm of alpha / rank * up @ down, computed from two R x R products only."""
    down, up = layer.lora_down.weight.flatten(1), layer.lora_up.weight.flatten(1)  # R x in, out x R
    exact = torch.float32 if down.device.type == "mps" else torch.float64  # Apple GPUs have no float64
    down, up = down.to(exact), up.to(exact)
    return layer.scale * ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()


def _same_shapes(factors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    return factors.keys() == own.keys() and all(
        t.shape == own[part].shape for part, t in factors.items() if part != "alpha"
    )


def _remedy(stored: Mapping[str, Factors], own: Mapping[str, Factors], wrong: str) -> str:
    """What to do about a module of a file that does not fit."""
    if stored[wrong].keys() != own[wrong].keys():
        return (
            "This network trains plain LoRAs. Add the file to the model instead (--base_weights), or train "
            "on with the "
            "--network_module that made it, such as lycoris.kohya."
        )
    widths = [(factors[LORA[0]].shape[1:], len(factors[LORA[1]])) for factors in (stored[wrong], own[wrong])]
    if widths[0] != widths[1]:
        return "Give a LoRA that was trained for a model of this size."
    ranks = {rank_of(factors) for factors in stored.values()}
    return (
        f"Give --network_dim {ranks.pop()}, or --dim_from_weights."
        if len(ranks) == 1
        else "Give --dim_from_weights."
    )


def _shapes(factors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in factors.items() if part != "alpha")
