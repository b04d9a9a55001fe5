"""List the contents of a zip file that may be somebody else's. Standard library only."""

import io
import zipfile

MAX_LISTED_BYTES = 1 << 26  # maximum size of the central directory: half a million files


class BoundedFile(io.FileIO):
    """A file that rejects reads larger than the maximum size of a zip file's central directory.

    `zipfile` reads that directory at once, with the length that the file states.
    """

    def read(self, size: int | None = -1) -> bytes:
        """Read up to `size` bytes.

        Raises:
            BadZipFile: If more than `MAX_LISTED_BYTES` are read at once.
        """
        maximum = MAX_LISTED_BYTES + 1
        piece = super().read(maximum if size is None or size < 0 else min(size, maximum)) or b""
        if len(piece) == maximum:
            raise zipfile.BadZipFile("its list of files is too long")
        return piece
