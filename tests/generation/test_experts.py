"""Experts take turns on the device: who is there when, who waits, and what those that wait hold."""

import gc
import logging
import random
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from generation.expert_memory import ExpertSchedule
from generation.experts import Check, ExpertOffloader
from modules.errors import CheckpointError
from protocols.families import HIGH_NOISE, LOW_NOISE
from protocols.loading import Placement
from protocols.rules import Expert
from runtime.offload.host_memory import Transfer
from runtime.offload.turns import HostCopy
from runtime.planning.device_memory import DeviceMemory
from runtime.planning.dry_run import WEIGHTS
from runtime.planning.memory_plan import PART_NAMES, MemoryPart, MemoryPlan, Phase
from tests.modules.fake_device import CountedMemory
from tests.tiny.wan_dit import tiny_state, write_dit
from tests.waiting import PATIENCE
from tests.wan.test_model import tiny_inputs
from wan.checkpoints import load_dit

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LOW, HIGH = Expert(LOW_NOISE, 0.0, 900.0), Expert(HIGH_NOISE, 900.0)
SIZE, SWAPPED = 10, 3  # bytes of an expert, and of its swapped blocks
VIDEO = (999.0, 950.0, 899.0, 100.0)


class Toy(nn.Module):
    """An expert of which only the size is real; it writes down where it is put."""

    def __init__(self, stage: "Stage", verb: str, number: int, place: str) -> None:
        super().__init__()
        self.stage, self.number, self.has_copy = stage, number, False
        self.put(verb, place)
        stage.toys.add(self)
        weakref.finalize(self, stage.forget, number)

    def put(self, verb: str, place: str) -> None:
        places = self.stage.places
        places[self.number] = place
        beside = any(where != "cpu" for number, where in places.items() if number != self.number)
        self.stage.diary.append(f"{verb} {self.number}{' beside' * (beside and place != 'cpu')}")

    def to(self, device: torch.device) -> "Toy":  # type: ignore[override]
        self.put("rest" if device.type == "cpu" else "move", device.type)
        return self

    def parameters(self, recurse: bool = True) -> Iterator[Any]:  # type: ignore[override]
        device = torch.device(self.stage.places[self.number])
        yield SimpleNamespace(nbytes=SIZE, device=device, requires_grad_=lambda _: None)


class ToyCopy:
    """All weights of a toy on the host, as `HostCopy` has them."""

    def __init__(self, dit: nn.Module, device: torch.device) -> None:
        assert isinstance(dit, Toy)
        self.dit = dit
        dit.has_copy = True
        dit.stage.note_host()
        if dit.stage.places[dit.number] != "cpu":
            dit.put("copy", "cpu")

    def to_device(self) -> None:
        self.dit.put("bring", "cuda")

    def free_device_memory(self) -> None:
        self.dit.put("leave", "cpu")


class Stage:
    """Experts on a device with so much room; host: bytes the host has left."""

    def __init__(
        self,
        spare: int = 0,
        host: int | None = None,
        device: torch.device = CUDA,
        experts: Sequence[Expert] = (LOW, HIGH),
        **rules: Any,
    ) -> None:
        self.diary: list[str] = []
        self.places: dict[int, str] = {}
        self.toys: weakref.WeakSet[Toy] = weakref.WeakSet()
        self.max_on_host = 0
        self.device, self.may_read = device, threading.Event()
        self.may_read.set()
        self.broken: dict[int, Exception] = {}
        self.turns = ExpertOffloader(
            tuple(experts),
            device,
            self.load,
            self.aside,
            **rules,
            spare_bytes=lambda _: spare,
            free_host_memory=lambda: host,
            make_copy=ToyCopy,
        )

    def load(self, expert: int) -> Toy:
        dit = Toy(self, "load", expert, self.device.type)
        self.note_host()
        return dit

    def aside(self, expert: int, check: Check) -> tuple[nn.Module, ToyCopy]:
        self.may_read.wait(PATIENCE)
        check()
        if expert in self.broken:
            raise self.broken[expert]
        dit = Toy(self, "read", expert, "cpu")
        return dit, ToyCopy(dit, self.device)

    def forget(self, number: int) -> None:
        self.diary.append(f"free {number}")
        del self.places[number]

    def note_host(self) -> None:
        """The host holds all of a network that has a copy there, else what it has swapped."""
        held = sum(SIZE if toy.has_copy else SWAPPED for toy in self.toys)
        self.max_on_host = max(self.max_on_host, held)

    def denoise(self, plan: Sequence[int], videos: Sequence[Sequence[float]] = (VIDEO, VIDEO)) -> list[str]:
        """Denoise videos in one phase, and return what was noted meanwhile."""
        self.diary.clear()
        with self.turns.phase(plan) as dit_at:
            for timesteps in videos:
                for timestep in timesteps:
                    assert self.places[dit_at(timestep).number] == self.device.type
                    if self.turns._prefetch is not None and timestep < 999:  # by now it is read
                        self.turns._prefetch.join()
        gc.collect()
        return [*self.diary]


