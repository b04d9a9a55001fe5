"""Read variable-length integers, as protocol buffers and Thrift store them. Standard library only."""


def read_varint(content: bytes | memoryview, position: int) -> tuple[int, int]:
    """Decode the varint at `position`, seven bits per byte; return it and the position after it.

    Raises:
        IndexError: If the content ends inside the number.
        ValueError: If the number has more than 64 bits.
    """
    number = shift = 0
    while True:
        byte = content[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, position
        shift += 7
        if shift > 63:
            raise ValueError("a number in a field has more than 64 bits")
