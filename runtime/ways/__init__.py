"""Ways to run a transformer, each in one file that can be deleted together with its lines below.

cfg_parallel: processes share the passes of a step
cfg_parallel_passes: divide the passes of a step
composing: options of all ways, and the ways that join
context_parallel: processes share the tokens of a clip
context_parallel_tokens: run blocks on a part of the tokens
contract: what a way to run is
shard_base: processes share the weights
"""

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
