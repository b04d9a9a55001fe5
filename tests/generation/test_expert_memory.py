"""What experts that wait hold: the plan's count against what takes place."""

import random
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wan_generate_video
from generation.denoise import predictor
from generation.expert_memory import ExpertTurns, all_requests, turns_of
from generation.experts import Check, DitTurns, TurnRules
from generation.memory import rehearse_denoising
from generation.options import GenerationOptions, generation_parser, read_arguments
from generation.script_options import ScriptDefaults
from modules.contract.loading import Placement
from modules.contract.rules import HIGH_NOISE, LOW_NOISE, Expert
from modules.contract.steps import EncodedPrompts, Step
from modules.options import read_options
from modules.parser import add_options
from modules.planning.dry_run import HOST, WEIGHTS, Ledger
from modules.planning.kernels import PlannedKernels
from modules.planning.memory_plan import NAMES, MemoryPart, MemoryPlan, Phase, Room
from tests.tiny import wan_dit
from tests.tiny.wan import write_tiny_wan
from wan.family import Wan, family_for_generation
from wan.options import WanGenerationOptions

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


def two_experts(folder: Path, *words: str) -> tuple[Wan, GenerationOptions]:
    files = [
        write_dit(folder, seed)
        for seed, write_dit in enumerate([_write, _write])  # low noise, high noise
    ]
    parser = generation_parser("", ScriptDefaults(fps=16, has_experts=True))
    add_options(parser, WanGenerationOptions)
    dits = ["--dit", str(files[0]), "--dit_high_noise", str(files[1])]
    needed = ["--task", "t2v-A14B", *dits, "--prompt", "x", "--save_path", "out", "--video_size", "64", "96"]
    args = read_arguments(parser, [*needed, "--video_length", "9", "--infer_steps", "4", *words])
    own = read_options(WanGenerationOptions, args)
    return family_for_generation(own), read_options(GenerationOptions, args)


def _write(folder: Path, seed: int) -> Path:
    state = wan_dit.tiny_state("t2v", seed, torch.bfloat16, num_layers=6)
    return wan_dit.write_dit(folder, state, name=f"dit{seed}")


@pytest.mark.parametrize(
    ("words", "order"),
    [((), (1, 0)), (("--num_videos", "2"), (1, 0, 1, 0)), (("--timestep_boundary", "0.99999"), (0,))],
)
def test_a_run_knows_who_works_when(tmp_path: Path, words: tuple[str, ...], order: tuple[int, ...]) -> None:
    family, options = two_experts(tmp_path, *words)

    assert turns_of(family, options, all_requests(family, options)).order == order


def test_two_experts_take_the_device_memory_of_one(tmp_path: Path) -> None:
    """Counted over both experts' turns on a device that holds one of them."""
    family, options = two_experts(tmp_path)
    text: dict[str, Tensor | list[Tensor]] = {"t5": [torch.zeros(7, 32, dtype=torch.bfloat16)]}
    (request,) = all_requests(family, options)
    turns = turns_of(family, options, [request])
    phase, most = rehearse_denoising(
        family, options, request, {0: EncodedPrompts(text, {**text})}, {0: {}}, MemoryPart("more", 0), turns
    )

    def load(expert: int) -> nn.Module:
        return family.load_dit(Placement(HOST), expert)

    rules = TurnRules(lazy=True)
    device = DitTurns(family.experts, HOST, load, None, rules, lambda _: False, lambda: None)
    noise, peaks = torch.zeros(1, 16, 3, 8, 12), []
    with device.phase(turns.order) as dit_at:
        for timestep in (1000.0, 100.0):
            dit = dit_at(timestep)
            assert len(device.working) == 1
            with PlannedKernels(), Ledger(HOST) as ledger, torch.no_grad():
                for tensor in dit.parameters():
                    ledger.see(tensor, WEIGHTS)
                predict = predictor(family, dit_at, Step(0, 4, 1.0, timestep, noise), True)
                _ = predict(text), predict(text)
                peaks.append(max(sum(moment.values()) for moment in ledger.peaks.values()))
    assert phase(0).device == pytest.approx(max(peaks), rel=0.02)
    weights = sum(tensor.nbytes for tensor in dit.parameters())
    assert phase(0).host == pytest.approx(weights, rel=0.02)  # of the one that waits
    # and what the working one has swapped
    assert phase(most).host == pytest.approx(weights * (1 + 5 / 6), rel=0.1)
    assert phase(most).device < phase(0).device


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "experts that wait"),
        (("--lazy_loading",), "each is loaded when its steps begin"),
        (("--blocks_to_swap", "auto"), "--blocks_to_swap auto: 0"),
    ],
)
def test_a_plan_for_two_experts_is_printed(
    tmp_path: Path, words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_tiny_wan(tmp_path / "m", dtype=torch.bfloat16, experts=2)
    size = ["--video_size", "32", "32", "--video_length", "5", "--save_path", "out", "--plan", "2"]
    asked = ["--task", "t2v-A14B", *files.models, "--prompt", "a cat", *size, *words]

    wan_generate_video.main([*asked, "--device", "cpu"])

    plan = capsys.readouterr().out
    assert says in plan
    assert ("they stay there" in plan) == ("--lazy_loading" not in words)
    assert plan.splitlines()[-1].startswith("Fits: 0.")
