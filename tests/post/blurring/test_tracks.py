"""What is covered in pictures in which nothing was found."""

from collections.abc import Mapping, Sequence

from post.blurring.tracks import Box, Tracks

HOLD, LOOKBACK = 6, 4


def at(x: float, y: float = 50, size: float = 20) -> Box:
    return x - size / 2, y - size / 2, x + size / 2, y + size / 2


def followed(
    found: Mapping[int, Sequence[Box]], pictures: int, hold: int = HOLD, lookback: int = LOOKBACK
) -> tuple[list[list[Box]], Tracks]:
    """What is covered in each picture, asked for as late as the stage does."""
    tracks, covered = Tracks(hold, lookback), []
    delay = max(hold, lookback)
    for index in range(pictures + delay):
        if index < pictures:
            tracks.see(index, found.get(index, []))
        if index >= delay:
            covered.append(tracks.boxes(index - delay))
            tracks.forget(index - delay)
    return covered, tracks


def holds(boxes: Sequence[Box], box: Box) -> bool:
    """Whether one of the boxes covers all of a box."""
    return any(
        each[0] <= box[0] + 1e-6
        and each[1] <= box[1] + 1e-6
        and each[2] >= box[2] - 1e-6
        and each[3] >= box[3] - 1e-6
        for each in boxes
    )


def test_a_gap_between_two_sightings_is_covered_along_the_way() -> None:
    path = {index: at(20 + 12 * index) for index in range(20)}
    seen = {index: [box] for index, box in path.items() if not 8 <= index < 8 + HOLD}

    covered, tracks = followed(seen, 20)

    assert all(holds(covered[index], box) for index, box in path.items())
    assert (tracks.started, tracks.longest_gap) == (1, HOLD)


def test_something_that_stands_still_is_covered_before_and_after_it_is_found() -> None:
    covered, _ = followed({10: [at(50)], 11: [at(50)]}, 30)

    assert [index for index, boxes in enumerate(covered) if boxes] == list(
        range(10 - LOOKBACK, 11 + HOLD + 1)
    )
    assert all(holds(boxes, at(50)) for boxes in covered if boxes)


def test_something_that_moves_is_expected_to_move_on() -> None:
    path = {index: at(100 + 5 * index) for index in range(30)}

    covered, _ = followed({index: [path[index]] for index in range(10, 15)}, 30)

    for index in range(10 - LOOKBACK, 15 + HOLD):
        assert holds(covered[index], path[index])


def test_a_jump_without_overlap_covers_where_it_was_and_the_way_from_there() -> None:
    covered, tracks = followed({5: [at(50)], 8: [at(75)]}, 20)

    assert holds(covered[6], at(50))
    assert holds(covered[6], at(50 + 25 / 3))
    assert holds(covered[5 + HOLD], at(50))  # it may have been another one
    assert tracks.started == 1


def test_things_that_are_far_apart_are_not_one() -> None:
    covered, tracks = followed({5: [at(50)], 7: [at(150)]}, 30)

    assert tracks.started == 2
    assert tracks.longest_gap == 0
    assert holds(covered[5 + HOLD], at(50))
    assert holds(covered[7 + HOLD], at(150))


def test_what_is_covered_grows_with_the_time_since_something_was_seen() -> None:
    covered, _ = followed({10: [at(50)]}, 30)

    for index in (10 - LOOKBACK, 10 + HOLD):
        grown = 20 * (1 + 2 * 0.02 * abs(index - 10))
        assert holds(covered[index], at(50, size=grown))
    assert covered[10] == [at(50)]
