"""Measure what --tread saves: the processor time of a training step, with and without.

    python benchmarks/tread.py

A random Wan2.1 of 10 blocks with a LoRA is trained by hand on the CPU with 640 video tokens; half of them pass
by 8 of the blocks. Steps with and without take turns; of each kind the median counts. It fails if the ratio
is above the aim.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402  # the project's modules are found from here on
from torch import nn  # noqa: E402

from networks.adapter import make_network  # noqa: E402
from networks.options import NetworkOptions  # noqa: E402
from running.offload.checkpointing import checkpoint_blocks  # noqa: E402
from running.routes import Route, routed  # noqa: E402
from wan.configs import WanConfig  # noqa: E402
from wan.model import WanModel  # noqa: E402

AIM = 0.8
