"""One raw image file -> size x size RGB -> the bytes of a record; and the statistics of what was stored.

The short side is scaled to `size` and the central square kept, as in section 2 of the AlexNet paper
(Krizhevsky, Sutskever, Hinton 2012). Only the central square is ever resized: the same pixels for less work.
EXIF orientation is ignored, as the makers of ImageNet did: the labels were given to the pixels as stored.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
import warnings
from collections.abc import Iterator

import cv2
import numpy as np

import native
from pipeline import MAX_PIXELS

# What is decoded depends on the file alone, never on the speed of a machine: these bounds and MAX_PIXELS keep every
# image under five seconds (docs/faults.md).
# Of a JPEG: each scan goes over all pixels. Encoders write up to ten scans, here of 67 megapixels.
MAX_SCANNED_PIXELS = 5 << 27
MAX_WEBP_PIXELS = 1 << 26  # the slowest to decode
JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"  # the first bytes
MAX_SCANS, MAX_SEGMENTS = 500, 1 << 16  # of a JPEG of any size; real ones have some dozens (PNGs: chunks)
# What has a length, or is the end (D9): no byte 0xFF of a scan, no restart in it, no fill byte.
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
# of native/prepare.cpp: a product is rounded before it is added, as OpenCV does
FLAGS = ("-ffp-contract=off",)
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


def _check_scans(data: bytes, width: int, height: int) -> None:
    """RejectedError for a JPEG that takes too long to decode: too many scans of so many pixels, or segments."""
    allowed = min(MAX_SCANS, MAX_SCANNED_PIXELS // (width * height))
    # Looking for the marker everywhere is quicker than walking from segment to segment, and finds it at least as
    # often. A segment has four bytes or more: a short file has not too many of them either.
    pairs = (np.frombuffer(data, "<u2", (len(data) - start) // 2, start) for start in (0, 1))
    if len(data) <= 4 * MAX_SEGMENTS and sum(np.count_nonzero(pair == 0xDAFF) for pair in pairs) <= allowed:
        return
    count = scans(data)
    if count > allowed:
        raise RejectedError(
            f"{count:,} scans of {width}x{height} pixels, more than the limit of {MAX_SCANS} scans "
            f"or {MAX_SCANNED_PIXELS:,} pixels in all"
        )


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
        _check_scans(data, width, height)
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
    # Area averaging does not alias when shrinking; it turns into blocks when enlarging, cubic does not.
    if side > size:
        return shrink(square, size)
    if side < size:
        square = cv2.resize(square, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.asarray(square)


def shrink(square: np.ndarray, size: int) -> np.ndarray:
    """(side, side, 3) uint8 -> (size, size, 3), size < side: cv2.resize with INTER_AREA, its result bit for bit.

    Rows of `square` may lie apart, as in part of an image; ValueError for anything else. Where each pixel is made
    of a whole number of them, it is OpenCV that does it; else native/prepare.cpp, four to five times as fast.
    """
    side, stride = len(square), square.strides[0]
    if square.dtype != np.uint8 or square.shape != (side, side, 3) or square.strides != (stride, 3, 1):
        raise ValueError(f"not a square of pixels: {square.dtype} {square.shape}, strides {square.strides}")
    if not 0 < size < side:
        raise ValueError(f"{size} pixels are not fewer than {side}")
    library = kernels() if side % size else None
    if library is None:
        return np.asarray(cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA))
    return _shrink(library, square, size)


def _shrink(library: ctypes.CDLL, square: np.ndarray, size: int) -> np.ndarray:
    out = np.empty((size, size, 3), np.uint8)
    failed = library.shrink_image(
        ctypes.c_void_p(square.ctypes.data),
        ctypes.c_int64(square.strides[0]),
        ctypes.c_int64(len(square)),
        ctypes.c_void_p(out.ctypes.data),
        ctypes.c_int64(size),
    )
    if failed:
        raise MemoryError("no memory for a row of pixels")
    return out


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """native/prepare.cpp; None, with a warning, where it cannot be built or the OpenCV here gives other results."""
    slower = "images are prepared by OpenCV alone, slower"
    library = native.library("prepare", slower, *FLAGS)
    if library and not shrinks_as_opencv(library):
        # it may be built to round once where its source says twice
        warnings.warn(f"{slower}: it rounds otherwise than native/prepare.cpp", stacklevel=2)
        return None
    return library


def shrinks_as_opencv(library: ctypes.CDLL) -> bool:
    """Whether the kernel gives what cv2.resize gives, down to how each sum is rounded.

    Shares of 36ths, 144ths and 324ths of a level put hundreds of sums on the edge between two levels, where any
    other rounding shows. Rows of odd lengths have a rest behind the last whole vector.
    """
    random = np.random.default_rng(0)
    for side, size in ((102, 85), (306, 255), (204, 85), (270, 75), (375, 256)):
        probe = random.integers(0, 256, (side, side, 3), np.uint8)
        expected = cv2.resize(probe, (size, size), interpolation=cv2.INTER_AREA)
        if not np.array_equal(_shrink(library, probe, size), expected):
            return False
    return True


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


class Statistics:
    """Exact integer sums over the pixels of the prepared images, before they are compressed.

    sums: (size, size, 3) int64, the sum of every pixel position and RGB channel.
    products: 3x3 Python integers, the sums of red*red, red*green, ... over all pixels.
    Integers add up to the same in any order, so workers and interruptions cannot change the result.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.sums = np.zeros((size, size, 3), np.int64)
        self.products = [[0] * 3 for _ in range(3)]
        self._library = kernels()
        # Small sums are added to quickly. So many images fit: 255 * 257 is below 2**16, and float32, which
        # OpenCV adds bytes to, holds integers exactly below 2**24.
        self._flush_every = 257 if self._library else 65_000
        self._recent = np.zeros((size, size, 3), np.uint16 if self._library else np.float32)
        self._recent_products = np.zeros(6, np.int64)  # of the channels 00, 11, 22, 01, 12, 02 of BGR
        self._planes = [np.empty((size, size), np.uint8) for _ in range(3)]

    def add_bgr(self, bgr: np.ndarray) -> None:
        """Count one (size, size, 3) uint8 image in OpenCV's order of channels; `sums` know of it after `flush`."""
        if bgr.dtype != np.uint8 or bgr.shape != self.sums.shape:
            raise ValueError(f"not an image of these statistics: {bgr.dtype} {bgr.shape}")
        if self._library is not None:
            bgr = np.ascontiguousarray(bgr)
            arrays = (bgr, self._recent, self._recent_products)
            pixels = ctypes.c_int64(bgr.size // 3)
            self._library.add_image(*(ctypes.c_void_p(array.ctypes.data) for array in arrays), pixels)
        else:
            cv2.accumulate(bgr, self._recent)
            self._recent_products += self._products(bgr)
        self.count += 1
        if self.count % self._flush_every == 0:
            self.flush()

    def _products(self, bgr: np.ndarray) -> list[int]:
        """As `_recent_products`, of one image, by OpenCV, whose sums of squares of bytes are exact and quick."""
        planes = cv2.split(bgr, self._planes)
        squares = [round(cv2.norm(plane, cv2.NORM_L2SQR)) for plane in planes]
        mixed = []
        for i, j in ((0, 1), (1, 2), (0, 2)):
            difference = round(cv2.norm(planes[i], planes[j], cv2.NORM_L2SQR))
            mixed.append((squares[i] + squares[j] - difference) // 2)  # 2xy = x² + y² − (x−y)²
        return squares + mixed

    def flush(self) -> None:
        """Bring `sums` and `products` up to date."""
        self.sums += self._recent[:, :, ::-1].astype(np.int64)
        bb, gg, rr, bg, gr, br = map(int, self._recent_products)
        recent = ((rr, gr, br), (gr, gg, bg), (br, bg, bb))
        self.products = [
            [a + b for a, b in zip(*rows, strict=True)] for rows in zip(self.products, recent, strict=True)
        ]
        self._recent[:] = 0
        self._recent_products[:] = 0
