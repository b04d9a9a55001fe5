"""The list of mutants fits the code."""

from tests.mutants import ROOT, read_mutants


def test_every_mutant_has_its_place_and_its_tests() -> None:
    mutants = read_mutants()
    assert len({each.name for each in mutants}) == len(mutants) >= 40
    for mutant in mutants:
        mutant.changed(ROOT)  # raises if its place is gone
        assert all((ROOT / test).exists() for test in mutant.tests), mutant.tests
