"""Ask the driver for the graphics cards of this machine, their memory and temperature."""

import subprocess
import threading
import time
from dataclasses import dataclass

PATIENCE = 1.0  # seconds for the driver's answer
PAUSE_SECONDS = 60.0  # pause after a failed call
QUERY = "--query-gpu=name,memory.used,memory.total,temperature.gpu"


@dataclass(frozen=True)
class GraphicsCard:
    """A GPU, as nvidia-smi describes it."""

    name: str
    used_gib: float | None  # None: it shares the machine's memory
    total_gib: float | None
    temperature: int | None  # Celsius

    @property
    def summary(self) -> str:
        """Name, used and total memory, and temperature of the card, as far as known."""
        words = self.name
        if self.used_gib is not None and self.total_gib is not None:
            words += f", {self.used_gib:.1f} of {self.total_gib:.1f} GiB"
        return words if self.temperature is None else f"{words}, {self.temperature} °C"


class CardReader:
    """Reads the state of the GPUs by running nvidia-smi, if it is installed, every few seconds."""

    def __init__(self, program: str | None) -> None:
        """Use nvidia-smi at the path `program`; None if it is not installed."""
        self.program = program
        self._cards: list[GraphicsCard] = []
        self._next = 0.0  # when the driver is queried again
        self._lock = threading.Lock()

    def read(self) -> list[GraphicsCard]:
        """Return the GPUs as nvidia-smi last reported them. At most one query runs at a time."""
        program = self.program
        if program is None or time.monotonic() < self._next or not self._lock.acquire(blocking=False):
            return self._cards
        try:
            words = [program, QUERY, "--format=csv,noheader,nounits"]
            done = subprocess.run(
                words, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=True
            )
            self._cards = read_cards(done.stdout)
            pause = EVERY_SECONDS
        except (OSError, subprocess.SubprocessError):
            pause = PAUSE_SECONDS
        finally:
            self._lock.release()
        self._next = time.monotonic() + pause
        return self._cards


def read_cards(text: str) -> list[GraphicsCard]:
    """Parse nvidia-smi's output lines `name, used MiB, total MiB, temperature`; ignore other lines."""
    cards = []
    for line in text.splitlines():
        # split from the right: the name of a card may contain commas
        name, *cells = [cell.strip() for cell in line.rsplit(",", 3)]
        if len(cells) != 3:
            continue
        used, total, temperature = [int(cell) if cell.isdecimal() else None for cell in cells]
        cards.append(
            GraphicsCard(
                name=name,
                used_gib=None if used is None else used / 1024,
                total_gib=None if total is None else total / 1024,
                temperature=temperature,
            )
        )
    return cards


EVERY_SECONDS = 4.0  # pages ask every five seconds; all share one answer