PLAN = (1, 0, 1, 0)
READ_ONCE = ["load 1", "read 0", "copy 1", "bring 0", "leave 0", "bring 1", "leave 1", "bring 0"]


EACH_TIME = ["load 1", "free 1", "load 0", "free 0", "load 1", "free 1", "load 0", "free 0"]
FREED = ["free 0", "free 1"]  # in any order


@pytest.mark.parametrize(
    ("rooms", "first", "then"),
    [
        # the last of a plan does not wait, as nobody needs it any more
        ({}, READ_ONCE[:6], ["bring 0", *FREED]),
        ({"spare": SIZE, "one_at_a_time": True}, READ_ONCE[:6], ["bring 0", *FREED]),
        ({"spare": SIZE}, ["load 1", "read 0", "bring 0 beside"], FREED),
        ({"device": CPU}, ["load 1", "read 0"], FREED),
        ({"host": SIZE - 1}, EACH_TIME, []),
        ({"device": CPU, "host": 0}, EACH_TIME, []),
    ],
    ids=["in turns", "never beside", "room for both", "on a CPU", "no room on the host", "on a small CPU"],
)
def test_experts_are_loaded_as_seldom_as_the_rooms_allow(
    rooms: dict[str, Any], first: list[str], then: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    stage = Stage(**rooms)
    diary = stage.denoise(PLAN)
    assert diary[: len(first)] == first
    assert sorted(diary[len(first) :]) == then
    assert stage.places == {}
    told = caplog.text.count("low-noise transformer is loaded when its steps begin: the host has")
    assert told == ("host" in rooms)


def test_an_error_while_reading_ahead_is_raised_at_the_boundary_and_the_next_video_tries_again() -> None:
    stage = Stage()
    stage.broken[0] = CheckpointError("expert 0 is damaged")
    with stage.turns.phase(PLAN) as dit_at:
        assert dit_at(999.0).number == dit_at(950.0).number == 1
        with pytest.raises(CheckpointError, match="expert 0 is damaged"):
            dit_at(899.0)
        assert dit_at(999.0).number == 1
        assert dit_at(899.0).number == 0


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("device"), MemoryError("host")])
def test_what_there_was_no_memory_to_read_ahead_is_loaded_when_its_steps_begin(error: Exception) -> None:
    stage = Stage()
    stage.broken[0] = error
    diary = stage.denoise((1, 0), [VIDEO])
    assert diary == ["load 1", "free 1", "load 0", "free 0"]


def test_an_expert_that_found_no_room_on_the_device_is_brought_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: ToyCopy) -> None:
        raise torch.OutOfMemoryError("no room")

    stage, to_device = Stage(), ToyCopy.to_device
    with stage.turns.phase(PLAN) as dit_at:
        dit_at(999.0)
        monkeypatch.setattr(ToyCopy, "to_device", fail)
        with pytest.raises(torch.OutOfMemoryError):
            dit_at(899.0)
        monkeypatch.setattr(ToyCopy, "to_device", to_device)
        for timestep in VIDEO:
            assert stage.places[dit_at(timestep).number] == "cuda"


def test_ctrl_c_ends_the_reading_and_leaves_usable_networks() -> None:
    stage = Stage(keep=True)
    stage.may_read.clear()
    future: list[Future[Any]] = []

    def press() -> None:
        with stage.turns.phase((1, 0)) as dit_at:
            dit_at(999.0)
            assert stage.turns._prefetch is not None
            future.append(stage.turns._prefetch.future)
            stage.may_read.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        press()
    assert future[0].done()
    assert stage.places == {1: "cpu"}
    assert "bring 1" in stage.denoise((1, 0), [VIDEO])


class CountingTransfer(CountedMemory, Transfer):
    """A device whose memory is counted."""

    def __init__(self) -> None:
        super().__init__(CPU)


