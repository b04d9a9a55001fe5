"""The mark of tests that compare with recorded numbers."""

from collections.abc import Callable

import pytest

from tests.frame_pack import test_model as model
from tests.hunyuan_image import test_family as family
from tests.modules.flow import test_solvers as solvers
from tests.networks import test_lora_image_families as loras
from tests.recorded import reads_recorded


@pytest.mark.parametrize(
    ("test", "is_recorded"),
    [
        (model.test_forward_equals_the_recorded_output, True),
        (model.test_gradients_equal_those_of_diffusers, False),
        (solvers.test_schedules_and_trajectories_equal_the_recorded_ones, True),
        (loras.test_forward_loss_and_gradients_equal_the_recorded_ones, True),
        (family.test_what_the_release_does_is_the_default, False),
    ],
)
def test_tests_that_read_recorded_numbers_are_found(test: Callable[..., None], is_recorded: bool) -> None:
    assert reads_recorded(test) == is_recorded
