"""Whether a recorded optimizer state is one that this optimizer can go on with: checked against states that
it makes itself.

What an optimizer keeps for a weight is known to nobody but its class, so a copy of it steps a stand-in of the
same shape once, and names, kinds, shapes and dtypes have to be those.
"""

import copy
import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from training.saving.state_record import LARGEST_COUNT, is_finite_number, refuse
from training.saving.states import RECORD, info_of

logger = logging.getLogger(__name__)

# settings that no optimizer changes while it steps: the options, which a resumed run shares, have set them
FIXED = frozenset(
    {
        "initial_lr",
        "betas",
        "eps",
        "weight_decay",
        "momentum",
        "dampening",
        "alpha",
        "rho",
        "lambd",
        "t0",
        "lr_decay",
        "d0",
        "d_coef",
    }
    | {
        "clip_threshold",
        "decay_rate",
        "beta1",
        "beta2",
        "beta3",
        "beta2_decay",
        "momentum_decay",
        "etas",
        "step_sizes",
        "growth_rate",
    }
    | {
        "warmup_steps",
        "r",
        "weight_lr_power",
        "ns_coefficients",
        "ns_steps",
        "initial_accumulator_value",
        "slice_p",
    }
)
LARGEST_NUMBER = 1e16  # its square fits float32, in which optimizers compute
FIELD = "described.optimizer"


@dataclass(frozen=True)
class RecordedState:
    """Where a recorded optimizer comes from, and how it went on."""

    path: Path = Path(RECORD)
    has_stepped: bool = True  # so there is a state for every weight
    steps_in_float32: bool = False  # weights in bf16 are stepped as float32
    has_own_rate: bool = False  # no schedule sets the learning rate


ANY_STATE = RecordedState()


class _Unfit(Exception):
    """A value that does not fit. Carries the field and the reason."""


def check_outline(description: Any, class_name: str, path: Path) -> None:
    """Raise CheckpointError if the record of an optimizer lacks a part, or is that of another class."""

    def require(is_right: bool, field: str, reason: str) -> None:
        if not is_right:
            raise refuse(path, FIELD + field, reason)

    require(isinstance(description, dict), "", "it is missing, or not an object {...}")
    found = description.get("class")
    require(found == class_name, ".class", f"it is {found!r:.80}, and this run's optimizer is {class_name}")
    groups, states = description.get("groups"), description.get("states")
    require(isinstance(groups, list), ".groups", "it has to be a list")
    require(isinstance(states, dict), ".states", "it has to be an object {...}")
    for index, group in enumerate(groups or ()):
        require(isinstance(group, dict), f".groups[{index}]", "it has to be an object {...}")
        params = group.get("params")
        is_names = isinstance(params, list) and all(isinstance(name, str) for name in params)
        require(is_names, f".groups[{index}].params", "it has to be a list of names")


def check_optimizer(
    optimizer: Optimizer,
    names: Mapping[Tensor, str],
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    device: torch.device,
    record: RecordedState,
) -> None:
    """Raise CheckpointError naming the first field that this optimizer does not keep so.

    The outline is right already.
    """
    fixed = FIXED | {"lr"} if record.has_own_rate else FIXED
    try:
        for index, (group, saved) in enumerate(
            zip(optimizer.param_groups, description["groups"], strict=True)
        ):
            _check_settings(group, saved.get("rest"), tensors, f"{FIELD}.groups[{index}].rest", fixed)
        _check_states(optimizer, names, description["states"], tensors, device, record)
    except _Unfit as error:
        field, reason = error.args
        raise refuse(record.path, field, reason) from None


def check_like(example: Any, encoded: Any, field: str, path: Path) -> None:
    """Raise CheckpointError if an encoded value without tensors is not of the kind of `example`, or holds
    other names.
    """
    try:
        _check_value(example, encoded, {}, field)
    except _Unfit as error:
        raise refuse(path, *error.args) from None


def _check_settings(
    group: Mapping[str, Any], encoded: Any, tensors: Mapping[str, Tensor], field: str, fixed: frozenset[str]
) -> None:
    saved = _pairs(encoded, field)
    for key, value in group.items():
        if key == "params":
            continue
        where = f"{field}.{key}"
        if key not in saved:
            if isinstance(value, (bool, str, type(None))):  # younger than the state; options set it
                continue
            raise _Unfit(where, "it is missing")
        _check_value(value, saved[key], tensors, where)
        is_fixed = key in fixed or isinstance(value, (bool, str, type(None)))
        if is_fixed and not isinstance(value, Tensor) and _plain(saved[key], where) != _untupled(value):
            raise _Unfit(
                where,
                f"it is {_plain(saved[key], where)!r:.60}, and the options of this run make it {value!r:.60}",
            )
    for key in saved.keys() - group.keys():
        if not isinstance(key, str):
            raise _Unfit(field, f"{key!r:.60} is not a name")
        _check_value(_ANYTHING, saved[key], tensors, f"{field}.{key}")
    rate = saved.get("lr")
    if rate is not None and not isinstance(rate, dict) and rate < 0:
        raise _Unfit(f"{field}.lr", f"it is {rate}, which is below 0")


