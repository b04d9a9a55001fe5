"""LoKr for the Linear layers of a network's blocks: `--network_module networks.lokr`, for every family.

`--network_args factor=8` splits sizes into 8 and the rest (-1, the default: as equal as can be);
`decompose_both=True` gives the smaller matrix two factors too. A `--network_dim` of half the larger matrix's
side or more keeps that matrix whole.
"""

import functools
from typing import Any

from modules.errors import OptionError
from networks.factored import MakeShapes, lokr_shapes, module_of_kind

SWITCH = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}


def take_shapes(arguments: dict[str, Any]) -> MakeShapes:
    """Take `factor` and `decompose_both` out of the arguments; return module -> its factors.

    Raises OptionError if they cannot be used.
    """
    factor, decompose_both = arguments.pop("factor", -1), arguments.pop("decompose_both", False)
    try:
        size = int(factor)
    except ValueError:
        size = 0
    if size < 1 and size != -1:
        raise OptionError(
            f"--network_args factor={factor}: give a whole number from 1, or -1 for equal parts"
        )
    if str(decompose_both) not in SWITCH:
        raise OptionError(f"--network_args decompose_both={decompose_both}: give True or False")
    return functools.partial(lokr_shapes, factor=size, decompose_both=SWITCH[str(decompose_both)])


check_settings, create_arch_network, create_arch_network_from_weights = module_of_kind(
    take_shapes, ("lokr_w1", "lokr_w1_a")
)
