"""One of several processes that load a transformer with swapped blocks; prints what it saw as a line of
JSON.
"""

import json
import os
import sys
from pathlib import Path

import torch

from networks.apply import LoraPatch
from networks.loading import WeightedLora, read_lora
from protocols.loading import Placement
from runtime.offload.block_swap import swap_blocks
from runtime.offload.swap_plan import SwapPlan, host_weights
from tests.gpu.measuring import sent
from tests.modules.swap_cases import CASES
from tests.tiny.loras import unused
from wan.checkpoints import load_dit
from wan.spec import DIT


def main(path: Path, lora: Path, device: torch.device) -> None:
    torch.distributed.init_process_group("gloo")
    host = host_weights(SwapPlan(DIT, 4), device)
    assert host is not None
    patch = LoraPatch([WeightedLora(read_lora(lora))])
    dit = load_dit(path, Placement(device, patch=patch, host_weights=host))
    patch.check()
    swap_blocks(dit, host, device)
    with torch.no_grad():
        output = dit(**sent(CASES[0].inputs(1), device))
    rank = torch.distributed.get_rank()
    weight = host.adopt(dit)["blocks.3.ffn.0.weight"]
    torch.distributed.barrier()
    if rank == 0:
        weight[0, 0] = 1234
    torch.distributed.barrier()
    files = [
        line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "swapped weights" in line
    ]
    seen = {
        "rank": rank,
        "fills": host.is_written_by_this_process,
        "output": output.double().sum().item(),
        "mark": weight[0, 0].item(),
        "files": sorted({(words[4], words[-1]) for words in files}),  # inode, and whether it has a name
        "unused": unused(patch),
        "pinned": weight.is_pinned() if device.type == "cuda" else False,
    }
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os.write(1, (json.dumps(seen) + "\n").encode())  # at once: lines of two processes do not mix


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), torch.device(sys.argv[3]))