def _check_states(
    optimizer: Optimizer,
    names: Mapping[Tensor, str],
    states: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    device: torch.device,
    record: RecordedState,
) -> None:
    if unknown := sorted(
        states.keys() - {names[one] for group in optimizer.param_groups for one in group["params"]}
    ):
        raise _Unfit(f"{FIELD}.states", f"{unknown[0]!r:.80} is not a weight that is trained")
    examples: dict[tuple[Any, ...], list[dict[str, Any]] | None] = {}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            name = names[parameter]
            field = f"{FIELD}.states.{name}"
            kind = index, parameter.shape, parameter.dtype
            if kind not in examples:
                examples[kind] = _example_states(optimizer, index, parameter, device, record.steps_in_float32)
            known = examples[kind]
            if name not in states:
                if record.has_stepped and known is not None and any(known):
                    raise _Unfit(field, "it is missing")
                continue
            _check_state(known, states[name], tensors, field)


def _check_state(
    known: list[dict[str, Any]] | None, saved: Any, tensors: Mapping[str, Tensor], field: str
) -> None:
    """One weight's state has to be as one of the known ones; None: they are not known."""
    first: _Unfit | None = None
    for example in known if known is not None else [_ANYTHING]:
        try:
            _check_value(example, saved, tensors, field)
        except _Unfit as error:
            first = first or error
        else:
            return
    if first is not None:
        raise first


@torch.no_grad()
def _example_states(
    optimizer: Optimizer, index: int, parameter: Parameter, device: torch.device, in_float32: bool
) -> list[dict[str, Any]] | None:
    """What the optimizer keeps after one step for a weight of this shape: of zeros and of ones, as some tell
    these apart.
    """
    if getattr(optimizer, "is_paged", False):  # bitsandbytes lists all paged states, and would keep these
        return None
    dtype = torch.float32 if in_float32 and parameter.dtype == torch.bfloat16 else parameter.dtype
    found = []
    for make in (torch.ones, torch.zeros):
        stand_in = Parameter(make(parameter.shape, dtype=dtype, device=device))
        stand_in.grad = torch.ones_like(stand_in)
        second = copy.copy(optimizer)
        second.state = defaultdict(dict)
        second.param_groups = [
            {**copy.deepcopy(_without_params(optimizer.param_groups[index])), "params": [stand_in]}
        ]
        try:
            with torch.random.fork_rng(devices=[]):
                type(optimizer).step(second)  # a schedule has put its own `step` on the first one
        except Exception as error:  # whatever a foreign class raises: its states are then taken as they are
            logger.debug("the states of %s are not checked: %s", type(optimizer).__name__, error)
            return None
        found.append(dict(second.state[stand_in]))
    return found


