"""Chroma's network that makes all modulations."""

import torch

from flux.configs import ApproximatorConfig
from flux.model import Approximator
from modules.planning.dry_run import dry_run, place


def test_the_network_of_modulations_can_be_rehearsed() -> None:
    """Every run on a GPU begins with one, in which numbers of the host and of the device must not mix."""
    with torch.device("meta"):
        network = Approximator(ApproximatorConfig(64, 80, 5), rows=30, out_dim=128, eps=1e-6)

    with dry_run() as ledger:
        place(network, ledger)
        times = torch.empty(1, device=ledger.device)
        rows = network(times, times)

    assert rows.shape == (1, 30, 128)
