"""YAML of somebody else: what it means, and an end with a sentence whatever it holds."""

import time

import pytest
import yaml

from modules.yaml_files import MAX_NODES, parse_yaml


def _make_bomb(inner: str, item: str) -> str:
    lines = [f"a0: &a0 {inner}"]
    for level in range(1, 11):
        lines.append(item.format(level=level, aliases=",".join([f"*a{level - 1}"] * 10)))
    return "\n".join(lines)


HOSTILE = {
    "aliases of empty tables": _make_bomb("{}", "a{level}: &a{level} [{aliases}]"),
    "aliases of texts": _make_bomb("x", "a{level}: &a{level} [{aliases}]"),
    "merge keys": _make_bomb("{k: 1}", "a{level}: &a{level}\n  <<: [{aliases}]"),
    "an alias in itself": "a: &a [1, *a]",
    "a merge of itself": "a: &a\n  <<: *a",
    "a tag that does not fit": 'a: !!int ""',
    "a float of nothing": 'a: !!float ""',
    "no timestamp": "a: !!timestamp x",
    "no date": "a: 2001-99-99",
    "not a switch": "a: !!bool x",
    "code": "a: !!python/object/apply:os.system [x]",
    "a tag renamed": '%TAG ! tag:yaml.org,2002:\n---\na: !int ""',
    "a list as a key": "? [1, 2]\n: 3",
    "deep lists": "[" * 100_000,
    "deep tables": "{a: " * 60_000,
    "deep blocks": "- " * 50_000,
    "many items": "[" + "1," * 100_000 + "]",
    "many characters": "a: " + "x" * 300_000,
    "a long number": "a: " + "9" * 5000,
    "a long hexadecimal number": "a: 0x" + "f" * 5000,
    "a number beyond floats": "a: 0x" + "f" * 390,
    "a number to the base 60": "a: " + ":".join(["59"] * 50_000),
    "NUL": "a: \0",
    "a tab": "a:\t- b",
    "two documents": "a: 1\n---\nb: 2",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_text_ends_soon_with_a_sentence(name: str) -> None:
    begin = time.process_time()
    with pytest.raises(ValueError, match=r"\w \w") as error:
        parse_yaml(HOSTILE[name])
    assert "\n" not in str(error.value)
    assert time.process_time() - begin < 20  # aliases alone would be walked for ages


def test_a_usual_text_means_what_the_library_reads() -> None:
    text = "---\n# a job\na: &a {b: 1e-4, c: [1, 2.5, yes, null]}\nd:\n  <<: *a\n  e: 0x10\nf: 'x'\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml("") is None


def test_nodes_are_counted_with_aliases_written_out() -> None:
    half = ",".join(["1"] * (MAX_NODES // 2))
    assert len(parse_yaml(f"a: &a [{half}]")["a"]) == MAX_NODES // 2
    with pytest.raises(ValueError, match="more than 20,000 nodes"):
        parse_yaml(f"a: &a [{half}]\nb: *a\nc: 1")
