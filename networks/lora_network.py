"""The network that a training optimises: LoRAs, LoHas or LoKrs in a DiT, LoRAs in text encoders too."""

from collections.abc import Collection, Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modules.console import count_of, list_some
from modules.errors import CheckpointError
from networks import deltas
from networks.deltas import LORA, Factors, add_missing_alphas, group_by_module, ungroup
from networks.lora_layer import DropoutSeed, LoraLayer
from networks.lora_products import mean_row_norm, row_strengths
from networks.lora_settings import LoraSettings, find_by_pattern, log_overlaps
from networks.module_names import choose_family, on_text_side, read_family
from networks.names.layouts import OURS

logger = getLogger(__name__)
UNET = OURS.removesuffix("_")


class OwnNetwork(nn.Module):
    """Layers of a model by our names. The state dict has the tensors of a LoRA file in our dialect."""

    def __init__(self, layers: Mapping[str, Any], settings: LoraSettings) -> None:
        """layers: each has `attach`, `norm`, `shrink`, a `rank` and a `multiplier`."""
        super().__init__()
        self.settings = settings
        self.names = list(layers)
        self.layers: list[Any] = list(layers.values())
        self._seed = DropoutSeed()
        for index, (name, layer) in enumerate(layers.items()):
            self.add_module(name, layer)
            if isinstance(layer, LoraLayer):
                layer.dropouts, layer.seed, layer.index = settings.dropouts, self._seed, index
        # LoRA-GGPO: mean norm of the frozen weight's rows by layer, and the noise on them
        self._bases: dict[str, Tensor] = {}
        self.state_beside_file: dict[str, nn.Module] = {}  # for states, by name
        if settings.perturbation is not None:
            linear = {name: one for name, one in layers.items() if isinstance(one.original, nn.Linear)}
            strengths = nn.Module()  # buffers, which are saved with the state of a training
            for index, (name, layer) in enumerate(linear.items()):
                strengths.register_buffer(name, torch.zeros(layer.original.out_features))
                self._bases[name] = mean_row_norm(layer.original, index)
                layer.noise_of = strengths, name  # there is none until the first step
            self.state_beside_file = {"ggpo": strengths}
        ranks = sorted({layer.rank for layer in self.layers})
        kind, count = self.layers[0].kind, count_of(len(self.layers), "module")
        logger.info(f"{kind} on {count}, rank {list_some([str(rank) for rank in ranks])}")

    def attach(self, in_dit: bool = True) -> None:
        """Put the layers into the models they were built for. in_dit: into the DiT too."""
        for name, layer in zip(self.names, self.layers, strict=True):
            if in_dit or prefix_of(name) != UNET:
                layer.attach()

    @property
    def module(self) -> nn.Module:
        return self

    def set_multiplier(self, multiplier: float) -> None:
        for layer in self.layers:
            layer.multiplier = multiplier

    def load_weights(self, path: Path, modules: Collection[str] = ()) -> list[str]:
        """Start from a file of any dialect; returns (and warns of) modules that only file or network has.

        The file's alphas are loaded too. modules: of the model; they show its release. Raises
        CheckpointError if a module has other factors or sizes here, or if no module is here.
        """
        from networks import leftovers, loading, parts

        mine = self.state_dict()
        own = group_by_module(mine)
        lora = loading.read_lora(path, with_texts=any(prefix_of(name) != UNET for name in own))
        # the network has only some modules: names known to the LoRA's family are taken to be of that family
        if lora.has_frozen_norms:
            raise CheckpointError(
                f"--network_weights {path} is a DoRA in ComfyUI's form, which goes by the model's weights.\n"
                "  Bring it back first: convert_lora.py --target default --dit MODEL.",
                path,
            )
        made = read_family(lora.metadata)
        names = (name.removeprefix(OURS) for name in own)
        family = choose_family(names, None if made is None else made.name)
        loading.warn_of_other_family(lora, family, modules)
        heights = {name: len(factors[LORA[1]]) for name, factors in own.items() if LORA[1] in factors}
        texts = rename_texts(lora.text_tensors, set(map(prefix_of, own)))
        stored = group_by_module(add_missing_alphas(parts.for_model({**lora.tensors, **texts}, heights.get)))
        fitting = {name: factors for name, factors in stored.items() if name in own}
        wrong = [name for name, factors in fitting.items() if _shapes(factors) != _shapes(own[name])]
        if wrong:
            sizes = [(name, _in_words(stored[name]), _in_words(own[name])) for name in wrong]
            lines = [f"  {name} has {theirs}, here {ours}\n" for name, theirs, ours in sizes]
            raise CheckpointError(
                f"--network_weights {path} does not fit this network in {len(wrong)} of {len(stored)} "
                f"modules:\n{''.join(lines[:3])}  {_remedy(stored, own[wrong[0]], wrong[0])}",
                path,
            )
        if not fitting:
            loading.refuse_unknown(lora, "--network_weights")
            words = leftovers.text_side_of(stored)
            why = f"it changes {words} alone" if words else f"there is no {next(iter(stored))}"
            raise CheckpointError(
                f"--network_weights {path} does not fit this network: {why}. Give a file for this model, or "
                "another --network_module.",
                path,
            )
        # some tools store alpha as a list with one element
        tensors = {name: tensor.reshape(mine[name].shape) for name, tensor in ungroup(fitting).items()}
        self.load_state_dict(tensors, strict=False)
        beside = [name for name in stored if on_text_side(name.removeprefix(OURS))]
        beside += leftovers.lacking([name for name in stored if name not in own], modules, family)
        loading.warn_of_absent(path, beside, len(stored), "modules are not in this network", family)
        lost = [name for name in stored if name not in own and name not in beside]
        problems = [f"{name} is not in this network" for name in lost]
        problems += [f"{name} is not in the file" for name in own if name not in stored]
        if problems:
            logger.warning(
                f"{path}: {count_of(len(fitting), 'module')} loaded, "
                f"{len(problems)} not: {list_some(problems)}"
            )
        return problems

    @torch.no_grad()
    def scale_norms(self, max_norm: float, device: torch.device) -> Tensor:
        """After an optimizer step, scale down each layer whose change of the weight has a larger norm.

        Returns the number of scaled layers, and the mean and largest norm afterwards, as a tensor on the
        device, without waiting for it.
        """
        norms = torch.stack([layer.norm() for layer in self.layers])
        ratios = (max_norm / norms.clamp(min=max_norm / 2)).clamp(max=1)
        for layer, ratio in zip(self.layers, ratios, strict=True):
            layer.shrink(ratio)
        after = norms * ratios
        numbers = (ratios < 1).sum(), after.mean(), after.max()
        return torch.stack([number.to(device, torch.float32) for number in numbers])

    def set_dropout_seed(self, seed: int) -> None:
        """Seed all dropout masks until the next call; call before each micro-batch."""
        self._seed.value = seed
        if self.settings.dropouts:
            tables = self._seed.tables(self.layers, self.layers[0].lora_down.weight.device)
            for layer, table in zip(self.layers, tables.unbind(), strict=True):
                layer.seed_table = table

    def parameter_groups(
        self,
        learning_rate: float,
        unet_lr: float | None = None,
        text_encoder_lr: Sequence[float] | None = None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return parameter groups for the optimizer, and a name of each for logs.

        unet_lr: rate of the DiT's part; None: `learning_rate`. text_encoder_lr: rates of the trained text
        encoders in order, the last one for all further ones; None: `learning_rate`. Parts with rate 0 are in
        no group. With LoRA+ the up matrices have their own groups. The last matching pattern of
        network_reg_lrs gives a module's rate.
        """
        texts = [learning_rate] if text_encoder_lr is None else text_encoder_lr
        encoders = [prefix for prefix in dict.fromkeys(map(prefix_of, self.names)) if prefix != UNET]
        rates = {prefix: texts[min(index, len(texts) - 1)] for index, prefix in enumerate(encoders)}
        rates[UNET] = learning_rate if unet_lr is None else unet_lr
        found: list[tuple[int, ...]] = [()] * len(self.names)
        if self.settings.reg_rates:
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
            for parameter in layer.parameters():
                if ratio is not None and parameter is layer.lora_up.weight:
                    group = groups.setdefault(f"{label} plus", {"params": [], "lr": rate * ratio})
                else:
                    group = groups.setdefault(label, {"params": [], "lr": rate})
                group["params"].append(parameter)
        # a group of LoRA+ follows the one of the same modules
        made = {name: place for place, name in enumerate(groups)}
        order = sorted(
            groups,
            key=lambda name: (made.get(name.removesuffix(" plus"), made[name]), name.endswith(" plus")),
        )
        return [groups[name] for name in order], order

    @torch.no_grad()
    def before_optimizer_step(self) -> None:
        """Set the noise of LoRA-GGPO from weights and gradients; call after clipping, before the step."""
        rule = self.settings.perturbation
        for name, base in self._bases.items():
            assert rule is not None
            layer = getattr(self, name)
            gradients = layer.lora_down.weight.grad, layer.lora_up.weight.grad
            if gradients[0] is None or gradients[1] is None:
                continue
            weights = layer.lora_down.weight, layer.lora_up.weight
            strengths = row_strengths(weights, gradients, layer.scale, base.to(weights[0].device), rule)
            getattr(self.state_beside_file["ggpo"], name).copy_(strengths)


def _remedy(stored: Mapping[str, Factors], own: Factors, wrong: str) -> str:
    """Return a remedy for a module that does not fit. own: the factors that it has in the network."""
    if LORA[0] not in own:
        return "Give its --network_module, --network_dim and --network_args, or --dim_from_weights."
    if stored[wrong].keys() != own.keys():
        return (
            "This network trains plain LoRAs. Add the file to the model instead (--base_weights), or train "
            "on with the --network_module that made it, such as lycoris.kohya."
        )
    sizes = [(one[LORA[0]].shape[1:], len(one[LORA[1]])) for one in (stored[wrong], own)]
    if sizes[0] != sizes[1]:
        return "Give a LoRA that was trained for a model of this size."
    ranks = {deltas.rank_of(factors) for factors in stored.values()}
    known = f"--network_dim {ranks.pop()}, or " if len(ranks) == 1 else ""
    return f"Give {known}--dim_from_weights."


def prefix_of(name: str) -> str:
    """Return the prefix of a module's name, by its network: `lora_unet`, `lora_te1`."""
    return "_".join(name.split("_", 2)[:2])


def rename_texts(texts: Mapping[str, Tensor], held: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors of text encoders under the prefixes that a model has.

    held: these prefixes. The only or first encoder is `lora_te` in some models and `lora_te1` in others.
    Models with two CLIPs have no `lora_te`; there the name is another model's.
    """
    other = {"lora_te1": "lora_te"} if "lora_te2" in held else {"lora_te": "lora_te1", "lora_te1": "lora_te"}
    changed = {old: new for old, new in other.items() if new in held and old not in held}
    return {
        f"{changed.get(prefix_of(name), prefix_of(name))}{name.removeprefix(prefix_of(name))}": tensor
        for name, tensor in texts.items()
    }


def _shapes(factors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {part: list(tensor.shape) for part, tensor in deltas.without_alpha(factors).items()}


def _in_words(factors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{part} {shape}" for part, shape in _shapes(factors).items())
