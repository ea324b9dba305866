"""Reads the headers of image files: format, size, and whether the file is safe to decode.

Nothing here decodes pixels or allocates memory for them.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, ImageFile, WebPImagePlugin

from pipeline import MAX_PIXELS

MAX_FILE_BYTES = 1 << 28  # of one compressed image

# These limits and MAX_PIXELS keep the decoding time of every image below five seconds (docs/faults.md). They depend
# only on the file, so the speed of the machine never changes a data set.
# For JPEG: each scan visits all pixels. Encoders write up to ten scans; this allows ten of 67 megapixels.
MAX_SCANNED_PIXELS = 5 << 27
MAX_WEBP_PIXELS = 1 << 26  # WebP is the slowest format to decode
# For run-length encoded BMPs, which Pillow decodes in Python. One skip in the data can add 255 rows.
MAX_RLE_BYTES, MAX_RLE_WIDTH = 1 << 23, 1 << 16
JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"  # the first bytes of a file
GIF, BMP, GZIP = (b"GIF87a", b"GIF89a"), b"BM", b"\x1f\x8b"
# For a JPEG of any size. Real files have a few dozen segments (PNG: chunks).
MAX_SCANS, MAX_SEGMENTS = 500, 1 << 16
# A segment with a length, or the end of the image (D9). Fill bytes do not match, nor do stuffed bytes and restarts
# in scans.
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")


class RejectedError(Exception):
    """A file that cannot become a record. The message is the reason in the manifest."""


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (marker, offset) of each segment of a JPEG, up to the end of the image or of the data."""
    position = 2
    for _ in range(MAX_SEGMENTS):
        match = _MARKER.search(data, position)  # skip garbage between segments, as decoders do
        if match is None or (position := match.start()) + 4 > len(data):
            return
        yield data[position + 1], position
        if data[position + 1] == 0xD9:
            return
        position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    raise RejectedError(f"more than {MAX_SEGMENTS:,} segments in a JPEG")


def _jpeg_header(data: bytes) -> tuple[int, int, int]:
    """Return (width, height, offset of the first scan) of a JPEG (ITU-T T.81, annex B)."""
    width = height = 0
    for marker, position in _segments(data):
        if marker == 0xD9:
            break
        if marker == 0xDA:
            if not width:
                break
            return width, height, position
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if position + 9 > len(data):
                raise RejectedError("truncated JPEG")
            height, width = struct.unpack_from(">HH", data, position + 5)
    else:
        raise RejectedError("truncated JPEG")
    raise RejectedError("damaged JPEG header")


def scans(data: bytes) -> int:
    """The number of scans that a decoder reads. Scans of thumbnails and after the end of the image do not count."""
    return sum(marker == 0xDA for marker, _ in _segments(data))


