"""Notice that another process of a run died or stopped, and end this one with a message.

    with OtherProcesses(rank, count) as others:  # in every process, after they have joined
        others.advice = ...  # how to continue
        with others.explain():
            ...  # passes that need all processes

Process 0 has a connection to each of the others, and both ends send a line every few seconds. A connection
that breaks means that the process ended; a silent one, that the process is stopped or unreachable.
Threads do this, so that a long pass, a compilation or a save counts as life, and a process that waits for the
others in C++, where no exception reaches it, ends too.
"""

import contextlib
import os
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from types import TracebackType
from typing import Any, NamedTuple

from torch import distributed
from torch.distributed import distributed_c10d

from modules.command import plain_message
from modules.control_codes import shorten
from modules.errors import UserError

COMMUNICATION_ERRORS = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset)|[Bb]roken pipe|[Ss]ocket")
ADDRESS_KEY = "reelsmith/others"  # key in the shared store: port of process 0, and a password
HEARTBEAT, DONE, LOST = "here", "over", "lost"  # first words of lines
PORT_REQUEST, PORT_ANSWER = "reelsmith/asked", "reelsmith/answered"  # keys of `reconnect`
PAUSE = 0.1  # seconds until a question is repeated
KILLED, SILENT = "killed", "silent"
DEFAULT_ADVICE = "Start the same command again."


class Pace(NamedTuple):
    """Intervals and timeouts for watching the other processes of a run."""

    heartbeat_seconds: float = 5.0  # seconds between two heartbeats
    timeout_seconds: float = 60.0  # seconds without a heartbeat; long, as C code may hold the GIL
    grace_seconds: float = 5.0  # seconds to wait for a more specific error


DEFAULT = Pace()


class LostProcess(NamedTuple):
    """A process that was lost (killed or silent), so that the run cannot continue."""

    rank: int
    cause: str  # KILLED or SILENT


class LostProcessError(UserError):
    """Raised if another process of the run was lost."""


class OtherProcesses:
    """Watches the other processes of a run until the block ends."""

    def __init__(self, rank: int, count: int, pace: Pace = DEFAULT) -> None:
        """Connect this process to the other processes of a distributed run; every process must do so.

        Raises:
            UserError: If a process cannot be reached.
        """
        self.advice: Callable[[], str] = lambda: DEFAULT_ADVICE  # how to continue the run
        # called before a thread ends this process, with what is printed
        self.at_end: Callable[[str], None] = lambda _: None
        self._rank, self._pace = rank, pace
        self._lost: LostProcess | None = None
        self._loss_noticed = threading.Event()
        self._has_ended = threading.Event()  # the block has ended, or the main thread ends the process
        self._connections = _connect(rank, count, pace)
        for other_rank, connection in self._connections.items():
            threading.Thread(target=self._listen, args=(other_rank, connection), daemon=True).start()
        threading.Thread(target=self._send_heartbeats, daemon=True).start()

    def __enter__(self) -> "OtherProcesses":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._has_ended.set()
        if error is None:  # on an error, the others notice the broken connection
            self._send_to_all(DONE)
        for link in self._connections.values():
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)  # not close(), because its thread is reading

    @contextlib.contextmanager
    def explain(self) -> Iterator[None]:
        """Raise LostProcessError instead of torch's error if another process was lost.

        One process of each machine raises LostProcessError; the others raise SystemExit.
        """
        try:
            yield
        except BaseException as error:
            is_communication_error = isinstance(error, distributed.DistError) or (
                isinstance(error, RuntimeError) and COMMUNICATION_ERRORS.search(str(error)) is not None
            )
            if is_communication_error:  # wait for a more specific reason from the other processes
                self._loss_noticed.wait(self._pace.grace_seconds)
            self._has_ended.set()  # from now on, this thread ends the process
            if not is_communication_error:
                raise
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # report before a launcher's signal ends it
            if not self._prints_error:
                raise SystemExit(LostProcessError.exit_code) from None
            summary = shorten((str(error) or type(error).__name__).splitlines()[0], 160)
            raise LostProcessError(self._describe(f" torch says: {summary}")) from None

    def _send_heartbeats(self) -> None:
        while not self._has_ended.wait(self._pace.heartbeat_seconds):
            self._send_to_all(HEARTBEAT)

    def _send_to_all(self, line: str) -> None:
        for link in self._connections.values():
            with contextlib.suppress(OSError):  # its reading thread notices
                link.sendall(f"{line}\n".encode())

    def _listen(self, rank: int, connection: socket.socket) -> None:
        """Receive messages of another process until it is done; if a process was lost, end this one."""
        lost = self._wait_for_loss(rank, connection)
        if lost is not None:
            self._exit_after_loss(lost)

    def _wait_for_loss(self, rank: int, connection: socket.socket) -> LostProcess | None:
        """Read the lines of a process; return which process is lost, or None if this one is done."""
        num_missed_beats = 0
        unfinished_line = b""
        connection.settimeout(self._pace.heartbeat_seconds)
        # count waits instead of reading a clock: processes that Ctrl-Z stops together can continue later
        while num_missed_beats * self._pace.heartbeat_seconds < self._pace.timeout_seconds:
            try:
                received = connection.recv(1024)
            except TimeoutError:
                num_missed_beats += 1
                continue
            except OSError:
                received = b""
            if not received:
                return LostProcess(rank, KILLED)
            num_missed_beats = 0
            *lines, unfinished_line = (unfinished_line + received).split(b"\n")
            for line in lines:
                message, *arguments = line.decode().split()
                if message == DONE:
                    return None
                if message == LOST:
                    return LostProcess(int(arguments[0]), arguments[1])
        return LostProcess(rank, SILENT)

    def _exit_after_loss(self, lost: LostProcess) -> None:
        """End this process because another one was lost, unless the main thread ends it first."""
        if self._has_ended.is_set() or self._loss_noticed.is_set():
            return
        self._lost = lost
        self._loss_noticed.set()
        if self._rank == 0:
            self._send_to_all(f"{LOST} {lost.rank} {lost.cause}")
        if self._has_ended.wait(self._pace.grace_seconds):
            return
        try:
            description = self._describe()
            if self._prints_error:
                text = plain_message(f"{LostProcessError.__name__}: {description}")
                os.write(2, f"\n{text}\n".encode())  # not sys.stderr, which the main thread may have locked
            self.at_end(description)
        finally:
            os._exit(LostProcessError.exit_code)  # the main thread waits in C++, where no exception arrives

    @property
    def _prints_error(self) -> bool:
        """Whether this is the first process of its machine, or the second one if the first was lost."""
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        is_first_lost = self._lost is not None and self._lost.rank == self._rank - local_rank
        return local_rank == int(is_first_lost)

    def _describe(self, detail: str = "") -> str:
        """Return a message with the reason why the run stops, then `detail`, then how to continue."""
        if self._lost is None:
            reason = "another process of this run was lost: it was killed, or ended by an error"
        elif self._lost.cause == SILENT:
            reason = (
                f"process {self._lost.rank} (counted from 0) has not answered for "
                f"{self._pace.timeout_seconds:g} "
                "seconds: it is stopped, or its machine cannot be reached"
            )
        else:
            reason = (
                f"process {self._lost.rank} (counted from 0) was lost: it was killed, for example because "
                "memory was full, or ended by an error"
            )
        try:
            advice = self.advice()
        except OSError:  # the working folder vanished with its machine
            advice = DEFAULT_ADVICE
        return (
            f"{reason}. The run cannot continue without it; what was saved is untouched.{detail}\n  {advice}"
        )


