"""Networks of LoHa or LoKr layers: what `networks.loha` and `networks.lokr` build."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modules.errors import CheckpointError, OptionError
from networks.deltas import group_by_module, rank_of
from networks.factored_layer import FactoredLayer, Shapes
from networks.key_formats import OURS
from networks.loading import list_some, read_lora
from networks.lora_network import attach_layers, fill_network
from networks.lora_settings import LoraSettings, read_settings
from networks.lora_targets import choose_modules
from networks.module_names import replace_dots
from networks.uses import family_of_network, warn_of_other_family

logger = getLogger(__name__)
MakeShapes = Callable[[int, int, int], Shapes]  # out, in, rank -> factors


class FactoredNetwork(nn.Module):
    """LoHa or LoKr of a model. The state dict has the tensors of LyCORIS' files, under our prefix."""

    def __init__(self, layers: Mapping[str, FactoredLayer], multiplier: float) -> None:
        super().__init__()
        self.layers = list(layers.values())
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.set_multiplier(multiplier)

    def apply_to(
        self,
        text_encoders: object,
        unet: nn.Module,
        apply_text_encoder: bool = False,
        apply_unet: bool = True,
    ) -> None:
        """Put the layers into the model they were built for."""
        attach_layers(self.layers, apply_text_encoder, apply_unet)

    def set_multiplier(self, multiplier: float) -> None:
        self.multiplier = multiplier
        for layer in self.layers:
            layer.multiplier = multiplier

    def set_dropout_seed(self, seed: int) -> None:
        """Do nothing: there is no dropout."""

    def prepare_optimizer_params(
        self, unet_lr: float | None = None, **_: Any
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return one parameter group for the optimizer, and its name for logs."""
        return [{"params": list(self.parameters()), **({} if unet_lr is None else {"lr": unet_lr})}], ["unet"]

    def prepare_grad_etc(self, unet: nn.Module) -> None:
        self.requires_grad_(True)

    def on_epoch_start(self, unet: nn.Module) -> None:
        self.train()

    def get_trainable_params(self) -> Iterator[nn.Parameter]:
        return self.parameters()

    def load_weights(self, file: str | Path) -> list[str]:
        """Start from a file of any dialect; returns (and warns of) the modules that only one side has.

        Raises CheckpointError if a module has other factors or sizes here, or none is here.
        """
        path = Path(file)
        lora, own = read_lora(path), group_by_module(self.state_dict())
        warn_of_other_family(lora, family_of_network(own, lora))
        stored = lora.modules()
        fitting = {name: factors for name, factors in stored.items() if name in own}
        for name, factors in fitting.items():
            here = {part: list(tensor.shape) for part, tensor in own[name].items() if part != "alpha"}
            there = {part: list(tensor.shape) for part, tensor in factors.items() if part != "alpha"}
            if here != there:
                raise CheckpointError(
                    f"--network_weights {path} does not fit this network: {name} has {there}, here {here}.\n"
                    "  Give its --network_module, --network_dim and --network_args, or --dim_from_weights.",
                    path,
                )
        if not fitting:
            raise CheckpointError(
                f"--network_weights {path} does not fit this network: there is no {next(iter(stored))}.\n"
                "  Give a file for this model, or another --network_module.",
                path,
            )
        return fill_network(self, path, stored, own)

    @torch.no_grad()
    def apply_max_norm_regularization(
        self, max_norm: float, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scale down each change whose norm is above `max_norm`.

        Returns the number of scaled ones, and mean and largest norm afterwards, on the network's device.
        """
        norms = torch.stack([layer.norm() for layer in self.layers])
        ratios = (max_norm / norms.clamp(min=max_norm / 2)).clamp(max=1)
        for layer, ratio in zip(self.layers, ratios, strict=True):
            layer.shrink(ratio)
        after = norms * ratios
        return (ratios < 1).sum(), after.mean(), after.max()


def build_factored(
    unet: nn.Module,
    multiplier: float,
    rank: int | None,
    alpha: float | None,
    dropout: float | None,
    arguments: Mapping[str, Any],
    make_shapes: MakeShapes,
) -> FactoredNetwork:
    """Build a network on the Linear layers that the DiT's spec and the patterns choose.

    Raises OptionError if no module is left, or for a setting that only LoRAs have.
    """
    settings = check_factored(rank, alpha, dropout, arguments)
    layers = {}
    for name, target in choose_modules(unet, replace(settings, conv_rank=None)).items():
        module, size, scaling = target.module, target.rank, target.alpha
        if isinstance(module, nn.Linear):
            shapes = make_shapes(module.out_features, module.in_features, size)
            layers[name] = FactoredLayer(module, shapes, size, scaling)
    return FactoredNetwork(layers, multiplier)


def rebuild_factored(
    unet: nn.Module | None, multiplier: float, weights: Mapping[str, Tensor], first: tuple[str, ...]
) -> FactoredNetwork:
    """Build a network with the modules, factors and alphas of a file's tensors (under our names).

    first: names of factors of which a module has one. Raises CheckpointError if nothing fits.
    """
    if unet is None:
        raise TypeError("create_arch_network_from_weights needs unet")
    known = {
        OURS + replace_dots(path): module
        for path, module in unet.named_modules()
        if isinstance(module, nn.Linear)
    }
    layers, missed = {}, []
    for name, factors in group_by_module(weights).items():
        shapes = {part: tuple(tensor.shape) for part, tensor in factors.items() if part != "alpha"}
        if not any(part in shapes for part in first) or any(len(shape) != 2 for shape in shapes.values()):
            raise CheckpointError(
                f"--dim_from_weights: {name} has {', '.join(shapes)}, which is another kind of network.\n"
                "  Give the --network_module that the file was trained with."
            )
        if name not in known:
            missed.append(name)
            continue
        rank = rank_of(factors) or 1
        alpha = float(factors["alpha"]) if "alpha" in factors and rank_of(factors) else rank
        layers[name] = FactoredLayer(known[name], shapes, rank, alpha)
    if not layers:
        raise CheckpointError(
            "--dim_from_weights: the model has none of the file's modules, such as "
            f"{list_some(missed, 3)}.\n  Give a file that was trained for this model."
        )
    if missed:
        logger.warning(
            f"--dim_from_weights: {len(missed)} modules are not in this model: {list_some(missed)}"
        )
    return FactoredNetwork(layers, multiplier)


def check_factored(
    rank: int | None, alpha: float | None, dropout: float | None, arguments: Mapping[str, Any]
) -> LoraSettings:
    """Read the settings. Raises OptionError for one that cannot be used, or that only LoRAs have."""
    settings = read_settings(rank, alpha, dropout, arguments)
    ratios = settings.loraplus_lr_ratio, settings.loraplus_encoder_ratio
    others = settings.dropouts, settings.decomposes, settings.reg_rates, settings.perturbation
    if any(others) or any(ratio is not None for ratio in ratios):
        raise OptionError(
            "--network_dropout, and rank_dropout, module_dropout, dora_wd, loraplus_..., network_reg_lrs and "
            "ggpo_... of --network_args, are for LoRAs only: leave them out, or use --network_module "
            "networks.lora"
        )
    return settings
