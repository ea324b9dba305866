"""One raw image file -> size x size RGB -> the bytes of a record.

The short side is scaled to `size` and the central square kept, as in section 2 of the AlexNet paper
(Krizhevsky, Sutskever, Hinton 2012). Only the central square is ever resized: the same pixels for less work.
EXIF orientation is ignored, as the makers of ImageNet did: the labels were given to the pixels as stored.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import warnings

import cv2
import numpy as np
from PIL import ImageFile

import native
from pipeline.build.headers import BMP, GIF, RejectedError, check_size, open_in_pillow, unzipped

# of native/prepare.cpp: a product is rounded before it is added, as OpenCV does
FLAGS = ("-ffp-contract=off",)
_DECODE = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION


def prepare(data: bytes, size: int = 256) -> np.ndarray:
    """The bytes of any image file -> (size, size, 3) uint8 RGB, as `prepare_bgr`."""
    return np.asarray(cv2.cvtColor(prepare_bgr(data, size), cv2.COLOR_BGR2RGB))


def prepare_bgr(data: bytes, size: int = 256) -> np.ndarray:
    """The bytes of any image file -> (size, size, 3) uint8 in OpenCV's order; RejectedError says why it cannot.

    Grey, palette, CMYK, YCCK and 16-bit images become 8-bit RGB. Alpha is dropped, not blended: a transparent
    pixel keeps the colour that the file stores for it, as with Pillow's convert("RGB").
    """
    data = unzipped(data)
    check_size(data)
    try:
        image = _decoded_bgr(data)
    except cv2.error as error:
        raise RejectedError(f"the decoder refused it: {error.err}") from None
    except MemoryError:
        raise RejectedError("not enough memory to decode it") from None
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


class DecoderWarnings:
    """libjpeg's warnings, which OpenCV only prints: what goes to the process's standard error from here to `close`.

    Whatever else is printed there is passed on.
    """

    _LIBJPEG = re.compile(
        rb"Corrupt JPEG data|Premature end of JPEG file|Inconsistent progression sequence|Invalid SOS parameters"
        rb"|Invalid component ID|Unknown Adobe color transform"
    )

    def __init__(self) -> None:
        try:
            self._kept = os.dup(2)
        except OSError:  # a process without a standard error: nothing can be learnt
            self._kept = -1
            return
        self._buffer = os.memfd_create("warnings")
        os.dup2(self._buffer, 2)

    def take(self) -> str | None:
        """The first warning since the last call."""
        if self._kept < 0 or not (length := os.fstat(self._buffer).st_size):
            return None
        text = os.pread(self._buffer, length, 0)
        os.ftruncate(self._buffer, 0)
        os.lseek(self._buffer, 0, os.SEEK_SET)
        lines = text.splitlines(keepends=True)
        found = [line for line in lines if self._LIBJPEG.match(line)]
        if others := b"".join(line for line in lines if not self._LIBJPEG.match(line)):
            os.write(self._kept, others)
        return found[0].decode("ascii", "replace").strip() if found else None

    def close(self) -> None:
        """Give the process its standard error back."""
        if self._kept >= 0:
            self.take()
            os.dup2(self._kept, 2)
            os.close(self._kept)
            os.close(self._buffer)
            self._kept = -1


def _decoded_bgr(data: bytes) -> np.ndarray:
    # OpenCV refuses the smallest WebPs, of a single colour
    if data.startswith((*GIF, BMP)) or (data.startswith(b"RIFF") and len(data) < 64):
        return _by_pillow(open_in_pillow(data))
    image = cv2.imdecode(np.frombuffer(data, np.uint8), _DECODE)
    if image is None:
        raise RejectedError("damaged image data")
    return np.asarray(image)


def _by_pillow(image: ImageFile.ImageFile) -> np.ndarray:
    try:
        return np.asarray(image.convert("RGB"))[:, :, ::-1].copy()
    except MemoryError:
        raise
    except Exception as error:  # plugins raise nearly anything for damaged bytes
        raise RejectedError(f"damaged image data: {error}") from None


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
