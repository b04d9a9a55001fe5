"""What trains a kind of network: the table of `networks/train`, or the object of an extension's kind."""

import pytest

from networks.kinds import KINDS
from networks.kinds.contract import KindTraining, NetworkKind
from networks.kinds.dora import DORA
from networks.kinds.tlora import TLORA
from networks.train.dora import DORA as DORA_TRAINING
from networks.train.lora import find_training


class _Extension(NetworkKind):
    name = "extension's kind"
    training = KindTraining()

    def load_training(self) -> KindTraining:
        return self.training


def test_an_extension_brings_what_trains_its_kind() -> None:
    assert find_training(_Extension()) is _Extension.training


def test_what_trains_a_kind_is_found_by_the_kind() -> None:
    assert find_training(DORA) is DORA_TRAINING
    assert type(find_training(TLORA)) is KindTraining  # it changes no layer


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.network_module], ids=lambda kind: kind.name)
def test_each_network_module_has_layers(kind: NetworkKind) -> None:
    assert type(find_training(kind)).make_layers is not KindTraining.make_layers
    assert type(find_training(kind)).make_layer is not KindTraining.make_layer
