"""A CUDA device on a CPU build of torch: as strict as a GPU, with the CPU's numbers.

`device.cpp` registers kernels for torch's CUDA dispatch key, which check their operands as CUDA's do and
compute on the CPU. Here torch is told that the device is there. Emulated: mixed devices raise, tensors of
the device have no NumPy arrays, generators belong to a device, matrix products have no integers, eight-bit
floats can only be copied and moved; autograd runs in the device's own thread; memory is counted. What makes
the host wait is recorded with its place. Not emulated: the order of streams, kernels' choice and rounding,
time.

Torch asks for some of this only once, while it is imported, so a process either has the device from its
start or never: call `load` of `loading.py` before it imports torch, as `run.py` does.
"""

import ctypes
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.emulated_cuda.loading import ROOT, load

GIB = 1 << 30
TOTAL_BYTES = 16 * GIB


@dataclass(frozen=True)
class Wait:
    """A moment at which the host waits for the device. place: the innermost line of ours."""

    kind: str
    operation: str
    place: str
    stack: tuple[str, ...]


@dataclass
class Device:
    """The device of this process."""

    functions: ctypes.CDLL
    waits: list[Wait] = field(default_factory=list)
    is_recording: bool = False

    def record(self, kind: bytes, operation: bytes) -> None:
        if self.is_recording:
            self.note(kind.decode(), operation.decode())

    def note(self, kind: str, operation: str) -> None:
        if not self.is_recording:
            return
        ours = [
            f"{Path(frame.filename).relative_to(ROOT).as_posix()}:{frame.lineno} {frame.name}"
            for frame in traceback.extract_stack()
            if frame.filename.startswith(str(ROOT))
            and "emulated_cuda" not in frame.filename
            and "site-packages" not in frame.filename
        ]
        self.waits.append(Wait(kind, operation, ours[-1] if ours else "backward", tuple(ours)))

    @contextmanager
    def recording(self) -> Iterator[list[Wait]]:
        """Record the waits inside."""
        first, self.is_recording = len(self.waits), True
        found: list[Wait] = []
        try:
            yield found
        finally:
            self.is_recording = False
            found += self.waits[first:]


class Event:
    """Stand-in of torch.cuda.Event: all work is done as soon as it is asked for."""

    device: "Device"

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> None:
        self.is_recorded = False

    def record(self, stream: Any = None) -> None:
        self.is_recorded = True

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.device.note("synchronize", "event")

    def elapsed_time(self, end: "Event") -> float:
        assert self.is_recorded
        assert end.is_recorded
        return 1.0


class Stream(torch.Stream):
    """Stand-in of torch.cuda.Stream, in order of the program."""

    emulated: "Device"

    def __new__(cls, device: Any = None, priority: int = 0, **others: Any) -> "Stream":
        return super().__new__(cls, device=torch.device("cuda", 0), priority=priority)

    def wait_event(self, event: Event) -> None:
        assert event.is_recorded

    def wait_stream(self, stream: Any) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:  # type: ignore[override]
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.emulated.note("synchronize", "stream")

    def query(self) -> bool:
        return True

    @property
    def cuda_stream(self) -> int:
        return self.stream_id


class OnDevice:
    """Stand-in of torch.cuda.device: there is one device."""

    def __init__(self, device: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class CurrentStreams(threading.local):
    def __init__(self) -> None:
        self.stack: list[Any] = []


def switch_on() -> Device:
    """Give this process the device. Raises RuntimeError if torch was imported before it was loaded."""
    functions = load()
    device = Device(functions)
    report = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)(device.record)
    device.keep_alive = report  # type: ignore[attr-defined]
    functions.emulated_report_waits_to(report)
    functions.emulated_pin.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    functions.emulated_unpin.argtypes = [ctypes.c_size_t]
    for name in ("emulated_allocated", "emulated_most_allocated"):
        getattr(functions, name).restype = ctypes.c_size_t
    Event.device = Stream.emulated = device
    for name, value in _stand_ins(device).items():
        setattr(torch.cuda, name, value)
    torch.cuda.default_generators = (torch.Generator("cuda").manual_seed(0),)
    torch.backends.cudnn.version = lambda: 91900
    torch._C._cuda_getCurrentRawStream = lambda *_: 0  # type: ignore[attr-defined]  # torch._inductor imports it
    torch.storage._StorageBase._to = _storage_to  # type: ignore[attr-defined]
    return device


def _storage_to(storage: Any, *, device: torch.device, non_blocking: bool = False) -> Any:
    """Stand-in of UntypedStorage._to, with which torch.load sends tensors to a device."""
    content = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return content.to(device, non_blocking=non_blocking).untyped_storage()


def _stand_ins(device: Device) -> dict[str, Any]:
    functions, streams, default = device.functions, CurrentStreams(), Stream()

    def always(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    def current_stream(*_: Any) -> Any:
        return streams.stack[-1] if streams.stack else default

    @contextmanager
    def stream(chosen: Any) -> Iterator[None]:
        streams.stack.append(chosen if chosen is not None else current_stream())
        try:
            yield
        finally:
            streams.stack.pop()

    def register(address: int, size: int, flags: int) -> int:
        functions.emulated_pin(address, size)
        return 0

    def unregister(address: int) -> int:
        assert functions.emulated_unpin(address)
        return 0

    driver = types.SimpleNamespace(
        cudaHostRegister=register,
        cudaHostUnregister=unregister,
        cudaError=types.SimpleNamespace(success=0),
        cudaMemGetInfo=lambda *_: (TOTAL_BYTES - functions.emulated_allocated(), TOTAL_BYTES),
    )
    properties = types.SimpleNamespace(
        name="emulated", major=9, minor=0, total_memory=TOTAL_BYTES, multi_processor_count=132
    )
    generators = lambda: torch.cuda.default_generators[0]  # noqa: E731
    allocated = lambda *_: functions.emulated_allocated()  # noqa: E731
    return {
        "is_available": always(True),
        "is_initialized": always(True),
        "init": always(None),
        "_lazy_init": always(None),
        "_lazy_call": lambda work, **_: work(),
        "_is_in_bad_fork": always(False),
        "device_count": always(1),
        "current_device": always(0),
        "set_device": always(None),
        "_exchange_device": always(0),
        "_maybe_exchange_device": always(0),
        "device": OnDevice,
        "get_device_name": always("emulated"),
        "get_device_capability": always((9, 0)),
        "get_device_properties": always(properties),
        "is_bf16_supported": always(True),
        "mem_get_info": driver.cudaMemGetInfo,
        "memory_allocated": allocated,
        "memory_reserved": allocated,
        "max_memory_allocated": lambda *_: functions.emulated_most_allocated(),
        "max_memory_reserved": lambda *_: functions.emulated_most_allocated(),
        "reset_peak_memory_stats": lambda *_: functions.emulated_forget_most_allocated(),
        "empty_cache": always(None),
        "ipc_collect": always(None),
        "synchronize": lambda *_: device.note("synchronize", "device"),
        "cudart": always(driver),
        "Stream": Stream,
        "Event": Event,
        "stream": stream,
        "current_stream": current_stream,
        "default_stream": always(default),
        "manual_seed": lambda seed: generators().manual_seed(int(seed)),
        "manual_seed_all": lambda seed: generators().manual_seed(int(seed)),
        "get_rng_state": lambda *_: generators().get_state(),
        "set_rng_state": lambda state, *_: generators().set_state(state),
        "get_rng_state_all": lambda: [generators().get_state()],
        "set_rng_state_all": lambda states: generators().set_state(states[0]),
        "initial_seed": lambda: generators().initial_seed(),
    }
