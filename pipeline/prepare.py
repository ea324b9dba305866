"""One raw image file -> size x size RGB -> the bytes of a record; and the statistics of what was stored.

The short side is scaled to `size` and the central square kept, as in section 2 of the AlexNet paper
(Krizhevsky, Sutskever, Hinton 2012). Only the central square is ever resized: the same pixels for less work.
EXIF orientation is ignored, as the makers of ImageNet did: the labels were given to the pixels as stored.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator

# What is decoded depends on the file alone, never on the speed of a machine: these bounds keep every image under
# five seconds (docs/faults.md). MAX_PIXELS is Pillow's limit too, 256 MiB of RGB; OpenCV reads it when it is
# loaded, as a second line of defence to `dimensions` below.
MAX_PIXELS = 89_478_485
# Of a JPEG: each scan goes over all pixels. Encoders write up to ten scans, here of 67 megapixels.
MAX_SCANNED_PIXELS = 5 << 27
MAX_WEBP_PIXELS = 1 << 26  # the slowest to decode
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # refused files are listed in the manifest instead

import cv2  # noqa: E402
import numpy as np  # noqa: E402

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"  # the first bytes
MAX_SCANS, MAX_SEGMENTS = 500, 1 << 16  # of a JPEG of any size; real ones have some dozens (PNGs: chunks)
# What has a length, or is the end (D9): no byte 0xFF of a scan, no restart in it, no fill byte.
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
_DECODE = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION


class RejectedError(Exception):
    """This file cannot become a record; the message is the reason for the manifest."""


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """(marker, its offset) of a JPEG's segments, as decoders find them, to the end of the image or of the data."""
    position = 2
    for _ in range(MAX_SEGMENTS):
        match = _MARKER.search(data, position)  # garbage between segments is passed over, as decoders do
        if match is None or (position := match.start()) + 4 > len(data):
            return
        yield data[position + 1], position
        if data[position + 1] == 0xD9:
            return
        position += 2 + struct.unpack_from(">H", data, position + 2)[0]
    raise RejectedError(f"more than {MAX_SEGMENTS:,} segments in a JPEG")


def _jpeg_header(data: bytes) -> tuple[int, int, int]:
    """(width, height, offset of the first scan) from the frame header of a JPEG (ITU-T T.81, annex B)."""
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
    """How many scans a decoder goes through in a JPEG: thumbnails and what follows the end do not count."""
    return sum(marker == 0xDA for marker, _ in _segments(data))


