"""Writers of shards, and merges, that are killed."""

import os
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dataset.cache import catalog
from dataset.cache.catalog import list_shards
from dataset.cache.shards import ShardStore, merge_shards, shard_errors
from tests.dataset.cache.entries import FULL, NAMES, ODD, contents, fill, make_shards, seen, write
from tests.dataset.cache.killing import needs_fork, run_and_kill, run_to_step

Step = tuple[str, str, int]


def take(store: ShardStore, step: Step) -> None:
    kind, name, number = step
    if kind == "write":
        write(store, name, number)
    elif kind == "remove":
        store.remove(name)
    else:
        store.close(is_last=kind == "settle")


def after(state: dict[str, int], step: Step) -> dict[str, int]:
    kind, name, number = step
    if kind == "write":
        return {**state, name: number}
    return {each: there for each, there in state.items() if (kind, name) != ("remove", each)}


@needs_fork
@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_what_was_written_survives_kills_and_nothing_is_half_there(tmp_path: Path, kills: int) -> None:
    chance, done, state = random.Random(kills), 0, dict[str, int]()
    kinds = chance.choices(["write", "remove", "close", "settle"], [6, 2, 1, 1], k=60 * kills)
    plan = [(kind, chance.choice(NAMES), number) for number, kind in enumerate(kinds)]
    for _ in range(kills):

        def work(acknowledge, start: int = done) -> None:  # type: ignore[no-untyped-def]
            store = ShardStore(tmp_path)
            for step in plan[start:]:
                take(store, step)
                acknowledge()

        count, _ = run_and_kill(work, chance.uniform(0, 0.02), after=chance.randint(1, 60))
        states = [state]
        for step in plan[done : done + count + 1]:
            states.append(after(states[-1], step))
        found = seen(tmp_path)
        assert found in states[count:]
        state, done = found, done + count
    ShardStore(tmp_path).close(is_last=True)
    assert seen(tmp_path) == state
    assert shard_errors(tmp_path) == []
    assert done >= kills


@needs_fork
@pytest.mark.parametrize("rounds", [1, pytest.param(25, marks=pytest.mark.slow)])
def test_several_writers_lose_nothing_when_some_are_killed(tmp_path: Path, rounds: int) -> None:
    chance = random.Random(rounds)
    for number in range(rounds):
        folder = tmp_path / str(number)

        def run(writer: int, after: int, folder: Path = folder) -> int:
            def work(acknowledge) -> None:  # type: ignore[no-untyped-def]
                store, order = ShardStore(folder), random.Random(writer)
                for step in range(12):
                    fill(store, [f"of_{writer}_{step}", f"shared_{step}", f"shared_{step}.part"], step)
                    store.remove(f"shared_{step}.part")
                    store.close(is_last=order.random() < 0.3)
                    acknowledge()
                store.close(is_last=True)

            return run_and_kill(work, 0.005, after)[0]

        steps = [chance.randint(1, 11), chance.randint(1, 11), 13]  # the last one comes to its end
        with ThreadPoolExecutor() as pool:
            counts = list(pool.map(run, range(3), steps))
        for again in range(2):
            found = seen(folder)
            for writer, count in enumerate(counts):
                for step in range(count):
                    assert found.get(f"of_{writer}_{step}") == step, (writer, step)
                    assert found.get(f"shared_{step}") == step + 1, (writer, step)
            if not again:
                ShardStore(folder).close(is_last=True)
        assert shard_errors(folder) == []
        assert len(contents(folder)) == 1


@needs_fork
def test_a_merge_that_stops_at_any_step_brings_nothing_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for changed, removed in ((6, 0), (4, 0), (0, 2), (2, 0), (0, 1)):
        store = ShardStore(source)
        fill(store, NAMES[:changed], start=changed)
        for name in NAMES[:removed]:
            store.remove(name)
        store.close()
    state = seen(source)
    assert len(state) == len(NAMES) - 1
    step, is_done = 0, False
    while not is_done:
        step += 1
        folder = tmp_path / str(step)
        shutil.copytree(source, folder)
        is_done = run_to_step(lambda folder=folder: merge_shards(folder), step)  # type: ignore[misc]
        assert seen(folder) == state, step
        ShardStore(folder).close(is_last=True)
        assert seen(folder) == state, step
        assert shard_errors(folder) == []
        assert len(contents(folder)) == 1
    assert step > 6


@needs_fork
@pytest.mark.parametrize("is_here", [True, False])
def test_a_shard_that_was_left_is_used_at_once_by_its_own_machine(
    tmp_path: Path, is_here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, here = make_shards(tmp_path), catalog.machine()
    monkeypatch.setattr(catalog, "machine", lambda: here if is_here else "0123abcd")

    def work(acknowledge) -> None:  # type: ignore[no-untyped-def]
        store = ShardStore(folder)
        write(store, ODD[0], 9)
        write(store, ODD[1], 9)
        acknowledge()
        time.sleep(60)

    assert run_and_kill(work, 0, after=1) == (1, False)
    monkeypatch.setattr(catalog, "machine", lambda: here)
    assert "is unfinished" in shard_errors(folder)[0]
    expected = {**FULL, ODD[0]: 9, ODD[1]: 9} if is_here else FULL
    for _ in range(2):
        assert seen(folder) == expected
        ShardStore(folder).close(is_last=True)
    assert len(list_shards(folder)) == (1 if is_here else 2)
    for name in list_shards(folder):
        if name.endswith(".writing"):  # an hour later its writer must be dead
            os.utime(folder / name, (0, 0))
    ShardStore(folder).close(is_last=True)
    assert seen(folder) == {**FULL, ODD[0]: 9, ODD[1]: 9}