def _check_scans(data: bytes, width: int, height: int) -> None:
    """Raise RejectedError for a JPEG with too many scans for its size, or with too many segments."""
    allowed = min(MAX_SCANS, MAX_SCANNED_PIXELS // (width * height))
    # Counting the marker in all of the data is faster than visiting each segment, and never counts too few. A
    # segment has at least four bytes, so a short file cannot have too many.
    pairs = (np.frombuffer(data, "<u2", (len(data) - start) // 2, start) for start in (0, 1))
    if len(data) <= 4 * MAX_SEGMENTS and sum(np.count_nonzero(pair == 0xDAFF) for pair in pairs) <= allowed:
        return
    count = scans(data)
    if count > allowed:
        raise RejectedError(
            f"{count:,} scans of {width}x{height} pixels, more than the limit of {MAX_SCANS} scans "
            f"or {MAX_SCANNED_PIXELS:,} pixels in total"
        )


def is_image(start: bytes) -> bool:
    """Whether a file that starts with these bytes (at least 16) has a supported format."""
    return start.startswith((JPEG, PNG, *GIF, BMP)) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


def unzipped(data: bytes) -> bytes:
    """Decompress a gzip file, which some servers store under an image's name; return other data unchanged."""
    if not data.startswith(GZIP):
        return data
    try:
        unzip = zlib.decompressobj(31)
        content = unzip.decompress(data, MAX_FILE_BYTES)
    except zlib.error as error:
        raise RejectedError(f"damaged gzip file: {error}") from None
    if unzip.unconsumed_tail or not unzip.eof:
        raise RejectedError(f"gzip file that is truncated or holds more than {MAX_FILE_BYTES:,} bytes")
    return content


def dimensions(data: bytes) -> tuple[int, int]:
    """Return (width, height) in pixels from the header of a JPEG, PNG, GIF, BMP or WebP, whatever the file name.

    Raises RejectedError for other formats, for a truncated header, for a JPEG without an end (decoders fill the
    missing part with grey), and for a PNG chunk that is longer than the file (OpenCV would allocate its length).
    """
    if not data:
        raise RejectedError("empty file")
    if not is_image(data):
        raise RejectedError("not a JPEG, PNG, GIF, BMP or WebP file")
    if data.startswith((*GIF, BMP)):
        width, height = open_in_pillow(data).size
        return width, height
    try:
        if data.startswith(JPEG):
            width, height, scan = _jpeg_header(data)
            # In a scan, 0xFF is followed by 0x00 or a restart marker, so FFD9 is the end of the image. Cameras and
            # servers append data to it, which is harmless.
            if data.rfind(b"\xff\xd9", scan) < 0:
                raise RejectedError("truncated JPEG")
            return width, height
        if data.startswith(PNG):
            _check_png_chunks(data)
            width, height = struct.unpack_from(">II", data, 16)
            return width, height
        return _webp_dimensions(data)
    except struct.error:
        raise RejectedError("truncated header") from None


def check_size(data: bytes) -> None:
    """Raise RejectedError for an image that has no pixels, has too many, or would take too long to decode."""
    width, height = dimensions(data)
    if width <= 0 or height <= 0:
        raise RejectedError("no pixels")
    limit = MAX_WEBP_PIXELS if data.startswith(b"RIFF") else MAX_PIXELS
    if width * height > limit:
        raise RejectedError(f"{width}x{height} pixels, more than the limit of {limit:,}")
    if data.startswith(JPEG):
        _check_scans(data, width, height)


def open_in_pillow(data: bytes) -> ImageFile.ImageFile:
    """Open a GIF, BMP or WebP with Pillow, which reads only the header.

    OpenCV decodes some kinds of BMP incorrectly and fills transparent pixels of GIFs.
    """
    try:
        if data.startswith(BMP):
            image: ImageFile.ImageFile = BmpImagePlugin.BmpImageFile(io.BytesIO(data))
        elif data.startswith(b"RIFF"):
            image = WebPImagePlugin.WebPImageFile(io.BytesIO(data))
        else:
            _check_gif_blocks(data)
            image = GifImagePlugin.GifImageFile(io.BytesIO(data))
    except RejectedError:
        raise
    except (struct.error, IndexError):
        raise RejectedError("truncated header") from None
    except Exception as error:  # plugins raise many types for damaged files
        raise RejectedError(f"damaged header: {error}") from None
    # compression 1 and 2: run lengths with 8 and 4 bits per pixel
    if image.info.get("compression") in (1, 2) and (len(data) > MAX_RLE_BYTES or image.width > MAX_RLE_WIDTH):
        raise RejectedError(f"run-length encoded BMP of {len(data):,} bytes and {image.width:,} columns")
    return image


def _check_gif_blocks(data: bytes) -> None:
    """Raise RejectedError unless the first MAX_SEGMENTS blocks contain an image (GIF89a, section 19 and later)."""
    position = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    count = 0
    while count < MAX_SEGMENTS:
        count += 1
        if data[position] == 0x2C:
            return
        position += 1
        if data[position - 1] == 0x21:  # an extension: a label, then blocks with their lengths
            position += 1
            while data[position] and count < MAX_SEGMENTS:
                position += 1 + data[position]
                count += 1
            position += 1
    raise RejectedError(f"more than {MAX_SEGMENTS:,} blocks in a GIF before the image")


def _check_png_chunks(data: bytes) -> None:
    """Raise RejectedError unless all chunks up to IEND are inside the data (PNG specification, section 5.3)."""
    position = len(PNG)
    for _ in range(MAX_SEGMENTS):
        if position + 8 > len(data):
            raise RejectedError("truncated PNG")
        length, kind = struct.unpack_from(">I4s", data, position)
        position += 12 + length
        if position > len(data):
            raise RejectedError("truncated PNG")
        if kind == b"IEND":
            return
    raise RejectedError(f"more than {MAX_SEGMENTS:,} chunks in a PNG")


def _webp_dimensions(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        low_width, high_width, low_height, high_height = struct.unpack_from("<HBHB", data, 24)
        return (low_width | high_width << 16) + 1, (low_height | high_height << 16) + 1
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF
