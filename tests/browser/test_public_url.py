"""The page behind a tunnel or a proxy with HTTPS: --public_url."""

from pathlib import Path

import pytest

from browser.core.options import BrowserOptions
from browser.core.server_state import ServerSettings
from browser.core.serving import ServerAddress, show_address
from browser.core.tokens import PageToken
from modules.errors import OptionError
from modules.script_options import parse_options
from tests.browser.entering import enter
from tests.browser.serving import serve_runs

WORD = "a-secret-word-of-letters"
OUTSIDE = "https://my-page.example.org"
HOST = "my-page.example.org"


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://my-page.example.org/", OUTSIDE),
        ("https://My-Page.example.org:443", OUTSIDE),
        ("http://10.0.0.2:9000", "http://10.0.0.2:9000"),
        ("https://[2001:db8::1]:8443", "https://[2001:db8::1]:8443"),
    ],
)
def test_the_origin_is_what_browsers_send(url: str, origin: str) -> None:
    assert BrowserOptions(public_url=url).public_origin == origin


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--public_url", "my-page.example.org"], "pass an address such as https://"),
        (["--public_url", "ftp://my-page.example.org"], "pass an address such as https://"),
        (["--public_url", "https://"], "pass an address such as https://"),
        (["--public_url", "https://a@b.example.org"], "pass an address such as https://"),
        (["--public_url", "https://b.example.org:99999"], "pass an address such as https://"),
        (["--public_url", f"{OUTSIDE}/page"], f"a host name of its own, .* Pass {OUTSIDE}, and let"),
        (["--public_url", OUTSIDE, "--no_token"], "lets others in: omit --no_token"),
    ],
)
def test_addresses_that_no_page_can_have_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_options(None, words, BrowserOptions)


def test_the_printed_address_is_the_one_from_outside(capsys: pytest.CaptureFixture[str]) -> None:
    show_address(ServerAddress(BrowserOptions(public_url=OUTSIDE), 8765), PageToken(WORD))
    address, *code = capsys.readouterr().out.splitlines()
    assert address == f"{OUTSIDE}/?token={WORD}"
    assert len(code) > 10  # for phones


def test_pages_and_forms_pass_a_proxy_and_the_cookie_is_sent_encrypted_only(tmp_path: Path) -> None:
    settings = ServerSettings(public_origin=OUTSIDE, token=PageToken(WORD))
    with serve_runs(tmp_path, token=WORD, settings=settings) as served:
        assert "; Secure" in served.ask(f"/?token={WORD}", Host=HOST).headers["set-cookie"]
        assert "; Secure" not in served.ask(f"/?token={WORD}").headers["set-cookie"]
        browser = enter(served, WORD, Host=HOST)

        assert browser.ask("/settings", Host=HOST).status == 200
        for host in (HOST, f"127.0.0.1:{served.port}"):  # as it is reached, or as the proxy reaches it
            answer = browser.ask("/settings/pause", "POST", "x=1", Host=host, Origin=OUTSIDE)
            assert answer.headers["hx-redirect"] == f"{browser.root}/settings", answer.text
        assert served.ask("/settings", Host=HOST).status == 401
        assert browser.ask("/settings", Host="evil.example.org").status == 421
        evil = browser.ask("/settings/pause", "POST", "x=1", Host=HOST, Origin="https://evil.example")
        assert evil.status == 403
        assert f"--public_url {OUTSIDE}" in browser.ask("/settings").text
    with serve_runs(tmp_path, token=WORD) as served:
        assert served.ask(f"/?token={WORD}", Host=HOST).status == 421
