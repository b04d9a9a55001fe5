"""What experts that wait hold: the plan's count against what takes place."""

import random
import weakref
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from generation.expert_memory import ExpertTurns
from generation.experts import Check, DitTurns, TurnRules
from modules.contract.rules import HIGH_NOISE, LOW_NOISE, Expert
from modules.planning.dry_run import WEIGHTS
from modules.planning.memory_plan import NAMES, MemoryPart, MemoryPlan, Phase, Room

CUDA = torch.device("cuda")
EXPERTS = (Expert(LOW_NOISE, 0.0), Expert("middle", 500.0), Expert(HIGH_NOISE, 900.0))
TIMESTEPS = (100.0, 600.0, 999.0)  # one for each expert
ALL, SWAPPED = 100, 30  # bytes of an expert, and of its swapped blocks


class Host:
    """Bytes that networks hold on the host: all of one that has a copy there, else what it has swapped."""

    def __init__(self) -> None:
        self.networks: weakref.WeakSet[Toy] = weakref.WeakSet()
        self.most = 0

    def note(self) -> None:
        held = sum(ALL if network.has_copy else SWAPPED for network in self.networks)
        self.most = max(self.most, held)


class Toy(nn.Module):
    """A network of which only the size is real."""

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.host, self.has_copy = host, False

    def parameters(self, recurse: bool = True) -> Iterator[Any]:  # type: ignore[override]
        yield SimpleNamespace(nbytes=ALL, device=CUDA, requires_grad_=lambda _: None)


class ToyCopy:
    """All weights of a toy on the host, as `HostCopy` has them."""

    def __init__(self, dit: nn.Module, device: torch.device) -> None:
        assert isinstance(dit, Toy)
        dit.has_copy = True
        dit.host.networks.add(dit)
        dit.host.note()

    def bring(self) -> None: ...

    def leave(self) -> None: ...


def most_on_host(order: Sequence[int], rules: TurnRules) -> int:
    """Have experts take turns, and return the most bytes on the host."""
    host = Host()

    def load(expert: int) -> Toy:
        made = Toy(host)
        host.networks.add(made)
        host.note()
        return made

    def aside(expert: int, check: Check) -> tuple[nn.Module, ToyCopy]:
        made = Toy(host)
        return made, ToyCopy(made, CUDA)

    turns = DitTurns(EXPERTS, CUDA, load, aside, rules, lambda _: False, lambda: None, ToyCopy)
    with turns.phase(order) as dit_at:
        for expert in order:
            dit_at(TIMESTEPS[expert])
            if turns._ahead is not None:
                turns._ahead[1]._join()
    return host.most


def orders(count: int) -> list[tuple[int, ...]]:
    """Orders of turns as videos give them: from high noise to low, and others."""
    made, chance = [(2, 0), (2, 0, 2, 0), (2, 1, 0), (0,), (2, 1, 0, 2, 1, 0)], random.Random(3)
    while len(made) < count:
        turns = [chance.randrange(3)]
        for _ in range(chance.randrange(8)):
            turns.append(chance.choice([expert for expert in range(3) if expert != turns[-1]]))
        made.append(tuple(turns))
    return made


@pytest.mark.parametrize("rules", [TurnRules(), TurnRules(keep=True), TurnRules(lazy=True)], ids=str)
def test_the_host_holds_what_was_counted(rules: TurnRules) -> None:
    for order in orders(40):
        assert ExpertTurns(order, rules).host_peak(ALL, SWAPPED) == most_on_host(order, rules), order


def test_a_plan_names_what_waits_and_what_the_rooms_mean() -> None:
    def phase_of(turns: ExpertTurns) -> Phase:
        swap = SimpleNamespace(host=SWAPPED)
        return Phase("x", (MemoryPart(NAMES[WEIGHTS], ALL, SWAPPED), *turns.parts(ALL, swap)))  # type: ignore[arg-type]

    def remarks(turns: ExpertTurns, room: int, host: int) -> str:
        phase, free = phase_of(turns), Room("a card", room, room)
        return "\n".join(turns.remarks(MemoryPlan((phase,)), phase, free, host))

    one, two = ExpertTurns((1, 1)), ExpertTurns((2, 0))
    assert phase_of(one).host == SWAPPED
    assert remarks(one, 1 << 40, 1) == ""
    assert (phase_of(two).device, phase_of(two).host) == (ALL, ALL + SWAPPED)
    assert "they stay there" in remarks(two, 1 << 40, 1 << 40)
    assert "they stay there" not in remarks(
        ExpertTurns((2, 0), TurnRules(never_beside=True)), 1 << 40, 1 << 40
    )
    assert remarks(two, 1 << 20, 1 << 40) == ""
    assert "loaded again instead of waiting" in remarks(two, 1 << 20, ALL)
    assert phase_of(ExpertTurns((2, 0), TurnRules(lazy=True))).host == SWAPPED
