"""Start the server and print its URL, or write one run as a page."""

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import socket
import sys
import threading
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from browser.core.options import BrowserOptions
from browser.core.qr_code import draw_code
from browser.core.server_state import ServerSettings
from browser.core.tokens import PageToken, PrintedWord, Ticket, choose_account_port, select_token
from browser.jobs.jobs import JobQueue, UnknownJobsError, open_queue
from browser.runs.run_views import export_run
from browser.runs.runs import RUNNING, Runs
from modules.console import format_count
from modules.errors import OutputError
from modules.installation import FROM_QUEUE, ROOT
from modules.screen import has_screen
from modules.text_files import real_path
from project.options import MODELS

logger = logging.getLogger(__name__)

DEFAULT_FOLDER = "Reelsmith"  # folder in the home folder


class ServedFolders(NamedTuple):
    """The folders with runs that a server shows, and its models folder."""

    folders: tuple[Path, ...]
    models: Path


@dataclass(frozen=True)
class ServerAddress:
    """Where browsers find a server: at its host and port, or at its name for this start only."""

    options: BrowserOptions
    port: int
    start_name: str = ""  # "" if the server keeps its name

    def format(self, word: str | None) -> str:
        """Return the URL under which all machines that can reach the server open the page.

        `word` is the token, or a word that admits one browser; None to leave it out.
        """
        if self.options.public_origin is not None:
            url = f"{self.options.public_origin}/"
            return f"{url}?token={word}" if word else url
        host = self.start_name or self.options.host
        if host in ("0.0.0.0", "::", ""):  # the address that this machine has in its network
            host = socket.gethostname()
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
                # an address for documentation (RFC 5737): connecting a UDP socket sends nothing, but binds it
                # to the interface that leads outside
                probe.connect(("192.0.2.1", 9))
                host = str(probe.getsockname()[0])
        if ":" in host:  # an IPv6 address
            host = f"[{host}]"
        url = f"http://{host}:{self.port}/"
        return f"{url}?token={word}" if word else url

    def log_next(self, word: str) -> None:
        """Log the URL with the word for one more browser, since the last word was used."""
        if FROM_QUEUE not in os.environ:  # pages show the output of a job
            logger.info("For another browser: %s", self.format(word))


def run_browser(options: BrowserOptions) -> None:
    """Serve the pages until Ctrl-C, or only write one page with --export. Raises UserError on failure."""
    served = select_folders(options, Path.cwd(), ROOT)
    runs = Runs(served.folders)
    if options.export is None:
        serve_pages(options, runs, served.models)
        return

    export_run(runs, options.export)
    logger.info("wrote %s", options.export)


def serve_pages(options: BrowserOptions, runs: Runs, models: Path) -> None:
    """Serve the pages until Ctrl-C. Raises UserError on failure.

    1. Open the socket, continue the queue, and print the URL.
    2. Open the URL in the user's web browser if possible, and serve until Ctrl-C.
    """
    token = select_token(options)
    # imported here, so that --export and errors in options need no web server
    import uvicorn

    from browser.core.server import make_app

    keeps_name = options.token is not None or options.public_origin is not None or not options.is_local
    has_names = sys.platform != "darwin"  # Safari finds no names below localhost
    port = options.port
    if port is None and not (has_names or keeps_name):
        port = 0  # another port is another origin too
    server_socket = open_socket(options.host, port)
    start_name = make_start_name() if has_names and not keeps_name else ""
    address = ServerAddress(options, port=server_socket.getsockname()[1], start_name=start_name)
    queue = start_queue(runs, options)
    word = None
    if not keeps_name and token.secret is not None:
        word = PrintedWord(address.log_next)
    show_address(address, token, word)
    log_runs(runs)
    ticket = Ticket()
    app: Any = make_app(
        runs,
        host=options.host,
        token=token.secret,
        read_only=options.read_only,
        queue=queue,
        models=models,
        settings=_make_settings(ServerAddress(options, address.port), token),
        ticket=ticket,
        word=word,
        start_name=start_name,
    )
    if may_open_page(options):
        # all users can read that browser's command line: it gets a one-time secret, not the token
        ticket_address = address.format(token.secret and ticket.secret)
        # in a thread, because some browsers block the calling process; the socket is already listening
        threading.Thread(target=webbrowser.open, args=(ticket_address,), daemon=True).start()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(uvicorn.Server(make_server_config(app)).serve(sockets=[server_socket]))
    finally:  # the next start continues an open queue
        queue.end_work()


def make_server_config(app: Any, log_level: str = "warning") -> Any:
    """Return the settings of the web server."""
    import uvicorn  # only to serve

    return uvicorn.Config(
        app,
        log_level=log_level,
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,  # who asks is known by the connection: other accounts can send any header
    )


