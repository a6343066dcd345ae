#!/usr/bin/env python3
"""Writes the first corpus of the front ends' fuzz targets: a few inputs each that reach deep, as the targets read them.

usage: make_corpus.py FOLDER   (tests/fuzz/corpus/viommu)
"""
import pathlib
import struct
import sys


def near(page):
    """Tape.address() for a page near zero."""
    return struct.pack("<BH", 4, page)


def virtio():
    out = {}
    shape = lambda kind, domain: next(s for s in range(0xF0) if s % 5 == kind - 1 and s >> 4 & 3 == domain and s < 0x80)
    notify = lambda *requests: bytes([len(requests) - 1]) + b"".join(requests)
    at = lambda d, e: bytes([shape(1, d), e])
    de = lambda d, e: bytes([shape(2, d), e])
    ma = lambda d, start, length, gpa, flags: bytes([shape(3, d)]) + near(start) + near(length) + near(gpa) + bytes([flags])
    un = lambda d, start, length: bytes([shape(4, d)]) + near(start) + near(length)
    pr = lambda e: bytes([shape(5, 0), e])
    out["map_unmap"] = bytes([0]) + notify(at(1, 0), at(1, 1)) + notify(ma(1, 16, 3, 5, 3), ma(1, 32, 0, 9, 1)) + notify(
        un(1, 16, 4), un(1, 32, 1), pr(0))
    out["two_domains"] = bytes([1]) + notify(at(1, 0), at(2, 1), ma(1, 1, 7, 1, 3), ma(2, 1, 7, 1, 3)) + notify(
        de(1, 0), at(2, 0), un(2, 0, 255))
    out["failing_host"] = bytes([4]) + notify(at(3, 1)) + b"".join(
        notify(ma(3, 16 * i, 0, i, 3), ma(3, 16 * i + 1, 0, i, 3)) for i in range(12))
    out["raw"] = bytes([2]) + bytes([0, 0xF4]) + bytes(range(116)) + bytes([0, 0xF0])
    return out


def vtd():
    word = lambda at, flags: struct.pack("<HH", at // 8, flags)
    entry = lambda at, page, bits: word(at, 0x4000 | bits << 4 | page)  # kind 2: a page number and low bits
    out = {}
    # The way in of setup bit 4; a chain of tables 3 -> 6 -> 7 -> 8 with leaves in 8.
    chain = entry(0x3000, 6, 3) + entry(0x6000, 7, 3) + entry(0x7000, 8, 3) + b"".join(
        entry(0x8000 + i * 8, i, 3) for i in range(12))
    pad = entry(0x9000, 0, 0) * (48 - 15)
    ring = lambda *kinds: bytes([0, len(kinds)]) + b"".join(
        bytes([k]) + (near(0) if k % 8 in (1, 5, 6) else b"") for k in kinds) + near(1)
    out["legacy"] = bytes([4]) + chain + pad + ring(1, 2, 3) + ring(5, 4, 5) + bytes([1]) + entry(0x8000, 0, 0) + bytes(
        [2, 1]) + near(0) + bytes([5]) + near(9) + near(2)
    user = chain.replace(struct.pack("<H", 0x4000 | 3 << 4 | 6), struct.pack("<H", 0x4000 | 7 << 4 | 6))
    out["scalable"] = bytes([5]) + user + pad + ring(6, 7, 6) + ring(4, 7)
    # Whole tables that point at themselves; all ones.
    out["self"] = bytes([4]) + word(0x3000, 0x5000 | 3 << 4 | 3) + word(0x6000, 0x3000) + pad + ring(2, 3) + ring(2)
    out["raw_queue"] = bytes([20]) + chain + pad + bytes([0, 2, 0]) + bytes(range(32)) + b"\xff\xff\xff\xff"
    return out


def papr():
    out = {}
    put = lambda page, tce: bytes([0x60]) + near(page) + near(tce)
    listed = lambda *tces: bytes([2]) + near(2) + b"".join(near(t) for t in tces) + near(16) + struct.pack("<H", len(tces))
    stuff = lambda page, value, count: bytes([3]) + near(page) + bytes([value]) + struct.pack("<H", count)
    out["puts"] = bytes([0]) + put(1, 2) + put(1, 3) + put(2, 4) + stuff(0, 0, 64) + bytes([4]) + near(1)
    out["lists"] = bytes([1]) + listed(1, 2, 3, 4, 9, 10, 11, 12) + stuff(17, 0, 2) + listed(5, 6, 7, 8, 1, 2, 3, 4)
    out["windows"] = bytes([2]) + bytes([5, 16, 28]) + bytes([0x70]) + near(1) + near(16) + bytes([0x16]) + bytes(
        [5, 24, 30]) + bytes([0x27]) + struct.pack("<H", 0x20) + near(0) * 3
    out["failing_host"] = bytes([4]) + b"".join(put(i, i) for i in range(30)) + listed(1, 2, 3, 4, 5, 6, 7, 8)
    return out


def crc64(data):
    crc = 0
    for byte in data:
        crc ^= byte << 56
        for _ in range(8):
            crc = ((crc << 1) ^ 0x42F0E1EBA9EA3693 if crc >> 63 else crc << 1) & (1 << 64) - 1
    return crc


def snapshot():
    out = {}
    for name, records in {
        "two": [(0x1000, 0x3FFF, 0x2000, 3), (0x200000, 0x3FFFFF, 0x0, 1)],
        "overlap": [(0x1000, 0x3FFF, 0x2000, 3), (0x3000, 0x4FFF, 0x0, 1)],
        "huge": [(0x1000, 0x7FFFFFFFFFFFFFFF, 0x0, 2)],
        "empty": [],
    }.items():
        body = struct.pack("<QIIIIQ", 0x3057444853564F49, 1, 12, 64, 0, len(records))
        body += b"".join(struct.pack("<QQQQ", *r) for r in records)
        out[name] = body + struct.pack("<Q", crc64(body))
    # Behind a first byte that names what they are: the target puts head and checksum around them.
    domain = struct.pack("<IIQ", 5, 0, len(out["two"])) + out["two"]
    out["virtio_iommu"] = b"\x04" + struct.pack("<QII", 0x7F, 0, 1) + domain + struct.pack("<I", 2) + struct.pack("<III", 1, 1, 5) + struct.pack("<III", 2, 1, 5)
    out["virtio_iommu_none"] = b"\x04" + struct.pack("<QII", 0, 1, 0) + struct.pack("<I", 2) + struct.pack("<III", 1, 0, 0) + struct.pack("<III", 2, 0, 0)
    window = lambda shift, address, entries, *tces: struct.pack("<IQQQ", shift, address, entries, len(tces)) + b"".join(struct.pack("<QQ", *t) for t in tces)
    out["papr"] = b"\x08" + struct.pack("<IQ", 1, 0) + window(12, 0, 4096, (1, 0x5003), (2, 0x6003), (9, 0x1001)) + window(16, 1 << 59, 64, (3, 0x20003))
    out["papr_empty"] = b"\x08" + struct.pack("<IQII", 1, 0, 0, 0)
    return out


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for target, inputs in {"virtio_iommu": virtio(), "vtd": vtd(), "papr": papr(), "snapshot": snapshot()}.items():
        folder = pathlib.Path(sys.argv[1]) / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in inputs.items():
            (folder / name).write_bytes(data)


main()
