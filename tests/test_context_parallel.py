"""Runs whose processes share the tokens of a clip, from the command lines of the families."""

import sys

import pytest

from tests.test_shard_base import USUAL, Shared
from tests.training.toy import same

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are copies of one with libraries")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    return Shared(USUAL, tmp_path_factory.mktemp("tokens of two cards"))


def test_peers_draw_equal_batches_and_their_gradients_are_those_of_one_process(project: Shared) -> None:
    expected = project.train("alone", 1, "--validation_split", "0.25", "--validate_every_n_steps", "1")

    found = project.train(
        "shared", 2, "--context_parallel", "2", "--validation_split", "0.25", "--validate_every_n_steps", "1"
    )

    assert same(found, expected)
