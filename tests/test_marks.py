"""The marks that follow from what a test calls."""

from collections.abc import Callable

import pytest

from tests import test_families as families
from tests import test_size as sizes
from tests.commands import run_script
from tests.frame_pack import test_model as model
from tests.hunyuan_image import test_family as family
from tests.marks import reads_recorded, starts_script
from tests.modules.flow import test_solvers as solvers
from tests.networks import test_lora_image_families as loras


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


def starts_one_inside() -> None:
    def later() -> None:
        run_script("wan_train.py")

    later()


@pytest.mark.parametrize(
    ("test", "starts"),
    [
        (starts_one_inside, True),
        (families.trained, True),
        (families.test_the_lora_has_learned, False),  # its fixture does
        (sizes.test_the_ways_through_the_house_do_not_grow, True),
        (solvers.test_schedules_and_trajectories_equal_the_recorded_ones, False),
    ],
)
def test_tests_and_fixtures_that_start_a_script_are_found(test: Callable[..., None], starts: bool) -> None:
    assert starts_script(test) == starts
