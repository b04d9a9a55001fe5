"""Networks in half precision, with float32 where that is not enough."""

import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from modules.compile import check_compilation, compile_each
from modules.compile_options import Compilation
from modules.devices import choose_compute_dtype, half_where_fast
from modules.errors import CheckpointError
from post.run_options import ToolNetworkOptions

logger = logging.getLogger(__name__)


Run = Callable[[Tensor], Tensor]


def network_dtype(options: ToolNetworkOptions, device: torch.device, what: str) -> torch.dtype:
    """Return the dtype that a network computes in on a device. what: its name, for the log.

    float16 is float32 on a CPU. Raises OptionError for an unknown dtype and for fp8.
    """
    return half_where_fast(device, choose_compute_dtype(options.dtype, "--dtype", torch.float32), what)


class Guarded:
    """A network that takes and returns float32, whatever it computes in.

    In half precision, pictures of a batch whose result is NaN or infinite are computed again in float32.
    """

    def __init__(self, run: Run, dtype: torch.dtype, exact: Callable[[], Run], what: str) -> None:
        """exact: loads the network in float32, at the first result that is not finite. what: its name."""
        self._run = run
        self.dtype = dtype
        self._load_exact = exact
        self._exact: Run | None = None
        self.what = what

    def __call__(self, images: Tensor) -> Tensor:
        """images: B C H W in float32. Raises CheckpointError if float32 does not suffice either."""
        made = self._run(images.to(self.dtype)).float()
        if self.dtype == torch.float32:
            return made
        is_good = made.isfinite().flatten(1).all(dim=1)
        if bool(is_good.all()):
            return made
        bad = (~is_good).nonzero().flatten()
        again = self._in_float32(images[bad])
        if not bool(again.isfinite().all()):
            raise CheckpointError(
                f"the result of {self.what} is NaN or infinite, in float32 too: its file may be damaged. "
                "Download or copy it again."
            )
        made[bad] = again
        return made

    def _in_float32(self, images: Tensor) -> Tensor:
        if self._exact is None:
            logger.info(
                "A result of %s in %s is not finite: such pictures are computed again in float32.",
                self.what,
                str(self.dtype).removeprefix("torch."),
            )
            self._exact = self._load_exact()
        return self._exact(images).float()


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
    compile_each(parts, choice)
    logger.info("The network is compiled with %s at its first use, which takes some time.", choice.backend)
