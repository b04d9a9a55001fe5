"""Read whole numbers of varying length, as protocol buffers and Thrift store them. Standard library only."""


def read_varint(content: bytes | memoryview, position: int) -> tuple[int, int]:
    """Return the number that begins there, seven bits a byte, and where it ends.

    Raises IndexError at the end of the content, ValueError if it has more than 64 bits.
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
