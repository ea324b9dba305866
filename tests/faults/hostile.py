"""Builds from damaged and malicious images and archives."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import struct
import tarfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from base.errors import DataError
from faults.inputs import BUILD
from faults.processes import Command, Lost, Progress, session_of


def hostile_images(
    work: Path, tries: int, draw: random.Random, tick: Progress, corpora: tuple[Path, ...] = ()
) -> tuple[int, str]:
    """Build from damaged and malicious files: each is accepted or rejected, and the data set verifies."""
    from pipeline.build.workers import MAX_SECONDS_PER_ITEM

    seeds = [path for corpus in corpora for path in sorted(corpus.rglob("*")) if path.is_file()]
    inputs = work / "hostile/train/x"
    inputs.mkdir(parents=True)
    for number, content in enumerate(_hostile(seeds, draw, tries)):
        (inputs / f"{number:06d}").write_bytes(content)
    out = work / "hostile-out"
    command = Command(["tools/build_lmdb.py", inputs.parent, out, *BUILD[:4], "--workers", 2])
    peak, deadline = 0, time.monotonic() + 300 + tries
    while command.running() and time.monotonic() < deadline:
        peak = max(peak, *(_peak_memory(pid) for pid in session_of(command.process.pid)), 0)
        time.sleep(0.05)
    if command.wait(5):
        raise Lost(f"the build failed: {command.text()[-300:]!r}")
    command.check_nothing_left()
    found = re.search(r"([\d,]+) images seen.* = ([\d,]+) accepted \+ ([\d,]+) rejected", command.text())
    seen, accepted, rejected = (int(n.replace(",", "")) for n in (found.groups() if found else "000"))
    if seen != tries or accepted + rejected != seen:
        raise Lost(f"{tries} files, {seen} seen = {accepted} accepted + {rejected} rejected")
    check = Command(["tools/verify_lmdb.py", out])
    if check.wait(600):
        raise Lost(f"the data set is damaged: {check.text()[-300:]!r}")
    tick(tries)
    manifest = json.loads((out / "train/manifest.json").read_text())
    reasons = [entry["reason"] for entry in manifest["rejected"]]
    crashed = sum(reason == "crashed the decoder" for reason in reasons)
    slow = sum(reason.startswith("takes more") for reason in reasons)
    return seen, (
        f"{accepted:,} accepted, {rejected:,} rejected ({slow} over {MAX_SECONDS_PER_ITEM:.0f} s, "
        f"{crashed} crashed a worker); at most {peak >> 20:,} MiB per process"
    )


def _peak_memory(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError, ValueError):
        return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) << 10
    return 0


def _hostile(paths: list[Path], draw: random.Random, count: int) -> Iterator[bytes]:
    """Yield `count` inputs: crafted files, the unchanged seeds, then mutated seeds."""
    crafted = _crafted(draw)
    own = _photographs(draw)
    for number in range(count):
        if number < len(crafted):
            yield crafted[number]
        elif number < len(crafted) + len(paths) and 2 * count > 3 * len(paths):
            yield paths[number - len(crafted)].read_bytes()
        else:
            both = [
                draw.choice(own) if not paths or draw.random() < 0.2 else draw.choice(paths).read_bytes()
                for _ in range(2)
            ]
            yield mutated(bytearray(both[0][: 1 << 20]), both[1], draw)


def mutated(data: bytearray, other: bytes, draw: random.Random) -> bytes:
    """Truncate, flip bits, overwrite, delete, or insert parts of `other`, one to three times."""
    for _ in range(1 + draw.randrange(3)):
        where = draw.randrange(len(data)) if data else 0
        kind = draw.randrange(5)
        if kind == 0:
            del data[where:]
        elif kind == 1 and data:
            for _ in range(1 + draw.randrange(16)):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif kind == 2 and data:  # decoders trust the values in the header, which is short
            where = draw.randrange(min(len(data), 64))
            data[where : where + 4] = draw.choice(
                [b"\xff" * 4, b"\x00" * 4, b"\x7f\xff\xff\xff", b"\x00\x01"]
            )
        elif kind == 3:
            start = draw.randrange(len(other)) if other else 0
            data[where:where] = other[start : start + draw.randrange(1, 2000)]
        elif kind == 4:
            del data[where : where + draw.randrange(1, 64)]
    return bytes(data)


def _photographs(draw: random.Random) -> list[bytes]:
    """Small valid files in each format that the builder reads and OpenCV writes."""
    import cv2

    blobs = np.random.default_rng(draw.randrange(1 << 30)).integers(0, 256, (12, 12, 3), np.uint8)
    color = cv2.resize(blobs, (90, 70), interpolation=cv2.INTER_CUBIC)
    kinds: list[tuple[str, np.ndarray, list[int]]] = [
        (".jpg", color, []),
        (".jpg", color, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]),
        (".jpg", color[:, :, 0], [cv2.IMWRITE_JPEG_RST_INTERVAL, 2]),
        (".png", color, []),
        (".png", color.astype(np.uint16) * 257, []),
        (".bmp", color, []),
        (".webp", color, []),
        (".gif", color, []),
    ]
    return [cv2.imencode(kind, image, options)[1].tobytes() for kind, image, options in kinds]


def _crafted(draw: random.Random) -> list[bytes]:
    """Small files that claim to be huge, or decompress to something huge."""

    def png(width: int, height: int, rows: bytes, *extra: bytes) -> bytes:
        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")

    zeros = zlib.compress(bytes(64 << 20), 9)
    text = b"zTXt" + b"x\0\0" + zeros
    text_chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    jpeg = next(data for data in _photographs(draw)[1:2])
    frame = jpeg.index(b"\xff\xc2")
    scan = jpeg.index(b"\xff\xda")
    claims = [
        jpeg[: frame + 5] + struct.pack(">HH", height, width) + jpeg[frame + 9 :]
        for height, width in ((65500, 65500), (9400, 9500), (1, 65500), (0, 0))
    ]
    # repeated scans over the maximum number of pixels: minutes of work in 600 kB
    scans = jpeg[scan:-2]
    bomb = claims[1][:scan] + scans * (600_000 // len(scans)) + b"\xff\xd9"
    return [
        b"",
        png(0xFFFF_FFFF, 0xFFFF_FFFF, zeros),
        png(60_000, 60_000, zeros),
        png(9_400, 9_400, zlib.compress(bytes(9_400 * (3 * 9_400 + 1)), 9)),
        png(10, 10, zeros),
        png(10, 10, zlib.compress(bytes(310)), text_chunk),
        *claims,
        bomb,
        b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**31 - 1, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
        b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x80\0\0" + bytes(99),
    ]


def hostile_tars(work: Path, tries: int, draw: random.Random, tick: Progress) -> tuple[int, str]:
    """List damaged and malicious tars: members are refused with a reason, and nothing is written."""
    from pipeline.build.listing import RawReader
    from pipeline.build.sources import open_source

    def tar_of(members: dict[str, bytes], kinds: dict[str, bytes]) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.type = kinds.get(name, tarfile.REGTYPE)
                member.linkname, member.size = "../../x", len(content) if name not in kinds else 0
                tar.addfile(member, io.BytesIO(content))
        return buffer.getvalue()

    names = ["a.jpg", "../up.jpg", "/abs.jpg", "soft.jpg", "hard.jpg", "device.jpg", "fifo.jpg", "z.jpg"]
    kinds = {"soft.jpg": tarfile.SYMTYPE, "hard.jpg": tarfile.LNKTYPE}
    kinds |= {"device.jpg": tarfile.CHRTYPE, "fifo.jpg": tarfile.FIFOTYPE}
    inner = tar_of(dict.fromkeys(names, b"x" * 700), kinds)
    whole = tar_of({"n1.tar": inner, "n2.tar": inner, "../n3.tar": inner}, {})
    folder, passed, refused = work / "tars", 0, 0
    folder.mkdir()
    path = folder / "train.tar"
    before = set(work.rglob("*")) | {path}
    for number in range(tries):
        damaged = bytearray(whole)
        if number % 2:
            damaged = bytearray(mutated(damaged, inner, draw))
        elif number:
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            source = open_source(path, "train")
            reader = RawReader(path)
            for image in source.images:
                if ".." in image.name.split("/") or image.name.startswith("/"):
                    raise Lost(f"{image.name} is accepted")
                with contextlib.suppress(ValueError):
                    reader.read(image)
            reader.close()
        except DataError as error:
            refused += 1
            if "\n" in error.message:
                raise Lost(f"more than one line: {error.message!r}") from None
        if set(work.rglob("*")) != before:
            raise Lost("something was written")
        passed += 1
        tick()
    return passed, f"{refused:,} refused as a whole"
