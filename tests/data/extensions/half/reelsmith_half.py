"""A kind of network: a LoRA of which half of the ranks act on noisy samples (`--network_args half=True`)."""

import json
from dataclasses import dataclass

from reelsmith.networks.kinds.contract import NetworkKind


@dataclass(frozen=True)
class HalfRule:
    """Half of the ranks act above a level of 0.5."""

    @property
    def kind(self):
        return HALF

    def in_words(self):
        return "half=True"

    def explain_merging(self, path):
        return f"{path} was trained with half of its ranks at much noise: merged, all of them act"

    def active(self, rank, levels):
        import torch  # not for --help

        return torch.where(levels > 0.5, max(rank // 2, 1), rank)


class HalfKind(NetworkKind):
    name = "half LoRA"
    switch = "half"
    is_with_file = True

    def read_rule_of_arguments(self, values, rank):
        return HalfRule() if values.get("half", False) else None

    def read_rule_of_file(self, metadata, path):
        arguments = json.loads(metadata["ss_network_args"])
        return HalfRule() if str(arguments.get("half", "")).lower() == "true" else None


HALF = HalfKind()
