"""The network of LoRAs that a training optimises: in a DiT, and in text encoders that learn."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modules.atomic_write import save_tensors
from modules.errors import CheckpointError
from networks.deltas import LORA, Factors, group_by_module, rank_of
from networks.hashes import add_hashes, saved_dtype
from networks.key_formats import OURS, add_missing_alphas
from networks.loading import list_some, read_lora
from networks.lora_ggpo import RowStrengths, mean_row_norm, row_strengths
from networks.lora_layer import DropoutSeed, LoraLayer
from networks.lora_settings import LoraSettings, find_by_pattern, log_overlaps
from networks.parts import for_model
from networks.uses import family_of_network, warn_of_other_family

logger = getLogger(__name__)
UNET = OURS.removesuffix("_")


class Attachable(Protocol):
    """A layer that puts itself into the module it was built for."""

    def attach(self) -> None: ...


class LoraNetwork(nn.Module):
    """LoRAs of a model. The state dict has the tensors of a LoRA file in our dialect."""

    def __init__(
        self, layers: Mapping[str, LoraLayer], settings: LoraSettings, multiplier: float = 1.0
    ) -> None:
        super().__init__()
        self.settings = settings
        self._seed = DropoutSeed()
        self.names, self.layers = list(layers), list(layers.values())
        for index, (name, layer) in enumerate(layers.items()):
            layer.set_dropouts(settings.dropouts, self._seed, index)
            self.add_module(name, layer)
        self._noise = None if settings.perturbation is None else _prepare_noise(layers)
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
        """Put the LoRAs into the models they were built for: the DiT, and text encoders if it has some."""
        for name, layer in zip(self.names, self.layers, strict=True):
            if apply_unet if prefix_of(name) == UNET else apply_text_encoder:
                layer.attach()

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
        self,
        unet_lr: float | None = None,
        text_encoder_lr: float | Sequence[float] | None = None,
        **_: Any,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return parameter groups for the optimizer, and a name of each for logs.

        text_encoder_lr: one rate, or one for each text encoder that learns, in their order (the last one for
        those without); None: `unet_lr`. A part whose rate is 0 is in no group. With LoRA+ the up matrices are
        groups of their own; the last pattern of network_reg_lrs that fits a module is its rate.
        """
        rates = self._rates(unet_lr, text_encoder_lr)
        found = [find_by_pattern(self.settings.reg_rates, name) for name in self.names]
        log_overlaps("network_reg_lrs", self.settings.reg_rates, found)
        groups: dict[str, dict[str, Any]] = {}
        for name, layer, places in zip(self.names, self.layers, found, strict=True):
            prefix = prefix_of(name)
            rate, label = rates[prefix], "unet" if prefix == UNET else prefix
            if places:
                pattern, rate = self.settings.reg_rates[places[-1]]
                label = f"{label} {pattern.pattern}"
            if rate == 0 and any(rates.values()):
                continue
            ratio = (
                self.settings.loraplus_lr_ratio if prefix == UNET else self.settings.loraplus_encoder_ratio
            )
            up = layer.lora_up.weight
            for parameter in layer.parameters():
                is_fast = ratio is not None and parameter is up
                group = groups.setdefault(f"{label} plus" if is_fast else label, {"params": []})
                group["params"].append(parameter)
                if rate is not None:
                    group["lr"] = rate * ratio if is_fast and ratio is not None else rate
        order = sorted(groups, key=lambda name: (_base(groups, name), name.endswith(" plus")))
        return [groups[name] for name in order], order

    def _rates(
        self, unet_lr: float | None, text_encoder_lr: float | Sequence[float] | None
    ) -> dict[str, float | None]:
        """Return the learning rate of each part by its prefix."""
        given = text_encoder_lr if isinstance(text_encoder_lr, Sequence) else [text_encoder_lr]
        rates: dict[str, float | None] = {UNET: unet_lr}
        encoders = [prefix for prefix in dict.fromkeys(map(prefix_of, self.names)) if prefix != UNET]
        for index, prefix in enumerate(encoders):
            rate = given[min(index, len(given) - 1)] if given else None
            rates[prefix] = unet_lr if rate is None else rate
        return rates

    def prepare_grad_etc(self, unet: nn.Module) -> None:
        self.requires_grad_(True)

    def on_epoch_start(self, unet: nn.Module) -> None:
        self.train()

    def on_step_start(self) -> None:
        """Do nothing; the interface requires this method."""

    @property
    def state_beside_file(self) -> dict[str, nn.Module]:
        """What a training has to save beside the tensors of the file, by names: the noise of LoRA-GGPO."""
        return {} if self._noise is None else {"ggpo": self._noise.strengths}

    @torch.no_grad()
    def before_optimizer_step(self) -> None:
        """Set the noise of LoRA-GGPO from weights and gradients; call after clipping, before the step."""
        rule = self.settings.perturbation
        if rule is None or self._noise is None:
            return
        for name, base in self._noise.bases.items():
            layer = getattr(self, name)
            gradients = layer.lora_down.weight.grad, layer.lora_up.weight.grad
            if gradients[0] is None or gradients[1] is None:
                continue
            weights = layer.lora_down.weight, layer.lora_up.weight
            strengths = row_strengths(*weights, gradients, layer.scale, base.to(weights[0].device), rule)
            layer.noise.copy_(strengths)

    def get_trainable_params(self) -> Iterator[nn.Parameter]:
        return self.parameters()

    def load_weights(self, file: str | Path) -> list[str]:
        """Start from a LoRA file of any dialect; returns (and warns of) the modules that only one side has.

        The file's alphas come along. Raises CheckpointError if a module has other factors or sizes here, or
        none is here.
        """
        path = Path(file)
        own = group_by_module(self.state_dict())
        lora = read_lora(path, with_texts=any(prefix_of(name) != UNET for name in own))
        warn_of_other_family(lora, family_of_network(own, lora))
        fitted = for_model(
            {**lora.tensors, **lora.text_tensors},
            lambda name: len(own[name][LORA[1]]) if name in own else None,
        )
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
    """Return the Frobenius norm of alpha / rank * up @ down, computed from R x R products only."""
    squares = []
    for down, up in layer.factor_pairs():  # R x in, out x R
        exact = torch.float32 if down.device.type == "mps" else torch.float64  # Apple GPUs have no float64
        down, up = down.to(exact), up.to(exact)
        squares.append(((up.T @ up) * (down @ down.T)).sum().clamp(min=0))
    return layer.scale * torch.stack(squares).sum().sqrt()


def prefix_of(name: str) -> str:
    """Return what a module's name begins with, by the network it is in: `lora_unet`, `lora_te1`."""
    return "_".join(name.split("_", 2)[:2])


def _base(groups: Mapping[str, object], name: str) -> int:
    """Return the place of the group beside which a group of LoRA+ stands, or its own."""
    order = list(groups)
    plain = name.removesuffix(" plus")
    return order.index(plain) if plain in groups else order.index(name)


@dataclass(frozen=True)
class _NoiseState:
    """What LoRA-GGPO needs beside the factors."""

    bases: Mapping[str, Tensor]  # by name of the layer: the mean norm of the frozen weight's rows
    strengths: RowStrengths


def _prepare_noise(layers: Mapping[str, LoraLayer]) -> _NoiseState:
    """Give the layers on Linear modules a place for their noise, none until the first step."""
    linear = {name: layer.original for name, layer in layers.items() if isinstance(layer.original, nn.Linear)}
    strengths = RowStrengths({name: original.out_features for name, original in linear.items()})
    bases = {}
    for index, (name, original) in enumerate(linear.items()):
        bases[name] = mean_row_norm(original, index)
        layers[name].noise_of = strengths, name
    return _NoiseState(bases, strengths)


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
