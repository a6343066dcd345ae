"""Writes trace files from docs/TRACE_FORMAT.md alone: independent of the command's own writer, and free to lie."""

import struct

MAP, UNMAP = 0, 1


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def difference(value: int, base: int) -> bytes:
    d = (value - base) & (1 << 64) - 1
    return varint((d << 1 ^ ((1 << 64) - 1 if d >> 63 else 0)) & (1 << 64) - 1)


def zstd_stored(data: bytes) -> bytes:
    """A zstd frame (RFC 8878) of one raw block: no compressor needed. At most 65,000 bytes."""
    return struct.pack("<IBI", 0xFD2FB528, 0xA0, len(data)) + struct.pack("<I", len(data) << 3 | 1)[:3] + data


def trace(events: list[tuple[int, int, int, int]], version: int = 1, source: str = "hand.ftrace") -> bytes:
    """Events are (kind, first granule of the IOVA, granules, first granule of memory)."""
    columns = bytearray(kind for kind, *_ in events)
    columns += bytes(len(events))  # CPU 0
    columns += b"".join(difference(i * 1000, max(i - 1, 0) * 1000) for i in range(len(events)))
    previous = 0
    for _, first, _, _ in events:
        columns += difference(first, previous)
        previous = first
    columns += b"".join(varint(count - 1) for _, _, count, _ in events)
    previous = 0
    for kind, _, count, memory in events:
        if kind == MAP:
            columns += difference(memory, previous)
            previous = memory + count
    facts = varint(len(source)) + source.encode() + b"".join(map(varint, [len(events), 0, 0] + [0] * 8 + [1, 0, 0]))
    payload = zstd_stored(bytes(columns))
    header = b"IOVTRACE" + struct.pack(
        "<IIQQQIIII", version, 64, len(events), len(payload), len(columns), len(facts), crc32c(facts), crc32c(payload), crc32c(columns)
    )
    return header + struct.pack("<II", crc32c(header), 0) + facts + payload
