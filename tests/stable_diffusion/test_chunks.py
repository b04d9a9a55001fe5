import pytest
import torch

from stable_diffusion.tokenizers import (
    Chunk,
    Part,
    cut_into_chunks,
    cut_text,
    join_states,
    join_weights,
    make_rows,
    parse_weights,
)


def tokenize(text: str) -> list[int]:
    """A token for each word: its length."""
    return [len(word) for word in text.split()]


def sizes(text: str) -> list[int]:
    return [len(chunk.ids) for chunk in cut_into_chunks(parse_weights(text), tokenize)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [0]),
        ("a " * 75, [75]),
        ("a " * 76, [75, 1]),
        ("a BREAK b", [1, 1]),
        ("BREAK b", [1]),
        ("a BREAK BREAK  BREAK b BREAK ", [1, 1]),
        ("a " * 75 + "BREAK b", [75, 1]),
        ("a " * 80 + "BREAK b", [75, 5, 1]),
    ],
)
def test_break_and_the_75th_token_end_a_chunk(text: str, expected: list[int]) -> None:
    assert sizes(text) == expected


def test_tokens_have_the_weights_of_their_parts() -> None:
    chunks = cut_into_chunks([Part("a bb", 2.0), Part("ccc", 0.5, begins_chunk=True)], tokenize)
    assert chunks == [Chunk((1, 2), (2.0, 2.0)), Chunk((3,), (0.5,))]


def test_each_chunk_is_between_start_and_end_and_filled_up() -> None:
    rows = make_rows([Chunk((5, 6), (1, 1)), Chunk(tuple(range(1, 76)), (1,) * 75), Chunk()], 90, 91, 0)
    assert rows.ids.shape == (3, 77)
    assert rows.ids[0].tolist() == [90, 5, 6, 91, *[0] * 73]
    assert rows.ids[1].tolist() == [90, *range(1, 76), 91]
    assert rows.ids[2].tolist() == [90, 91, *[0] * 75]
    assert rows.ends.tolist() == [3, 76, 1]


def test_inner_start_and_end_states_are_dropped() -> None:
    states = torch.arange(3 * 77.0).view(3, 77, 1)
    joined = join_states(states)[:, 0].tolist()
    assert joined == [*range(76), *range(78, 153), *range(155, 231)]
    assert join_states(states[:1]).equal(states[0])
    chunks = [Chunk((1,), (3.0,)), Chunk((1, 1), (4.0, 5.0)), Chunk()]
    weights = join_weights(chunks)
    assert len(weights) == len(joined)
    assert {index: weight for index, weight in enumerate(weights) if weight != 1} == {
        1: 3.0,
        76: 4.0,
        77: 5.0,
    }


@pytest.mark.parametrize(
    ("text", "most", "rest"),
    [
        ("a " * 75, 1, ""),
        ("a " * 73 + "b (c d:2) e", 1, "d e"),
        ("a " * 75 + "(b c:1.5) d", 1, "b c d"),
        ("a BREAK b c", 1, "b c"),
        ("a BREAK b BREAK c", 2, "c"),
    ],
)
def test_what_is_cut_is_named(text: str, most: int, rest: str) -> None:
    assert cut_text(parse_weights(text), tokenize, most) == rest
