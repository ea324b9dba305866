"""Turns an image file into a square RGB image, and that into the bytes of a record.

The short side is scaled to `size` and the central square is cut out, as in section 2 of the AlexNet paper
(Krizhevsky, Sutskever, Hinton 2012). The square is cut out first and then resized, which gives the same pixels for
less work. EXIF orientation is ignored, as in the making of ImageNet: labels were assigned to the pixels as stored.
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

# For native/prepare.cpp: round each product before adding it, as OpenCV does.
FLAGS = ("-ffp-contract=off",)
_DECODE = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION


def prepare(data: bytes, size: int = 256) -> np.ndarray:
    """Same as `prepare_bgr`, but returns RGB."""
    return np.asarray(cv2.cvtColor(prepare_bgr(data, size), cv2.COLOR_BGR2RGB))


def prepare_bgr(data: bytes, size: int = 256) -> np.ndarray:
    """Decode an image file, crop and scale it to (size, size, 3) uint8 BGR. Raises RejectedError with the reason.

    Grey, palette, CMYK, YCCK and 16-bit images become 8-bit RGB. Alpha is dropped, not blended: a transparent
    pixel keeps the colour that the file stores for it, as with Pillow's convert("RGB").
    """
    data = unzipped(data)
    check_size(data)
    try:
        image = _decoded_bgr(data)
    except cv2.error as error:
        raise RejectedError(f"refused by the decoder: {error.err}") from None
    except MemoryError:
        raise RejectedError("not enough memory to decode it") from None
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    # Area averaging does not alias when shrinking, but gives blocks when enlarging; cubic interpolation does not.
    if side > size:
        return shrink(square, size)
    if side < size:
        square = cv2.resize(square, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.asarray(square)


class DecoderWarnings:
    """Collects libjpeg's warnings, which OpenCV prints to standard error, until `close` is called.

    Other output to standard error is passed through.
    """

    _LIBJPEG = re.compile(
        rb"Corrupt JPEG data|Premature end of JPEG file|Inconsistent progression sequence|Invalid SOS parameters"
        rb"|Invalid component ID|Unknown Adobe color transform"
    )

    def __init__(self) -> None:
        try:
            self._kept = os.dup(2)
        except OSError:  # standard error is closed
            self._kept = -1
            return
        self._buffer = os.memfd_create("warnings")
        os.dup2(self._buffer, 2)

    def take(self) -> str | None:
        """Return the first warning since the last call, or None."""
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
        """Restore standard error."""
        if self._kept >= 0:
            self.take()
            os.dup2(self._kept, 2)
            os.close(self._kept)
            os.close(self._buffer)
            self._kept = -1


def _decoded_bgr(data: bytes) -> np.ndarray:
    # OpenCV refuses tiny WebP files, such as images of a single colour.
    if data.startswith((*GIF, BMP)) or (data.startswith(b"RIFF") and len(data) < 64):
        return _decoded_by_pillow(open_in_pillow(data))
    image = cv2.imdecode(np.frombuffer(data, np.uint8), _DECODE)
    if image is None:
        raise RejectedError("damaged image data")
    return np.asarray(image)


def _decoded_by_pillow(image: ImageFile.ImageFile) -> np.ndarray:
    try:
        return np.asarray(image.convert("RGB"))[:, :, ::-1].copy()
    except MemoryError:
        raise
    except Exception as error:  # plugins raise many types for damaged files
        raise RejectedError(f"damaged image data: {error}") from None


def shrink(square: np.ndarray, size: int) -> np.ndarray:
    """Shrink (side, side, 3) uint8 to (size, size, 3), bit-identical to cv2.resize with INTER_AREA.

    The rows of `square` need not be contiguous, so that it can be a crop. If `side` is a multiple of `size`, this
    calls OpenCV; otherwise native/prepare.cpp, which is four to five times as fast.
    """
    side, stride = len(square), square.strides[0]
    if square.dtype != np.uint8 or square.shape != (side, side, 3) or square.strides != (stride, 3, 1):
        raise ValueError(f"not a square RGB image: {square.dtype} {square.shape}, strides {square.strides}")
    if not 0 < size < side:
        raise ValueError(f"size {size} is not less than the image's {side}")
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
    """Load native/prepare.cpp; None, with a warning, if it cannot be built or differs from the installed OpenCV."""
    slower = "images are prepared by OpenCV alone, which is slower"
    library = native.library("prepare", slower, *FLAGS)
    if library and not shrinks_as_opencv(library):
        # such as an OpenCV compiled with fused multiply-add
        warnings.warn(f"{slower}: this OpenCV rounds differently from native/prepare.cpp", stacklevel=2)
        return None
    return library


def shrinks_as_opencv(library: ctypes.CDLL) -> bool:
    """Whether the kernel is bit-identical to cv2.resize, including the rounding of each sum.

    The sizes give sums in steps of 1/36, 1/144 and 1/324, hundreds of which are halfway between two levels, where
    another rounding shows. Odd row lengths leave a remainder after the last full vector.
    """
    random = np.random.default_rng(0)
    for side, size in ((102, 85), (306, 255), (204, 85), (270, 75), (375, 256)):
        probe = random.integers(0, 256, (side, side, 3), np.uint8)
        expected = cv2.resize(probe, (size, size), interpolation=cv2.INTER_AREA)
        if not np.array_equal(_shrink(library, probe, size), expected):
            return False
    return True


def encode(rgb: np.ndarray, encoding: str, quality: int = 90) -> bytes:
    """Same as `encode_bgr`, for an RGB image."""
    return encode_bgr(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), encoding, quality)


def encode_bgr(bgr: np.ndarray, encoding: str, quality: int = 90) -> bytes:
    """Encode (H, W, 3) uint8 BGR as the bytes of a record: "jpeg" (4:2:0), "png", or "raw" (HWC RGB)."""
    if encoding == "raw":
        return bgr[:, :, ::-1].tobytes()
    # PNG level 1: level 9 takes many times longer for a few percent.
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if encoding == "jpeg" else [cv2.IMWRITE_PNG_COMPRESSION, 1]
    done, buffer = cv2.imencode(".jpg" if encoding == "jpeg" else ".png", bgr, options)
    if not done:
        raise RejectedError(f"could not be encoded as {encoding}")
    return bytes(buffer.tobytes())