def _without_params(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


_ANYTHING: Any = object()  # an example of a value of which nothing is known


def _check_value(example: Any, encoded: Any, tensors: Mapping[str, Tensor], field: str) -> None:
    """Raise _Unfit if `encoded` is not what `encode` makes of a value of the kind of `example`."""
    if isinstance(encoded, dict):
        _check_container(example, encoded, tensors, field)
    elif isinstance(encoded, list):
        raise _Unfit(field, "it is a list, which no state holds as it is")
    elif isinstance(encoded, (bool, str, type(None))):
        if example is not _ANYTHING and type(encoded) is not type(example) and example is not None:
            raise _Unfit(field, f"it is {encoded!r:.60}, and has to be {_words(example)}")
        if example is None and encoded is not None:
            raise _Unfit(field, f"it is {encoded!r:.60}, and has to be null")
    else:
        _check_number(example, encoded, field)


def _check_number(example: Any, number: Any, field: str) -> None:
    if (
        example is not _ANYTHING
        and example is not None
        and (isinstance(example, bool) or not isinstance(example, (int, float)))
    ):
        raise _Unfit(field, f"it is {number!r:.60}, and has to be {_words(example)}")
    if isinstance(example, float) and number == example:  # some settings are infinite
        return
    if not is_finite_number(number):
        raise _Unfit(field, f"it is {number!r:.60}, and has to be a finite number")
    if isinstance(example, int) and isinstance(number, float) and number != int(number):
        raise _Unfit(field, f"it is {number!r:.60}, and has to be a whole number")
    name = field.rpartition(".")[2]
    is_count = name in {"step", "k", "_step_count", "last_epoch"}
    if abs(number) > LARGEST_NUMBER or (is_count and not 0 <= number < LARGEST_COUNT):
        raise _Unfit(field, f"it is {number!r:.60}, which no run reaches")


def _check_container(
    example: Any, encoded: dict[str, Any], tensors: Mapping[str, Tensor], field: str
) -> None:
    if "tensor" in encoded:
        _check_tensor(example, encoded, tensors, field)
    elif "mapping" in encoded:
        _check_mapping(example, encoded, tensors, field)
    else:
        kind = "tuple" if "tuple" in encoded else "list"
        items = encoded.get(kind)
        if not isinstance(items, list):
            raise _Unfit(field, "it is not a value that a state holds")
        if (
            example is not _ANYTHING
            and type(example).__name__ != kind
            and not isinstance(example, (list, tuple))
        ):
            raise _Unfit(field, f"it is a {kind}, and has to be {_words(example)}")
        known = list(example) if isinstance(example, (list, tuple)) else []
        is_fixed = isinstance(example, tuple) or (
            bool(known) and all(isinstance(one, (int, float)) for one in known)
        )
        if is_fixed and len(known) != len(items):
            raise _Unfit(field, f"it holds {len(items)} values, and has to hold {len(known)}")
        for index, item in enumerate(items):
            _check_value(
                known[index] if index < len(known) else _ANYTHING, item, tensors, f"{field}[{index}]"
            )


def _check_mapping(example: Any, encoded: dict[str, Any], tensors: Mapping[str, Tensor], field: str) -> None:
    saved = _pairs(encoded, field)
    if example is not _ANYTHING and not isinstance(example, Mapping):
        raise _Unfit(field, f"it is an object, and has to be {_words(example)}")
    known: Mapping[Any, Any] = {} if example is _ANYTHING else example
    if known and all(isinstance(key, str) for key in known):
        differing = sorted(map(str, known.keys() ^ saved.keys()))
        if differing:
            raise _Unfit(
                f"{field}.{differing[0]}",
                "it is missing" if differing[0] in known else "it is not known here",
            )
    elif example is not _ANYTHING and not known and saved:
        raise _Unfit(field, "it holds values, and this optimizer keeps none")
    for key, item in saved.items():
        _check_value(known.get(key, _ANYTHING), item, tensors, f"{field}.{key}")


def _check_tensor(example: Any, encoded: dict[str, Any], tensors: Mapping[str, Tensor], field: str) -> None:
    name = encoded["tensor"]
    if not isinstance(name, str) or name not in tensors:
        raise _Unfit(field, f"its tensor {name!r:.80} is not in optimizer.safetensors")
    if not isinstance(encoded.get("on_cpu"), bool):
        raise _Unfit(f"{field}.on_cpu", "it has to be true or false")
    if example is _ANYTHING:
        return
    if not isinstance(example, Tensor):
        raise _Unfit(field, f"it is a tensor, and has to be {_words(example)}")
    found, right = info_of(tensors, name), (example.dtype, tuple(example.shape))
    if (found.dtype, found.shape) != right:
        raise _Unfit(
            field,
            f"its tensor is {found.dtype} {list(found.shape)}, and has to be {right[0]} {list(right[1])}",
        )
    if not found.shape and field.endswith(".step") and not 0 <= float(tensors[name]) < LARGEST_COUNT:
        raise _Unfit(field, f"it is {float(tensors[name])}, which no run reaches")


def _pairs(encoded: Any, field: str) -> dict[Any, Any]:
    """The entries of an encoded mapping."""
    pairs = encoded.get("mapping") if isinstance(encoded, dict) else None
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise _Unfit(field, 'it has to be {"mapping": [[name, value], ...]}')
    if not all(isinstance(key, (bool, int, float, str, type(None))) for key, _ in pairs):
        raise _Unfit(field, "a name in it is neither a text nor a number")
    return dict(pairs)


def _plain(encoded: Any, field: str) -> Any:
    """An encoded value without tensors, tuples as lists."""
    if not isinstance(encoded, dict):
        return encoded
    if "tensor" in encoded:
        raise _Unfit(field, "it is a tensor, and has to be a setting")
    if "mapping" in encoded:
        return {key: _plain(item, field) for key, item in _pairs(encoded, field).items()}
    return [_plain(item, field) for item in (encoded["tuple"] if "tuple" in encoded else encoded["list"])]


def _untupled(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_untupled(item) for item in value]
    return value


def _words(example: Any) -> str:
    if example is None:
        return "null"
    if isinstance(example, Tensor):
        return f"a tensor of {example.dtype} {list(example.shape)}"
    return {"bool": "true or false", "int": "a number", "float": "a number", "str": "a text"}.get(
        type(example).__name__, f"a {type(example).__name__}"
    )
