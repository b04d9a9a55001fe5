"""How this server was started, for the page that shows it."""

from dataclasses import dataclass

from browser.tokens import PageToken


@dataclass(frozen=True)
class ServerSettings:
    """Hold the options of a running server. The token's text is in the address alone."""

    host: str = "127.0.0.1"
    port: int | None = None  # None: it is not known
    token: PageToken = PageToken(None)
    is_token_given: bool = False  # by --token; else the page has made it
    is_local: bool = True  # only this machine can reach it
    address: str = ""  # that other devices open, with the token
