from modules.device_memory import Usage
from modules.memory_plan import GIB


def test_more_reserved_than_the_card_has_lies_in_host_memory() -> None:
    assert Usage(total=24 * GIB, free=0, reserved=26 * GIB).spills


def test_nearly_all_of_a_card_of_which_nothing_is_free_is_told_too() -> None:
    assert Usage(total=24 * GIB, free=GIB // 10, reserved=24 * GIB - GIB // 2).spills


def test_a_card_with_room_does_not_spill() -> None:
    assert not Usage(total=24 * GIB, free=2 * GIB, reserved=21 * GIB).spills
    assert not Usage(total=24 * GIB, free=2 * GIB, reserved=24 * GIB - GIB // 2).spills  # cached, the driver has room


def test_the_warning_names_numbers_and_remedies() -> None:
    line = Usage(total=24 * GIB, free=0, reserved=26 * GIB).warning
    assert "26.00 of 24.00 GiB" in line
    assert "--blocks_to_swap" in line
