"""Start the server and show its address, or write one run as a page."""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import sys
from typing import Any

from browser.jobs import open_queue
from browser.options import USUAL_PORT, BrowserOptions
from browser.runs import RUNNING, Runs
from modules.console import count_of
from modules.errors import InstallationError, OutputError
from modules.installation import install_words

logger = logging.getLogger(__name__)


def run_browser(options: BrowserOptions) -> None:
    """Serve pages until Ctrl-C, or write the page that --export asks for. Raises UserError if that fails."""
    runs = Runs(options.folders)
    if options.export is not None:
        from browser.views import export_run

        export_run(runs, options.export)
        logger.info("wrote %s", options.export)
        return
    token = options.read_token()
    try:
        import starlette  # noqa: F401
        import uvicorn

        from browser.server import make_app
    except ImportError as error:
        raise InstallationError(
            f"{error.name} is not installed, and the browser needs it: {install_words('browser')}"
        ) from None
    listener = open_socket(options.host, options.port)
    port = listener.getsockname()[1]
    queue = open_queue(runs, options.read_only)
    if options.work:
        queue.begin_work()
    show_address(options, port, token)
    log_runs(runs)
    app: Any = make_app(
        runs,
        host=options.host,
        token=token,
        read_only=options.read_only,
        queue=queue,
        models=options.models,
    )
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, lifespan="off", ws="none"
    )
    try:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))
    finally:
        queue.end_work()


def log_runs(runs: Runs) -> None:
    """Log how many runs there are, and how many of them are running."""
    states = [run.state for run in runs.list_all()]
    count = count_of(len(states), "run")
    logger.info("%s, %d running. Ctrl-C ends this page, and no run.", count, states.count(RUNNING))


def open_socket(host: str, port: int | None) -> socket.socket:
    """Return a listening socket. port: None means USUAL_PORT, or any free port if that is taken.

    Raises OutputError if the address cannot be used.
    """
    if port is None:
        try:
            return open_socket(host, USUAL_PORT)
        except OutputError as error:
            if not _is_taken(error.__context__):
                raise
            logger.info(
                "Port %d is taken, so this is another one: an old bookmark leads elsewhere.", USUAL_PORT
            )
            port = 0
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        kind, *_, address = addresses[0]
        return socket.create_server(address[:2], family=kind)
    except OSError as error:
        hint = ""
        if _is_taken(error):
            with open_socket(host, 0) as free:
                hint = f". Port {free.getsockname()[1]} is free; --port 0 takes any that is"
        reason = os.strerror(errno.EADDRINUSE) if _is_taken(error) else error.strerror or error
        raise OutputError(f"--host {host} --port {port} cannot be used: {reason}{hint}") from None


def _is_taken(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EADDRINUSE


def show_address(options: BrowserOptions, port: int, token: str | None) -> None:
    """Print the address, with a QR code for phones if other machines can reach the server."""
    host = options.host
    if host in ("0.0.0.0", "::", ""):  # the address that this machine has in its network
        host = socket.gethostname()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            probe.connect(("192.0.2.1", 9))  # nothing is sent
            host = str(probe.getsockname()[0])
    if ":" in host:
        host = f"[{host}]"
    url = f"http://{host}:{port}/"
    if token:
        url += f"?token={token}"
    sys.stdout.write(f"{url}\n")
    if not options.is_local:
        sys.stdout.write(draw_code(url))
    sys.stdout.flush()


def draw_code(text: str) -> str:
    """Return a QR code of a text as lines of half blocks, dark on light in any terminal."""
    import cv2
    import numpy as np

    cells = np.pad(cv2.QRCodeEncoder.create().encode(text) > 0, 2, constant_values=True)
    cells = np.pad(cells, ((0, len(cells) % 2), (0, 0)), constant_values=True)
    blocks = {(True, True): " ", (True, False): "\u2584", (False, True): "\u2580", (False, False): "\u2588"}
    code = ""
    for upper_row, lower_row in zip(cells[::2], cells[1::2], strict=True):
        pairs = zip(upper_row, lower_row, strict=True)
        line = "".join(blocks[bool(upper), bool(lower)] for upper, lower in pairs)
        code += f"\033[30;107m{line}\033[0m\n"
    return code