def _make_settings(address: ServerAddress, token: PageToken) -> ServerSettings:
    """Return the settings with which the server was started, as its pages show them."""
    options = address.options
    return ServerSettings(
        host=options.host,
        port=address.port,
        token=token,
        is_token_given=options.token is not None,
        is_local=options.is_local,
        address=address.format(token.secret),
        public_origin=options.public_origin,
    )


def start_queue(runs: Runs, options: BrowserOptions) -> JobQueue:
    """Open the queue, and start it with --work, or if it was running when its last server ended."""
    queue = open_queue(runs, options.read_only)
    if options.work:
        queue.begin_work(stays_open=False)
    elif not options.read_only and reopen_queue(queue):
        logger.info("The queue goes on, as it was started and not paused. Its page pauses it.")
    return queue


def reopen_queue(queue: JobQueue) -> bool:
    """Start a queue that was running when its last server ended, and return whether it was started.

    If jobs that the user does not know were added to its files, the queue stays paused, with a log message.
    """
    try:
        if queue.is_open:
            queue.begin_work(only_known=True)
            return True
    except UnknownJobsError as error:
        queue.problem = str(error)
        logger.warning("%s", error)
    except OutputError as error:  # another server runs the queue, or a file is damaged
        logger.debug("the queue is not started: %s", error)
    return False


def select_folders(options: BrowserOptions, working_folder: Path, checkout: Path) -> ServedFolders:
    """Return the root folders to serve, and the models folder.

    If the working folder is the home folder or the checkout, it is replaced by HOME/Reelsmith, because these
    two folders contain other files than runs.

    Args:
        checkout: The program's own folder.
    """
    home = Path.home()
    is_home = real_path(working_folder) == real_path(home)
    is_checkout = real_path(working_folder) == real_path(checkout)
    names_folder = options.folders != (Path(),) or options.export is not None
    if names_folder or not (is_home or is_checkout):
        return ServedFolders(options.folders, options.models)
    default = home / DEFAULT_FOLDER
    note = "" if default.is_dir() else ", which is made when something is written"
    logger.info("The folder is %s%s. Type the path of another one to show that.", default, note)
    uses_default_models = is_home and options.models == MODELS and not (working_folder / MODELS).is_dir()
    return ServedFolders((default,), default / MODELS if uses_default_models else options.models)


def may_open_page(options: BrowserOptions) -> bool:
    """Return whether to open a web browser: a person typed the command at a machine with a screen."""
    is_typed = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    is_by_hand = is_typed and FROM_QUEUE not in os.environ
    return options.is_local and not options.no_open and is_by_hand and has_screen()


def log_runs(runs: Runs) -> None:
    """Log the number of runs, and how many of them are running."""
    states = [run.state for run in runs.list_all()]
    count = format_count(len(states), "run")
    logger.info("%s, %d running. Ctrl-C ends this page, and no run.", count, states.count(RUNNING))


def open_socket(host: str, port: int | None) -> socket.socket:
    """Return a listening socket. If `port` is None, use the account's port, or any free port if it is taken.

    Raises OutputError if the address cannot be used.
    """
    if port is not None:
        return _open_port(host, port)
    try:
        return _open_port(host, choose_account_port())
    except OutputError as error:
        if not _is_port_taken(error.__context__):
            raise
    return _open_port(host, 0)


def _open_port(host: str, port: int) -> socket.socket:
    """Return a socket that listens at a port; 0 stands for any free port. Raises OutputError if it cannot."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = addresses[0]
        return socket.create_server(address[:2], family=family)  # host and port; IPv6 has two more values
    except OSError as error:
        is_taken = _is_port_taken(error)
        hint = ""
        if is_taken:
            with _open_port(host, 0) as free_socket:
                hint = f". Port {free_socket.getsockname()[1]} is free; --port 0 takes any that is"
        reason = os.strerror(errno.EADDRINUSE) if is_taken else error.strerror or error
        raise OutputError(f"--host {host} --port {port} cannot be used: {reason}{hint}") from None


def _is_port_taken(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EADDRINUSE


def make_start_name() -> str:
    """Return a host name of this machine that no server here had before: browsers keep nothing for it.

    Browsers resolve names below localhost to this machine by themselves (RFC 6761).
    """
    return f"{secrets.token_hex(6)}.localhost"


def show_address(address: ServerAddress, token: PageToken, word: PrintedWord | None = None) -> None:
    """Print the URL, with a QR code for phones if other machines can reach the server.

    In a queued job, pages show the output as a log, so the URL is printed without the token.
    """
    if FROM_QUEUE in os.environ:
        hint = "" if token.path is None else f" followed by ?token= and the word in {token.path}"
        sys.stdout.write(f"{address.format(None)}{hint}\n")
        sys.stdout.flush()
        return
    url = address.format(token.secret if word is None else word.secret)
    sys.stdout.write(f"{url}\n")
    if not address.options.is_local or address.options.public_origin is not None:
        sys.stdout.write(draw_code(url))
    sys.stdout.flush()
