"""Write the bytes of a dropped file as they arrive."""

import threading
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.concurrency import run_in_threadpool

from modules.pages.language import refusal

# files are decoded one at a time on all pages, because the largest one takes 1.5 GiB of memory
DECODING = threading.Lock()


async def write_arriving(chunks: AsyncIterator[bytes], path: Path, name: str, max_bytes: int) -> None:
    """Write the bytes of an upload to a new file as they arrive.

    If an error is raised, the file is incomplete, and the caller has to remove it.

    Args:
        name: Name of the dropped file, for messages.

    Raises:
        OptionError: If nothing arrives, or more than `max_bytes`.
        OSError: If the file cannot be written.
    """
    received = 0
    with path.open("xb") as file:
        async for chunk in chunks:
            received += len(chunk)
            if received > max_bytes:
                raise refusal(
                    "%(name)s has more than %(max_bytes)s bytes, the announced or largest accepted size",
                    name=name,
                    max_bytes=f"{max_bytes:,}",
                )
            await run_in_threadpool(file.write, chunk)
    if not received:
        raise refusal("%(name)s is empty", name=name)
