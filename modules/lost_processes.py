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

SIGNS = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset)|[Bb]roken pipe|[Ss]ocket")
KEY = "reelsmith/others"  # key in the shared store: port of process 0, and a password
HERE, OVER, LOST = "here", "over", "lost"  # first words of lines
ASKED, ANSWERED = "reelsmith/asked", "reelsmith/answered"  # keys of `reconnect`
PAUSE = 0.1  # seconds until a question is repeated
KILLED, SILENT = "killed", "silent"
AGAIN = "Start the same command again."


class Pace(NamedTuple):
    """Intervals and time limits for watching the other processes of a run."""

    beat: float = 5.0  # seconds between two heartbeats
    silence: float = 60.0  # seconds without a heartbeat; long, as C code may hold the GIL
    grace: float = 5.0  # seconds to wait for a more specific error


DEFAULT = Pace()


class LostProcessError(UserError):
    """Another process of the run was lost."""


class OtherProcesses:
    """The other processes of a run, watched until the block ends."""

    def __init__(self, rank: int, count: int, pace: Pace = DEFAULT) -> None:
        """Connect the processes; all of them must call it.

        Raises:
            UserError: If a process cannot be reached.
        """
        self.advice: Callable[[], str] = lambda: AGAIN
        # called before a thread ends this process, with what is printed
        self.at_end: Callable[[str], None] = lambda _: None
        self._rank, self._pace = rank, pace
        self._lost: tuple[int, str] | None = None  # number of the lost process, and how it was lost
        self._noticed, self._over = threading.Event(), threading.Event()
        self._links = _connect(rank, count, pace)
        for linked_rank, link in self._links.items():
            threading.Thread(target=self._listen, args=(linked_rank, link), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def __enter__(self) -> "OtherProcesses":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if error is None:  # on an error, the others notice the broken connection
            self._send(OVER)
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)  # not close(), because its thread is reading

    @contextlib.contextmanager
    def explain(self) -> Iterator[None]:
        """Raise LostProcessError in place of torch's error if another process was lost.

        One process of each machine raises LostProcessError; the others raise SystemExit.
        """
        try:
            yield
        except BaseException as error:
            # errors of torch's communication, known by their class or by their words
            is_of_processes = isinstance(error, distributed.DistError) or (
                isinstance(error, RuntimeError) and SIGNS.search(str(error)) is not None
            )
            if is_of_processes:
                self._noticed.wait(self._pace.grace)
            self._over.set()  # from now on, this thread ends the process
            if not is_of_processes:
                raise
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # report before a launcher's signal ends it
            if not self._prints_error:
                raise SystemExit(LostProcessError.exit_code) from None
            summary = shorten((str(error) or type(error).__name__).splitlines()[0], 160)
            raise LostProcessError(self._describe(f" torch says: {summary}")) from None

    def _beat(self) -> None:
        while not self._over.wait(self._pace.beat):
            self._send(HERE)

    def _send(self, line: str) -> None:
        for link in self._links.values():
            with contextlib.suppress(OSError):  # its reading thread notices
                link.sendall(f"{line}\n".encode())

    def _listen(self, rank: int, link: socket.socket) -> None:
        """Read what another process sends until it is done or lost."""
        missed, unfinished = 0, b""
        link.settimeout(self._pace.beat)
        # counted in waits, not by a clock: a group that is stopped as a whole, by Ctrl-Z, continues later
        while missed * self._pace.beat < self._pace.silence:
            try:
                received = link.recv(1024)
            except TimeoutError:
                missed += 1
                continue
            except OSError:
                received = b""
            if not received:
                return self._end(rank, KILLED)
            missed = 0
            *lines, unfinished = (unfinished + received).split(b"\n")
            # a line is a word, and after `LOST` the number of the lost process and how it was lost
            for word, *words in (line.decode().split() for line in lines):
                if word == OVER:  # that process is done
                    return None
                if word == LOST:
                    return self._end(int(words[0]), words[1])
        return self._end(rank, SILENT)

    def _end(self, lost: int, how: str) -> None:
        """End this process because process `lost` was lost, unless it ends by itself first.

        `how` is `KILLED` or `SILENT`.
        """
        if self._over.is_set() or self._noticed.is_set():
            return
        self._lost = lost, how
        self._noticed.set()
        if self._rank == 0:
            self._send(f"{LOST} {lost} {how}")
        if self._over.wait(self._pace.grace):
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
        local = int(os.environ.get("LOCAL_RANK", "0"))
        is_lost = self._lost is not None and self._lost[0] == self._rank - local
        return local == int(is_lost)

    def _describe(self, tail: str = "") -> str:
        """Return a message with the reason why the run stops, then `tail`, then advice on how to continue."""
        text = "another process of this run was lost: it was killed, or ended by an error"
        if self._lost is not None:
            lost, how = self._lost
            text = f"process {lost} (counted from 0) "
            if how == SILENT:
                text += (
                    f"has not answered for {self._pace.silence:g} seconds: it is stopped, or its machine "
                    "cannot be reached"
                )
            else:
                text += "was lost: it was killed, for example because memory was full, or ended by an error"
        try:
            advice = self.advice()
        except OSError:  # the working folder vanished with its machine
            advice = AGAIN
        return f"{text}. The run cannot continue without it; what was saved is untouched.{tail}\n  {advice}"


def reconnect(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make processes that torchrun may restart meet at a port that no earlier attempt has used.

    torch 2.13 keeps one store for all attempts, with addresses of processes that died (pytorch#135712), and
    machines may count different numbers of attempts. So each process sends a random word to process 0. All
    processes must call this function before they join.
    """
    may_restart = environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not may_restart:
        return
    rank = int(environment["RANK"])
    count = int(environment["WORLD_SIZE"])
    store = distributed.TCPStore(  # type: ignore[attr-defined]
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
    )
    if rank == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            port = str(free.getsockname()[1])
        keys = [f"{ASKED}/{rank}" for rank in range(1, count)]
        for key in keys:  # from an earlier attempt; other processes ask again
            store.delete_key(key)
        for key in keys:
            store.set(f"{ANSWERED}/{store.get(key).decode()}", port)
    else:
        word = secrets.token_hex(8)
        answer = f"{ANSWERED}/{word}"
        while not store.check([answer]):
            store.set(f"{ASKED}/{rank}", word)
            time.sleep(PAUSE)
        port = store.get(answer).decode()
    # so process 0 opens a store of its own at the new port
    environment.update(MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="False")


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
        # tells the other processes where to connect, and with which password
        store.set(KEY, f"{server.getsockname()[1]} {password}")
        server.settimeout(pace.silence)
        return _accept_all(server, password, count, pace)


def _reach_first(rank: int, host: str, store: Any, pace: Pace) -> socket.socket:
    """Connect to process 0 and send it this process's rank."""
    port, password = store.get(KEY).decode().split()
    try:
        link = socket.create_connection((host, int(port)), pace.silence)
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
        link.settimeout(pace.grace)
        with contextlib.suppress(OSError):
            greeting = link.recv(len(password) + 7).decode("latin-1")  # password, a blank, rank
            password_received, _, rank_received = greeting.partition(" ")
            if password_received == password:
                links[int(rank_received)] = link
    return links
