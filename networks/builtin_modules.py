"""Our network modules by name: their kinds and settings."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from networks.kinds import KINDS, LORA, composing
from networks.kinds.contract import NetworkKind
from networks.lora_settings import LoraSettings, read_settings
from networks.module_names import FAMILIES
from networks.names.layouts import LoraRules
from networks.options import NetworkOptions
from networks.train.lora import find_training


@dataclass(frozen=True)
class OwnModule:
    """What a value of --network_module trains: the network kind, and the family whose rules it follows."""

    rules: LoraRules | None = None  # a family's --network_args that select modules of its `DitSpec`
    kind: NetworkKind = LORA
    family: str = ""  # the only family it supports, as named in LoRA files; "": all families


class _OwnModules(Mapping[str, OwnModule]):
    """Our values of --network_module: one for each network kind, and one for each family with its own rules.

    A lookup imports the names of the families one by one until one of them has this module.
    """

    kinds: ClassVar = {kind.network_module: OwnModule(kind=kind) for kind in KINDS if kind.network_module}

    def __getitem__(self, name: str) -> OwnModule:
        if name in self.kinds:
            return self.kinds[name]
        for family in FAMILIES if name else ():
            if family.network_module == name:
                return OwnModule(family.rules, family=family.name)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        yield from self.kinds
        yield from (family.network_module for family in FAMILIES if family.network_module)

    def __len__(self) -> int:
        return sum(1 for _ in self)


OWN_MODULES: Mapping[str, OwnModule] = _OwnModules()
# settings that are allowed with --dim_from_weights
WITH_FILE = {
    "rank_dropout",
    "module_dropout",
    "verbose",
    "split_qkv",
    *composing.WITH_FILE,
    "network_reg_lrs",
    "ggpo_sigma",
    "ggpo_beta",
    "loraplus_lr_ratio",
    "loraplus_unet_lr_ratio",
    "loraplus_text_encoder_lr_ratio",
}


def read_own(name: str, options: NetworkOptions) -> tuple[LoraSettings, Any]:
    """Parse the settings shared by all our network modules, and the settings of this kind (such as LoKr).

    Args:
        name: Value of --network_module, or the family's module if the option is not given.
        options: Options of the network.

    Raises:
        OptionError: For a setting that is unknown, out of range, or supported only by LoRAs.
    """
    module = OWN_MODULES[name]
    training = find_training(module.kind)
    arguments: dict[str, Any] = options.arguments()
    own_settings = training.read_arguments(arguments)  # removes them from `arguments`
    settings = read_settings(
        options.rank,
        options.network_alpha,
        options.network_dropout,
        arguments=arguments,
        rules=module.rules,
    )
    ratios = (settings.loraplus_lr_ratio, settings.loraplus_encoder_ratio)
    has_ratio = any(ratio is not None for ratio in ratios)
    has_lora_settings = any(
        (settings.variants, settings.pattern_learning_rates, settings.ggpo_sigma_and_beta, has_ratio)
    )
    # kinds other than LoRA reject the settings that only LoRAs support
    training.check_settings(settings, has_lora_settings)
    return settings, own_settings
