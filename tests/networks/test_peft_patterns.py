"""Module names against keys of PEFT's `alpha_pattern`, compared with PEFT itself."""

import time

import pytest
from peft.utils.other import get_pattern_key

from networks.metadata import MAX_EXPRESSIONS, PeftPatterns

PATHS = [
    *("blocks.0.attn1.to_q", "blocks.10.attn2.to_out.0", "blocks.3.ffn.net.0.proj", "blocks.1.ffn.net.2"),
    *("to_q", "attn1.to_q", "xto_q", "proj_out", "blocks.0.attn1.add_k_proj", "blocks.2.a_b.to_q"),
]
KEYS = [
    *("to_q", "attn1.to_q", "ffn.net.2", "net.0.proj", "q", "blocks.0.attn1.to_q", "proj_out", "a-b"),
    *(
        r".*attn.*to_q",
        r"^blocks\.0\..*",
        r"^to_q$",
        r"(attn1|attn2)\.to_(q|out\.0)",
        r"blocks\.[0-3]\..*$",
        r"[^x]*to_q",
    ),
    *(
        r".*\.ffn\.net\.(0\.proj|2)",
        r"to_q|to_k",
        r"(?:a|b|\.)+.*",
        r"(a+)+c?",
        r"x?to_q",
        r"\w+",
        r".*",
        r".*?q",
    ),
    *(r"blocks\.\d+\.attn\d.*", r"blocks\.\D.*", r"blocks.[\d].*", r"(|x)to_q", r".*_[a-z]"),
]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_matches_what_peft_matches(key: str) -> None:
    patterns = PeftPatterns({key: 3.0})
    assert [patterns.find(path) for path in PATHS] == [
        3.0 if get_pattern_key([key], path) == key else None for path in PATHS
    ]


def test_the_first_of_several_keys_counts_as_in_peft() -> None:
    keys = ["attn2.to_out.0", ".*attn1.*", "to_q", "blocks.0.attn1.to_q", ".*"]
    for turned in (keys, keys[::-1]):
        patterns = PeftPatterns({key: float(index) for index, key in enumerate(turned)})
        assert [patterns.find(path) for path in PATHS] == [
            turned.index(get_pattern_key(turned, path)) for path in PATHS
        ]


@pytest.mark.parametrize("key", ["(", "[", "a**", ")", "x(", "*"])
def test_what_is_no_expression_is_named(key: str) -> None:
    with pytest.raises(ValueError, match="is no regular expression"):
        PeftPatterns({key: 1.0})


def test_a_hostile_expression_ends_soon() -> None:
    start = time.perf_counter()
    # Python's `re` would need longer than the universe is old
    with pytest.raises(ValueError, match="takes too long"):
        PeftPatterns({r"(a|aa)+[bc]": 1.0}).find("a" * 900)
    assert time.perf_counter() - start < 10


def test_too_many_expressions_are_refused() -> None:
    with pytest.raises(ValueError, match=f"more than {MAX_EXPRESSIONS} characters"):
        PeftPatterns({f".*{number}": 1.0 for number in range(MAX_EXPRESSIONS)})
    assert (
        PeftPatterns({f"blocks.{number}": 1.0 for number in range(MAX_EXPRESSIONS)}).find("x.blocks.7") == 1.0
    )