@pytest.mark.slow_cases("{'lazy': True}", "{'keep': True}")
@pytest.mark.parametrize("rules", [{}, {"keep": True}, {"lazy": True}], ids=str)
def test_the_device_never_holds_much_more_than_one_expert(tmp_path: Path, rules: dict[str, Any]) -> None:
    """Real networks through two videos: the ledger of the device's memory, and what they compute."""
    paths = [
        write_dit(tmp_path, tiny_state("t2v", seed=seed, num_layers=6), name=f"dit{seed}")
        for seed in range(2)
    ]
    device = CountingTransfer()

    def copy_of(dit: nn.Module, _: torch.device) -> HostCopy:
        return HostCopy(dit, CPU, None, device)

    def aside(expert: int, check: Check) -> tuple[nn.Module, HostCopy]:
        dit = load_dit(paths[expert], Placement(CPU, check=check))
        return dit, copy_of(dit, CPU)

    def load(expert: int) -> nn.Module:
        dit, copy = aside(expert, lambda: None)
        copy.to_device()
        return dit

    turns = ExpertOffloader(
        (LOW, HIGH),
        CUDA,
        load,
        aside,
        **rules,
        spare_bytes=lambda _: -1,
        free_host_memory=lambda: None,
        make_copy=copy_of,  # type: ignore[arg-type]
    )
    inputs = tiny_inputs("t2v", batch=1, frames=1)
    with torch.no_grad():
        expected = [load_dit(path, Placement(CPU))(**inputs) for path in paths]
        with turns.phase(PLAN) as dit_at:
            for timestep in (*VIDEO, *VIDEO):
                assert torch.equal(dit_at(timestep)(**inputs), expected[timestep >= HIGH.min_timestep])
    gc.collect()

    one = sum(each.nbytes for each in load_dit(paths[0], Placement(CPU)).parameters())
    assert 0.99 * one < device.maximum < 1.1 * one
    assert device.used == 0


EXPERTS = (LOW, Expert("middle", 500.0), HIGH)
TIMESTEPS = (100.0, 600.0, 999.0)  # one for each expert


def orders(count: int) -> list[tuple[int, ...]]:
    """Orders of turns as videos give them: from high noise to low, and others."""
    made, chance = [(2, 0), (2, 0, 2, 0), (2, 1, 0), (0,), (2, 1, 0, 2, 1, 0)], random.Random(3)
    while len(made) < count:
        turns = [chance.randrange(3)]
        for _ in range(chance.randrange(8)):
            turns.append(chance.choice([expert for expert in range(3) if expert != turns[-1]]))
        made.append(tuple(turns))
    return made


@pytest.mark.parametrize("rule", [{}, {"keep": True}, {"lazy": True}], ids=str)
def test_the_host_holds_what_was_counted(rule: dict[str, Any]) -> None:
    for order in orders(40):
        stage = Stage(experts=EXPERTS, **rule)
        with stage.turns.phase(order) as dit_at:
            for expert in order:
                dit_at(TIMESTEPS[expert])
                if stage.turns._prefetch is not None:
                    stage.turns._prefetch.join()
        assert ExpertSchedule(order, **rule).host_peak(SIZE, SWAPPED) == stage.max_on_host, order


def test_a_plan_names_what_waits_and_what_the_rooms_mean() -> None:
    def phase_of(turns: ExpertSchedule) -> Phase:
        swap = SimpleNamespace(host_bytes=SWAPPED)
        parts = turns.list_idle_parts(SIZE, swap)  # type: ignore[arg-type]
        return Phase("x", (MemoryPart(PART_NAMES[WEIGHTS], SIZE, SWAPPED), *parts))

    def remarks(turns: ExpertSchedule, room: int, host: int) -> str:
        phase, free = phase_of(turns), DeviceMemory("a card", room, room)
        return "\n".join(turns.describe_fit(MemoryPlan((phase,)), phase, free, host))

    one, two, large = ExpertSchedule((1, 1)), ExpertSchedule((2, 0)), 1 << 40
    assert phase_of(one).host == SWAPPED
    assert remarks(one, large, 1) == ""
    assert (phase_of(two).device, phase_of(two).host) == (SIZE, SIZE + SWAPPED)
    assert "they stay there" in remarks(two, large, large)
    assert "they stay there" not in remarks(ExpertSchedule((2, 0), one_at_a_time=True), large, large)
    assert remarks(two, 1 << 20, large) == ""
    assert "loaded again instead of waiting" in remarks(two, 1 << 20, SIZE)
    assert phase_of(ExpertSchedule((2, 0), lazy=True)).host == SWAPPED
