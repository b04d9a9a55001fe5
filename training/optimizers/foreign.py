"""Read optimizer states of other programs, whose tensors are numbered, and find the layer of each tensor.

Tensors are numbered by parameter group, then in the order in which the program registers its layers, then in
the order of the factors of a layer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from networks.kinds import KINDS
from networks.module_names import number_modules, read_family, select_family
from networks.names.layouts import OURS, TRAINED_ON, FamilyNames
from training.optimizers.optimizer import MOMENT_NAMES

Groups = Sequence[Sequence[Parameter]]
SortKey = Callable[[Parameter], tuple[int, ...]]  # sort key of a parameter in the other program's order


class RenumberingError(Exception):
    """Raised if an optimizer state cannot be matched to parameters; the message contains only the reason."""


def renumber(
    state: Mapping[str, Any],
    groups: Groups,
    names: Mapping[Tensor, str],
    version: str,
    tensor_order: Sequence[str] = (),
) -> dict[str, Any]:
    """Convert the parameter numbers in another program's optimizer state to this run's numbers.

    Each order in which that program may have numbered its parameters is tried; all orders that fit must give
    the same result.

    Args:
        state: State dict of the other program's optimizer.
        groups: Parameter groups of this run's optimizer.
        names: Names of the trained tensors, as `PART.NAME_IN_MODULE`.
        version: Version of the model, as LoRA files record it under `ss_base_model_version`.
        tensor_order: Names of tensors in the other program's order, if its files keep it; () if not.

    Raises:
        RenumberingError: If that is impossible; the message contains the reason.
    """
    if not state:
        raise RenumberingError("it is not in that folder")
    try:
        if tensor_order:
            orders = [_make_tensor_sort_key(names, tensor_order)]
        else:
            orders = _list_possible_orders(groups, names, version)
        all_renumbered = [_renumber_in_order(state, groups, order) for order in orders]
        fitting_states = [renumbered for renumbered in all_renumbered if renumbered is not None]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise RenumberingError(f"it cannot be read ({type(error).__name__}: {error})") from None
    if not orders:
        raise RenumberingError(
            "the order in which that program numbers the layers of this network is not known"
        )
    if not fitting_states:
        raise RenumberingError(
            "it belongs to different tensors. Use the --optimizer_type, --network_args and learning rates of "
            "that run"
        )
    if not _are_equal(fitting_states):
        raise RenumberingError("the order in which that program numbers the factors of a layer is unknown")
    return fitting_states[0]


def _are_equal(renumbered_states: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether all renumbered states give each parameter the same moments."""
    # Several orders may fit, because layers have equal shapes, but then the true one is unknown.
    numberings = []
    for renumbered in renumbered_states:
        numberings.append({number: id(moments) for number, moments in renumbered["state"].items()})
    return all(numbering == numberings[0] for numbering in numberings)


def _make_tensor_sort_key(names: Mapping[Tensor, str], tensor_order: Sequence[str]) -> SortKey:
    positions = {name: position for position, name in enumerate(tensor_order)}
    return lambda parameter: (positions[names[parameter].partition(".")[2]],)


def _list_possible_orders(groups: Groups, names: Mapping[Tensor, str], version: str) -> list[SortKey]:
    """Return a sort key for each order in which the program may have numbered the parameters."""
    # A sort key is the index of a parameter's module, then of its factor in the module, such as lora_down.
    parameters = [parameter for group in groups for parameter in group]
    # part, module and factor of each name
    name_parts = {parameter: names[parameter].split(".", 2) for parameter in parameters}
    modules = list(dict.fromkeys(module for _, module, _ in name_parts.values()))
    numbered = number_modules(modules, _find_family(modules, version))
    if numbered is None:
        return []
    positions = {name: position for position, name in enumerate(numbered)}

    def position_by(factors: Sequence[str]) -> SortKey:
        def position(parameter: Parameter) -> tuple[int, ...]:
            _, module, factor = name_parts[parameter]
            return positions[module], factors.index(factor)

        return position

    used_factors = {factor for _, _, factor in name_parts.values()}
    orders = [order for kind in KINDS for order in kind.orders]
    return [position_by(order) for order in orders if used_factors <= set(order)]


def _find_family(modules: Sequence[str], version: str) -> FamilyNames | None:
    """Return the family of a network, from the names of its modules and the recorded version of its model."""
    known_family = read_family({TRAINED_ON: version})
    in_dit = [name.removeprefix(OURS) for name in modules if name.startswith(OURS)]
    return select_family(in_dit, None if known_family is None else known_family.name)


def _renumber_in_order(
    state: Mapping[str, Any], groups: Groups, get_position: SortKey
) -> dict[str, Any] | None:
    """Return another program's state with this run's parameter numbers; None if groups or shapes differ."""
    # 1. Sort this run's groups, and the parameters in each, by `get_position`: the order that the other
    #    program is assumed to use.
    # 2. Assign its moments to this run's parameters one by one in this order.
    # 3. Take its settings for each group, such as learning rates.
    # indices of this run's groups in the other program's order
    order = sorted(range(len(groups)), key=lambda index: min(map(get_position, groups[index])))
    their_lengths = [len(group["params"]) for group in state["param_groups"]]
    if [len(groups[index]) for index in order] != their_lengths:
        return None
    their_groups = dict(zip(order, state["param_groups"], strict=True))  # by the index of this run's group
    their_numbers: dict[Parameter, Any] = {}
    for index, their_group in their_groups.items():
        our_parameters = sorted(groups[index], key=get_position)
        their_numbers |= zip(our_parameters, their_group["params"], strict=True)
    moments = _find_moments(state["state"], their_numbers)
    if moments is None:
        return None
    parameters = [parameter for group in groups for parameter in group]
    our_numbers = {parameter: number for number, parameter in enumerate(parameters)}
    our_groups: list[dict[str, Any]] = []
    for index, group in enumerate(groups):
        # learning rate, betas and other settings, with this run's numbers
        our_groups.append({**their_groups[index], "params": [our_numbers[parameter] for parameter in group]})
    our_moments = {our_numbers[parameter]: values for parameter, values in moments.items()}
    return {"state": our_moments, "param_groups": our_groups}


def _find_moments(
    their_moments: Mapping[Any, Any], their_numbers: Mapping[Parameter, Any]
) -> dict[Parameter, Any] | None:
    """Return the moments of each parameter that has any; None if a moment has a different shape."""
    moments_by_parameter: dict[Parameter, Any] = {}
    for parameter, their_number in their_numbers.items():
        moments = their_moments.get(their_number)
        if moments is None:
            continue
        moment_names = MOMENT_NAMES & moments.keys()
        if any(moments[name].shape != parameter.shape for name in moment_names):
            return None
        moments_by_parameter[parameter] = moments
    return moments_by_parameter
