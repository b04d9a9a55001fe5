"""Ways to run a transformer, each in one file that can be deleted together with its lines below."""

from runtime.ways.cfg_parallel import CFG_PARALLEL
from runtime.ways.context_parallel import CONTEXT_PARALLEL
from runtime.ways.contract import WayToRun
from runtime.ways.shard_base import SHARD_BASE

# in the order of their options in --help, one a line
# fmt: off
WAYS: tuple[WayToRun, ...] = (
    SHARD_BASE,
    CONTEXT_PARALLEL,
    CFG_PARALLEL,
)
# fmt: on
