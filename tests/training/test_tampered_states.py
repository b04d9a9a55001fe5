"""A state folder whose record or tensors were changed by hand is refused in words, or resumed to the same
bits.
"""

import copy
import json
import math
import os
import random
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from modules.errors import CheckpointError, OptionError, UserError
from tests.training.toy import ToyFamily, same, toy_options, train_toy, write_caches
from training.resuming import restore_scaler
from training.run import train_network
from training.saving.states import read_state

MISSING = object()
# one value of each kind, and the numbers that arithmetic trips over
VALUES: list[Any] = [
    None,
    True,
    "x",
    [],
    {},
    [1, "x"],
    {"a": 1},
    -1,
    -0.5,
    10**30,
    10**400,
    1e300,
    math.nan,
    math.inf,
    MISSING,
]
KINDS = {
    "AdamW": ["--optimizer_type", "AdamW", "--lr_scheduler", "cosine"],
    "imported schedule": ["--lr_scheduler_type", "CosineAnnealingLR", "--lr_scheduler_args", "T_max=8"],
    "Adafactor": ["--optimizer_type", "Adafactor"],
    "Prodigy": ["--optimizer_type", "Prodigy", "--learning_rate", "1"],
    "AdamWScheduleFree": ["--optimizer_type", "AdamWScheduleFree"],
}
# of Prodigy and of schedule-free optimizers
LEARNED = {"d", "d_max", "d_hat", "d_numerator", "d_denom", "k", "weight_sum", "lr_max", "scheduled_lr"}
PACKAGES = {"Prodigy": "prodigyopt", "AdamWScheduleFree": "schedulefree"}


class Saved:
    """The state of a run after 3 of 4 steps, and the weights that the whole run gives."""

    def __init__(self, folder: Path, settings: list[str]) -> None:
        self.folder, self.state, self.bad = folder, folder / "good-state", folder / "bad-state"
        write_caches(folder, count=3)
        self.settings: list[object] = [
            *settings,
            "--network_dim",
            "2",
            "--network_args",
            "exclude_patterns=['.*(1|down).*']",
        ]
        train_toy(folder, *self.settings, "--max_train_steps", 2, "--save_state")
        (folder / "output" / "x-state").rename(self.state)
        self.expected = self.resume(self.state)
        self.record = json.loads((self.state / "state.json").read_text(encoding="utf-8"))

    def resume(self, state: Path) -> dict[str, Tensor]:
        options = toy_options(self.folder, *self.settings, "--max_train_steps", 4, "--resume", state)
        assert train_network(ToyFamily(), options) == 0
        return load_file(self.folder / "output" / "x.safetensors")

    def copied(self) -> Path:
        shutil.rmtree(self.bad, ignore_errors=True)
        shutil.copytree(self.state, self.bad)
        return self.bad

    def with_record(self, record: Any) -> Path:
        """The state with another record, whose checksum is right."""
        if isinstance(record, dict):
            record = {key: value for key, value in record.items() if key != "crc32"}
            record["crc32"] = zlib.crc32(json.dumps(record, sort_keys=True).encode())
        (self.copied() / "state.json").write_text(json.dumps(record), encoding="utf-8")
        return self.bad

    def with_tensors(self, part: str, name: str, tensor: Tensor | None) -> Path:
        """The state with another tensor in a part (None: without it), whose size and checksum are
        recorded.
        """
        tensors = load_file(self.state / f"{part}.safetensors")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
        content = save(tensors, {"format": "pt"})
        file = {"bytes": len(content), "crc32": zlib.crc32(content)}
        folder = self.with_record(changed(self.record, ("parts", part), file))
        (folder / f"{part}.safetensors").write_bytes(content)
        return folder