def reconnect(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let processes that torchrun may restart meet at a port that no earlier attempt has used.

    torch 2.13 keeps one store for all attempts, with addresses of processes that died (pytorch#135712), and
    machines may count attempts differently. So each process sends a random word to process 0, which
    answers with a free port. All processes must call this function before they join.
    """
    may_restart = environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not may_restart:
        return
    rank = int(environment["RANK"])
    store = distributed.TCPStore(  # type: ignore[attr-defined]
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
    )
    if rank == 0:
        port = _answer_port_requests(store, int(environment["WORLD_SIZE"]))
    else:
        # Send a random word to process 0 until it answers with a free port; return the port
        word = secrets.token_hex(8)
        answer_key = f"{PORT_ANSWER}/{word}"
        while not store.check([answer_key]):
            store.set(f"{PORT_REQUEST}/{rank}", word)
            time.sleep(PAUSE)
        port = str(store.get(answer_key).decode())
    # so process 0 opens a store of its own at the new port
    environment.update(MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="False")


def _answer_port_requests(store: Any, count: int) -> str:
    """Choose a free port of this machine, send it to all other processes, and return it."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    request_keys = [f"{PORT_REQUEST}/{rank}" for rank in range(1, count)]
    for key in request_keys:  # from an earlier attempt; other processes ask again
        store.delete_key(key)
    for key in request_keys:
        word = store.get(key).decode()  # waits for the request
        store.set(f"{PORT_ANSWER}/{word}", port)
    return port


def _connect(rank: int, count: int, pace: Pace) -> dict[int, socket.socket]:
    """Connect process 0 with all other processes; return the connections by rank."""
    is_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(count)  # then listen on this machine only
    host = "127.0.0.1" if is_one_machine else os.environ["MASTER_ADDR"]  # the host of torch's own store
    store = distributed_c10d._get_default_store()
    if rank > 0:
        return {0: _reach_first(rank, host, store, pace)}
    is_dual = not is_one_machine and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if is_dual else socket.AF_INET
    address = (host if is_one_machine else "", 0)
    with socket.create_server(address, family=family, backlog=count, dualstack_ipv6=is_dual) as server:
        password = secrets.token_hex(8)
        # tells the other processes where to connect, and the password to use
        store.set(ADDRESS_KEY, f"{server.getsockname()[1]} {password}")
        server.settimeout(pace.timeout_seconds)
        return _accept_all(server, password, count, pace)


def _reach_first(rank: int, host: str, store: Any, pace: Pace) -> socket.socket:
    """Connect to process 0 (at `host`), and send it this process's rank."""
    port, password = store.get(ADDRESS_KEY).decode().split()
    try:
        link = socket.create_connection((host, int(port)), pace.timeout_seconds)
    except OSError as error:
        raise UserError(
            f"process {rank} cannot reach process 0 at {host}, port {port}: {error}. The machines of a "
            "run need all ports of each other, as torch does too"
        ) from None
    link.sendall(f"{password} {rank:6}".encode())
    return link


def _accept_all(server: socket.socket, password: str, count: int, pace: Pace) -> dict[int, socket.socket]:
    """Wait for the connections of all processes but the first; return them by rank."""
    links: dict[int, socket.socket] = {}
    while len(links) < count - 1:
        try:
            link, _ = server.accept()
        except TimeoutError:
            missing = ", ".join(str(rank) for rank in range(1, count) if rank not in links)
            raise UserError(f"no connection from process {missing} (counted from 0)") from None
        link.settimeout(pace.grace_seconds)
        with contextlib.suppress(OSError):
            greeting = link.recv(len(password) + 7).decode("latin-1")  # password, a space, rank
            password_received, _, rank_received = greeting.partition(" ")
            if password_received == password:
                links[int(rank_received)] = link
    return links
