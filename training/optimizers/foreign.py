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
from networks.names.layouts import OURS, TRAINED_ON
from training.optimizers.optimizer import MOMENTS

Groups = Sequence[Sequence[Parameter]]
Place = Callable[[Parameter], tuple[int, ...]]  # sort key of a parameter in the other program's order


def renumber(
    state: Mapping[str, Any],
    groups: Groups,
    names: Mapping[Tensor, str],
    version: str,
    ordered: Sequence[str] = (),
) -> dict[str, Any] | str:
    """Renumber the parameters in another program's optimizer state; return the reason if that is impossible.

    Args:
        state: State dict of the other program's optimizer.
        groups: Parameter groups of this run's optimizer.
        names: Names of the trained tensors, as `PART.NAME_IN_MODULE`.
        version: Version of the model, as LoRA files record it under `ss_base_model_version`.
        ordered: Names of tensors in the other program's order, if its files reveal it.
    """
    if not state:
        return "it is not in that folder"
    try:
        orders = [_by_list(names, ordered)] if ordered else _by_names(groups, names, version)
        all_renumbered = [_fit(state, groups, order) for order in orders]
        fitting = [renumbered for renumbered in all_renumbered if renumbered is not None]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        return f"it cannot be read ({type(error).__name__}: {error})"
    if not orders:
        return "in which order that program numbers the layers of this network is not known"
    if not fitting:
        return (
            "it is of other tensors. Use the --optimizer_type, --network_args and learning rates of that run"
        )
    # several orders may fit, because layers have equal shapes: accept them if all give each parameter the
    # same state, which is compared by identity
    numberings = []
    for renumbered in fitting:
        numberings.append({number: id(moments) for number, moments in renumbered["state"].items()})
    if any(numbering != numberings[0] for numbering in numberings):
        return "in which order that program numbers the factors of a layer is not known"
    return fitting[0]


def _by_list(names: Mapping[Tensor, str], ordered: Sequence[str]) -> Place:
    positions = {name: position for position, name in enumerate(ordered)}
    return lambda parameter: (positions[names[parameter].partition(".")[2]],)


def _by_names(groups: Groups, names: Mapping[Tensor, str], version: str) -> list[Place]:
    """Return the orders in which the other program may have numbered the parameters; [] if unknown.

    An order is a function that maps a parameter to its place: first by module, then by factor in it.
    """
    parameters = [parameter for group in groups for parameter in group]
    # part, module and factor of each name
    name_parts = {parameter: names[parameter].split(".", 2) for parameter in parameters}
    modules = list(dict.fromkeys(module for _, module, _ in name_parts.values()))
    known_family = read_family({TRAINED_ON: version})
    in_dit = [name.removeprefix(OURS) for name in modules if name.startswith(OURS)]
    family = select_family(in_dit, None if known_family is None else known_family.name)
    numbered = number_modules(modules, family)
    if numbered is None:
        return []
    positions = {name: position for position, name in enumerate(numbered)}

    def position_by(factors: Sequence[str]) -> Place:
        def position(parameter: Parameter) -> tuple[int, ...]:
            _, module, factor = name_parts[parameter]
            return positions[module], factors.index(factor)

        return position

    used = {factor for _, _, factor in name_parts.values()}
    orders = [order for kind in KINDS for order in kind.orders]
    return [position_by(order) for order in orders if used <= set(order)]


def _fit(state: Mapping[str, Any], groups: Groups, position_of: Place) -> dict[str, Any] | None:
    """Return another program's state with our parameter numbers; None if groups or shapes differ.

    `position_of` returns the place of a parameter in the assumed order of that program.
    """
    their_groups = state["param_groups"]
    # our groups in the order of theirs
    order = sorted(range(len(groups)), key=lambda index: min(map(position_of, groups[index])))
    their_lengths = [len(group["params"]) for group in their_groups]
    if their_lengths != [len(groups[index]) for index in order]:
        return None
    parameters = [parameter for group in groups for parameter in group]
    our_numbers = {parameter: number for number, parameter in enumerate(parameters)}
    moments_by_number: dict[int, Any] = {}
    for their_group, index in zip(their_groups, order, strict=True):
        in_their_order = sorted(groups[index], key=position_of)
        for number, parameter in zip(their_group["params"], in_their_order, strict=True):
            moments = state["state"].get(number)
            if moments is None:
                continue
            names = MOMENTS & moments.keys()
            if any(moments[name].shape != parameter.shape for name in names):
                return None
            moments_by_number[our_numbers[parameter]] = moments
    our_groups: list[dict[str, Any]] = []
    for index, group in enumerate(groups):
        settings = dict(their_groups[order.index(index)])  # learning rate, betas and other settings
        settings["params"] = [our_numbers[parameter] for parameter in group]
        our_groups.append(settings)
    return {"state": moments_by_number, "param_groups": our_groups}
