"""torch.compile for the networks of all tools."""

import logging
from collections.abc import Iterable

import torch
from torch import nn

from modules.compile import RECOMPILE_LIMIT, check_compilation
from modules.compile_options import Compilation
from post.network_options import ToolNetworkOptions

logger = logging.getLogger(__name__)

USUAL = Compilation()


def check_compiling(options: ToolNetworkOptions, device: torch.device) -> None:
    """Raise OptionError if --compile cannot be followed on the device; call before anything is loaded."""
    check_compilation(USUAL if options.compile else None, device)


def compile_parts(
    options: ToolNetworkOptions, parts: Iterable[nn.Module], choice: Compilation = USUAL
) -> None:
    """Compile the `forward` of parts of a network in place, if --compile is given.

    parts: best the blocks of a list, which share their code and so cost one compilation; else the whole
    network. It runs at their first call. Call `check_compiling` before.
    """
    if not options.compile:
        return
    import torch._dynamo  # slow to import, so only if needed

    # a clip of another size, and tiles, are further variants
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    for part in parts:
        part.forward = torch.compile(
            part.forward, backend=choice.backend, mode=choice.mode, dynamic=choice.dynamic
        )
    logger.info("The network is compiled with %s at its first use, which takes some time.", choice.backend)