@pytest.fixture(scope="module", params=KINDS, ids=lambda name: name.replace(" ", "_"))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    if request.param in PACKAGES:
        pytest.importorskip(PACKAGES[request.param])
    return Saved(tmp_path_factory.mktemp("run"), KINDS[request.param])


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a record."""
    yield path
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield from places(child, (*path, key))


def changed(record: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return None if value is MISSING else copy.deepcopy(value)
    record = copy.deepcopy(record)
    inside = record
    for key in path[:-1]:
        inside = inside[key]
    if value is MISSING:
        del inside[path[-1]]
    else:
        inside[path[-1]] = copy.deepcopy(value)
    return record


def is_learned(record: Any, path: tuple[Any, ...]) -> bool:
    """Whether a path leads to a number that the optimizer has found: another one is as good, as another
    weight is.
    """
    inside, names = record, []
    for key in path:
        if isinstance(inside, list) and len(inside) == 2 and isinstance(inside[0], str) and key == 1:
            names.append(inside[0])
        inside = inside[key]
    return not LEARNED.isdisjoint(names)


def resume_all(
    saved: Saved, mutations: list[tuple[tuple[Any, ...], Any]]
) -> tuple[int, list[tuple[str, Any]]]:
    """How many of the changed records are refused, and which ones go on to other weights or are refused
    without a remedy.
    """
    refused, through = 0, []
    for path, value in mutations:
        name = ".".join(map(str, path))
        state = saved.with_record(changed(saved.record, path, value))
        try:
            weights = saved.resume(state)
        except (CheckpointError, OptionError) as error:
            refused += 1
            if (
                str(state) not in str(error)
                or re.search(r"Resume from|--resume|Use |Update", str(error)) is None
            ):
                through.append((name, str(error)))
        else:
            if not same(weights, saved.expected) and not is_learned(saved.record, path):
                through.append((name, value))
    return refused, through


def mutations_of(saved: Saved) -> list[tuple[tuple[Any, ...], Any]]:
    """Each field of the record with each value."""
    return [(path, value) for path in places(saved.record) for value in VALUES]


def test_a_field_of_another_kind_is_refused_or_changes_nothing(saved: Saved) -> None:
    some = random.Random(0).sample(mutations_of(saved), 25)
    refused, through = resume_all(saved, some)
    assert not through
    assert refused > 10


@pytest.mark.slow
def test_every_field_of_the_record_is_given_every_value(saved: Saved) -> None:
    refused, through = resume_all(saved, mutations_of(saved))
    assert not through
    assert refused > 500


def spoilt(tensor: Tensor, is_counter: bool) -> dict[str, Tensor | None]:
    """A tensor of a state, in ways in which it cannot be right."""
    ways: dict[str, Tensor | None] = {
        "missing": None,
        "longer": torch.zeros(*tensor.shape, 2, dtype=tensor.dtype),
        "other shape": torch.zeros(3, 5, 7, dtype=tensor.dtype),
        "empty": torch.zeros(0, dtype=tensor.dtype),
        "whole numbers": torch.ones(tensor.shape, dtype=torch.int32),
        "8 bits": torch.ones(tensor.shape, dtype=torch.float8_e4m3fn),
        "truths": torch.ones(tensor.shape, dtype=torch.bool),
        "double": tensor.double(),
    }
    if tensor.is_floating_point():
        ways["NaN"] = torch.full_like(tensor, math.nan)
        ways["infinite"] = torch.full_like(tensor, math.inf)
    if not tensor.dim() and is_counter:
        ways["negative"] = torch.full_like(tensor, -3)
    return ways


def resume_with_spoilt_tensors(
    saved: Saved, which: Callable[[list[Any]], list[Any]]
) -> list[tuple[str, str, str]]:
    """Resume with one spoilt tensor after the other; returns those that go on to other weights."""
    cases = [
        (part, name, way, bad)
        for part in ("network", "optimizer")
        for name, tensor in load_file(saved.state / f"{part}.safetensors").items()
        for way, bad in spoilt(tensor, part == "optimizer").items()
    ]
    through = []
    for part, name, way, bad in which(cases):
        state = saved.with_tensors(part, name, bad)
        try:
            weights = saved.resume(state)
        except UserError as error:
            if str(state) not in str(error):
                through.append((name, way, str(error)))
        else:
            if not same(weights, saved.expected):
                through.append((part, name, way))
    return through


def test_a_tensor_of_another_kind_is_refused_or_changes_nothing(saved: Saved) -> None:
    assert not resume_with_spoilt_tensors(saved, lambda cases: random.Random(0).sample(cases, 12))


@pytest.mark.slow
def test_every_tensor_is_spoilt_in_every_way(saved: Saved) -> None:
    assert not resume_with_spoilt_tensors(saved, list)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("step", -1, "field progress.step cannot be used: it is -1, and has to be a whole number from 0"),
        ("step", 3, "progress.step .* it is 3; epoch 0 and position 2 are step 2"),
        ("position", 7, "progress.position .* it is 7; an epoch has 3 micro-batches"),
        ("seed", 9, "progress.seed .* it is 9, and identity says 3"),
        ("sample_pending", "../../x", "progress.sample_pending"),
        ("losses", [math.nan], "progress.losses .* a list of finite numbers"),
    ],
)
def test_the_error_names_the_file_the_field_and_what_to_do(
    tmp_path: Path, field: str, value: Any, words: str
) -> None:
    saved = Saved(tmp_path, [])
    state = saved.with_record(changed(saved.record, ("progress", field), value))
    with pytest.raises(CheckpointError, match=rf"(?s)state\.json.*{words}.*Resume from another state folder"):
        saved.resume(state)


def test_a_part_is_no_path(tmp_path: Path) -> None:
    saved = Saved(tmp_path, [])
    record = changed(saved.record, ("parts", "../good-state/network"), saved.record["parts"]["network"])
    with pytest.raises(CheckpointError, match="parts"):
        read_state(saved.with_record(record))


@pytest.mark.parametrize("scale", [math.nan, -2.0, "x", None, True, 10**400])
def test_the_state_of_a_gradient_scaler_is_checked(scale: Any) -> None:
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(CheckpointError, match=r"state\.json: the field described\.scaler\.scale"):
        restore_scaler(scaler, {**scaler.state_dict(), "scale": scale}, Path("state.json"))
    restore_scaler(scaler, {**scaler.state_dict(), "scale": 8.0}, Path("state.json"))
    assert scaler.state_dict()["scale"] == 8.0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_record_that_is_a_pipe_or_nested_without_end_is_refused_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "x-state"
    folder.mkdir()
    os.mkfifo(folder / "state.json")
    with pytest.raises(CheckpointError, match="state.json"):
        read_state(folder)
    (folder / "state.json").unlink()
    (folder / "state.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(CheckpointError, match="state.json"):
        read_state(folder)
