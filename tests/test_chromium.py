"""The browser of the tests is started once for files that follow each other, and is gone for all others."""

import tests.browser.test_light
from tests import chromium, test_tiers


def test_files_that_open_pages_are_known() -> None:
    assert chromium.is_used_by(tests.browser.test_light)
    assert not chromium.is_used_by(test_tiers)
    assert not chromium.is_used_by(None)
