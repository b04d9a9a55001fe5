"""Run commands on the emulated device and on the CPU, and compare what they write."""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.commands import QUIET, ROOT
from tests.tiny.families import Command


@dataclass(frozen=True)
class Done:
    """A command that ran on the emulated device."""

    code: int
    said: str
    waits: tuple[Mapping[str, Any], ...]
    calls: Mapping[str, int]  # of the functions that were counted

    def places(self, *inside: str) -> Counter[str]:
        """Return how often the host waited, by place: file and function.

        inside: functions; only waits with all of them on the stack count.
        """
        found: Counter[str] = Counter()
        for each in self.waits:
            functions = {frame.split(" ")[1] for frame in each["stack"]}
            if functions.issuperset(inside):
                file, function = each["place"].split(":")[0], each["place"].split(" ")[-1]
                found[f"{file} {function}"] += 1
        return found


def run_on_device(*commands: Command, folder: Path, counted: Sequence[str] = ()) -> list[Done]:
    """Run scripts one after the other on the device, in a process of its own. All of them have to succeed.

    counted: functions, MODULE:NAME, whose calls are counted.
    """
    requests = [{"folder": str(folder), "command": command, "counted": [*counted]} for command in commands]
    environment = {name: value for name, value in QUIET.items() if name != "ACCELERATE_USE_CPU"}
    with tempfile.TemporaryDirectory() as results:
        file = Path(results) / "results.json"
        ended = subprocess.run(
            [sys.executable, "-m", "tests.emulated_cuda.run", str(file)],
            input=json.dumps(requests),
            capture_output=True,
            encoding="utf-8",
            cwd=ROOT,
            env={**own_environment(), **environment},
        )
        assert file.exists(), ended.stderr[-4000:]
        read = json.loads(file.read_text(encoding="utf-8"))
    done = [Done(each["code"], each["said"], tuple(each["waits"]), each["calls"]) for each in read]
    for command, each in zip(commands, done, strict=True):
        assert each.code == 0, f"{' '.join(command)}\n{each.said[-4000:]}"
    return done


def own_environment() -> dict[str, str]:
    """Return this process's environment without what keeps accelerate on the CPU."""
    return {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}


def differences(one: Path, other: Path, share: float = 0) -> list[str]:
    """Return which tensors of which files of two folders differ in a bit, or are in one only.

    share: of the largest number of a tensor, by which its numbers may differ.
    """
    found = []
    files, others = (
        {each.relative_to(folder) for each in folder.glob("**/*.safetensors")} for folder in (one, other)
    )
    found += [f"{each.as_posix()}: in one folder only" for each in sorted(files ^ others)]
    for file in sorted(files & others):
        first, second = load_file(one / file), load_file(other / file)
        assert first.keys() == second.keys(), file
        for name, tensor in first.items():
            if tensor.dtype == second[name].dtype and torch.equal(_bits(tensor), _bits(second[name])):
                continue
            gap = (tensor.double() - second[name].double()).abs().max().item()
            maximum = tensor.double().abs().max().item()
            if tensor.dtype != second[name].dtype or not gap <= share * maximum:
                found.append(f"{file.as_posix()}: {name} by {gap:.2e} of {maximum:.2e}")
    return found


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