def dimensions(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels from the header alone, before any memory is spent on the pixels.

    Knows JPEG, PNG, GIF, BMP and WebP by their first bytes, whatever the file is called.
    RejectedError for anything else, for a header cut short, for a JPEG without an end (decoders fill the
    missing part with grey), and for a PNG with a chunk longer than the file (OpenCV makes room for what it claims).
    """
    if not data:
        raise RejectedError("empty file")
    try:
        if data.startswith(JPEG):
            width, height, scan = _jpeg_header(data)
            # Inside a scan 0xFF is followed by 0x00 or a restart marker: FFD9 is the end of the image, and
            # what follows is harmless (cameras and servers do append things).
            if data.rfind(b"\xff\xd9", scan) < 0:
                raise RejectedError("truncated JPEG")
            return width, height
        if data.startswith(PNG):
            _check_png_chunks(data)
            width, height = struct.unpack_from(">II", data, 16)
        elif data.startswith((b"GIF87a", b"GIF89a")):
            width, height = struct.unpack_from("<HH", data, 6)
        elif data.startswith(b"BM"):
            width, height = struct.unpack_from("<ii", data, 18)
            height = abs(height)  # negative: rows from the top
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            width, height = _webp_dimensions(data)
        else:
            raise RejectedError("not a JPEG, PNG, GIF, BMP or WebP file")
    except struct.error:
        raise RejectedError("truncated header") from None
    return width, height


def _check_png_chunks(data: bytes) -> None:
    """RejectedError unless the chunks up to IEND all lie within the data (PNG specification, section 5.3)."""
    position = len(PNG)
    for _ in range(MAX_SEGMENTS):
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


def prepare(data: bytes, size: int = 256) -> np.ndarray:
    """The bytes of any image file -> (size, size, 3) uint8 RGB, as `prepare_bgr`."""
    return np.asarray(cv2.cvtColor(prepare_bgr(data, size), cv2.COLOR_BGR2RGB))


def prepare_bgr(data: bytes, size: int = 256) -> np.ndarray:
    """The bytes of any image file -> (size, size, 3) uint8 in OpenCV's order; RejectedError says why it cannot.

    Grey, palette, CMYK, YCCK, 16-bit and transparent images become 8-bit RGB (alpha is dropped, not blended).
    """
    width, height = dimensions(data)
    if width <= 0 or height <= 0:
        raise RejectedError("no pixels in it")
    limit = MAX_WEBP_PIXELS if data.startswith(b"RIFF") else MAX_PIXELS
    if width * height > limit:
        raise RejectedError(f"{width}x{height} pixels, more than the limit of {limit:,}")
    if data.startswith(JPEG):
        count = scans(data)
        if count > MAX_SCANS or count * width * height > MAX_SCANNED_PIXELS:
            raise RejectedError(
                f"{count:,} scans of {width}x{height} pixels, more than the limit of {MAX_SCANS} scans "
                f"or {MAX_SCANNED_PIXELS:,} pixels in all"
            )
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), _DECODE)
    except cv2.error as error:
        raise RejectedError(f"the decoder refused it: {error.err}") from None
    except MemoryError:
        raise RejectedError(f"not enough memory to decode {width}x{height} pixels") from None
    if image is None:
        raise RejectedError("damaged image data")
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    if side != size:
        # Area averaging does not alias when shrinking; it turns into blocks when enlarging, cubic does not.
        method = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
        square = cv2.resize(square, (size, size), interpolation=method)
    return np.asarray(square)


def encode(rgb: np.ndarray, encoding: str, quality: int = 90) -> bytes:
    """(H, W, 3) uint8 RGB -> the bytes of a record, as `encode_bgr`."""
    return encode_bgr(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), encoding, quality)


def encode_bgr(bgr: np.ndarray, encoding: str, quality: int = 90) -> bytes:
    """(H, W, 3) uint8 BGR -> the bytes of a record: a "jpeg" (4:2:0), a "png" or "raw", which is HWC RGB."""
    if encoding == "raw":
        return bgr[:, :, ::-1].tobytes()
    # PNG level 1: level 9 takes many times longer for a few percent.
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if encoding == "jpeg" else [cv2.IMWRITE_PNG_COMPRESSION, 1]
    done, buffer = cv2.imencode(".jpg" if encoding == "jpeg" else ".png", bgr, options)
    if not done:
        raise RejectedError(f"could not be encoded as {encoding}")
    return bytes(buffer.tobytes())


def decode(data: np.ndarray, size: int) -> np.ndarray | None:
    """A record's JPEG or PNG bytes (1-d uint8) -> (size, size, 3) uint8 RGB; None when they are not that."""
    try:
        image = cv2.imdecode(data, _DECODE)
    except cv2.error:
        return None
    if image is None or image.shape != (size, size, 3):
        return None
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))


class Statistics:
    """Exact integer sums over the pixels of the prepared images, before they are compressed.

    sums: (size, size, 3) int64, the sum of every pixel position and RGB channel.
    products: 3x3 Python integers, the sums of red*red, red*green, ... over all pixels.
    Integers add up to the same in any order, so workers and interruptions cannot change the result.
    """

    # float32 holds integers exactly below 2**24, which 255 * 65,793 just fits.
    _FLUSH = 65_000

    def __init__(self, size: int) -> None:
        self.count = 0
        self.sums = np.zeros((size, size, 3), np.int64)
        self.products = [[0] * 3 for _ in range(3)]
        # OpenCV adds bytes to floats several times as fast as NumPy adds them to integers.
        self._recent = np.zeros((size, size, 3), np.float32)
        self._planes = [np.empty((size, size), np.uint8) for _ in range(3)]

    def add_bgr(self, bgr: np.ndarray) -> None:
        """Count one (size, size, 3) uint8 image in OpenCV's order of channels."""
        self.count += 1
        cv2.accumulate(bgr, self._recent)
        if self.count % self._FLUSH == 0:
            self.flush()
        planes = cv2.split(bgr, self._planes)[::-1]
        # Sums of squares of bytes are exact in OpenCV and vectorised, and 2xy = x² + y² − (x−y)².
        squares = [round(cv2.norm(plane, cv2.NORM_L2SQR)) for plane in planes]
        for i in range(3):
            self.products[i][i] += squares[i]
            for j in range(i):
                difference = round(cv2.norm(planes[i], planes[j], cv2.NORM_L2SQR))
                product = (squares[i] + squares[j] - difference) // 2
                self.products[i][j] += product
                self.products[j][i] += product

    def flush(self) -> None:
        """Bring `sums` up to date."""
        self.sums += self._recent[:, :, ::-1].astype(np.int64)
        self._recent[:] = 0
