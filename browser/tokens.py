"""The secret word of the page: who has it may use the page, and nobody else.

Without --token the page makes one, as the ports of a machine are open to all of its accounts. It is kept for
this user alone, so that bookmarks and cookies hold when the page is started again.
"""

import ipaddress
import logging
import os
import secrets
import stat
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from browser.options import WORD, BrowserOptions
from modules.user_files import read_user_file, user_folder, write_user_file

logger = logging.getLogger(__name__)

FILE = "page_token"  # of the user
TICKET_SECONDS = 120.0  # that a browser may take to start
_SOCKETS = Path("/proc/net")  # of Linux: who has which connection


@dataclass(frozen=True)
class PageToken:
    """The word of a server, and where it lies."""

    word: str | None  # None: everybody who reaches the port may use the page
    place: Path | None = None  # None: it is kept nowhere


def choose_token(options: BrowserOptions) -> PageToken:
    """Return the word of --token, or the user's own. Raises OptionError as `BrowserOptions.read_token`."""
    if options.token is not None:
        word = options.read_token()
        if os.name != "nt" and stat.S_IMODE(options.token.stat().st_mode) & 0o077:
            warning = "--token %s: other users of this machine can read it. Run: chmod 600 %s"
            logger.warning(warning, options.token, options.token)
        return PageToken(word, options.token)
    if options.no_token:
        return PageToken(None)
    return _own_token()


def _own_token() -> PageToken:
    """Return the user's word, which is made at the first start."""
    word = (read_user_file(FILE) or "").strip()
    if not WORD.fullmatch(word):
        try:
            write_user_file(FILE, f"{secrets.token_urlsafe(32)}\n")
        except OSError as error:
            logger.info("The token is new at each start, as it cannot be kept: %s", error)
            return PageToken(secrets.token_urlsafe(32))
        word = (read_user_file(FILE) or "").strip()  # another page may have been faster
    if not WORD.fullmatch(word):
        return PageToken(secrets.token_urlsafe(32))
    return PageToken(word, user_folder() / FILE)


@dataclass
class Ticket:
    """A word that opens the page once, for the web browser that this program starts.

    The command line of that browser is shown to all users of the machine, so it must not have the token.
    """

    word: str = field(default_factory=secrets.token_urlsafe)
    end: float = field(default_factory=lambda: time.monotonic() + TICKET_SECONDS)
    is_used: bool = False

    def take(self, word: str, client: tuple[str, int] | None) -> bool:
        """Return whether a word is the ticket and still valid, and end its validity.

        client: address and port of the connection; it has to be this user's where the system can tell.
        """
        if self.is_used or time.monotonic() > self.end:
            return False
        if not secrets.compare_digest(word.encode(), self.word.encode()):
            return False
        self.is_used = True
        return client is not None and is_own_connection(*client)


def is_own_connection(host: str, port: int) -> bool:
    """Return whether this user has opened a connection from a port of this machine.

    True also where the system does not show that: there it does not show command lines either.
    """
    if not sys.platform.startswith("linux"):
        return True
    addresses = [host] if ":" in host else [host, f"::ffff:{host}"]
    wanted = [f"{_hexadecimal(address)}:{port:04X}" for address in addresses]
    for name in ("tcp", "tcp6"):
        try:
            lines = (_SOCKETS / name).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            words = line.split()  # number, local address, remote address, state, ..., user
            if words[1] in wanted:
                return int(words[7]) == os.getuid()
    return False


def _hexadecimal(host: str) -> str:
    """Return an address as Linux lists it: words of 32 bits in the order of the machine."""
    packed = ipaddress.ip_address(host).packed
    words = [packed[place : place + 4] for place in range(0, len(packed), 4)]
    return "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)
