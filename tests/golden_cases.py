"""Read the parity vectors in tests/golden (its README.md states the rule for weights)."""

import json
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from protocols.loading import Placement

FOLDER = Path(__file__).parent / "golden"
SALT = "golden-a"
# Of the largest value: what float32 powers, which processors round differently, left in recorded outputs of
# models with a sinusoid of up to 10000. Ours are float64 powers, so that the gap is 2.4e-5 everywhere
FLOAT32_POWERS = 5e-5
# torch draws float32 noise by the logarithms and cosines of the processor: a few last digits of up to 5
DRAWN = 5e-6


def read_case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the stored tensors (none where the case has only JSON)."""
    description = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    path = FOLDER / f"{name}.safetensors"
    return description, load_file(path) if path.exists() else {}


def draw(key: str, shape: list[int]) -> numpy.ndarray:
    """Standard normal numbers that belong to a key."""
    return numpy.random.RandomState(zlib.crc32(key.encode("utf-8"))).standard_normal(shape)


def make_weights(model_key: str, table: list[list[Any]], salt: str = SALT) -> dict[str, Tensor]:
    """The weights of a golden model from its table of [name, shape]."""
    weights = {}
    for name, shape in table:
        values = draw(f"{salt}/{model_key}/{name}", shape)
        leaf = name.rsplit(".", 1)[-1]
        if leaf in {"bias", "modulation"}:
            values = 0.1 * values
        elif leaf == "gamma" or len(shape) <= 1:
            values = 1 + 0.1 * values
        else:
            values = values / numpy.sqrt(numpy.prod(shape[1:]))
        weights[name] = torch.from_numpy(numpy.asarray(values, dtype=numpy.float32))
    return weights


def write_model(case: str, folder: Path) -> Path:
    """A checkpoint of a case whose weights have published names."""
    description, _ = read_case(case)
    path = folder / "dit.safetensors"
    save_file(make_weights(description["weights_model_key"], description["weights"]), path)
    return path


def load_model(case: str, load_dit: Callable[[Path, Placement], Any]) -> Any:
    """The network of such a case, as it is loaded from its checkpoint."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = write_model(case, Path(folder))
        return load_dit(path, Placement(torch.device("cpu"))).eval().requires_grad_(False)


def make_input(case: str, name: str, shape: list[int], scale: float, salt: str = SALT) -> Tensor:
    """An input that a case lists under `inputs_by_rule`."""
    return torch.from_numpy((scale * draw(f"{salt}/input/{case}/{name}", shape)).astype(numpy.float32))
