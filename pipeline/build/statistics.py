"""Pixel sums, from which mean.npy and the manifest's principal components are computed."""

from __future__ import annotations

import ctypes

import cv2
import numpy as np

from pipeline.build import images


class Statistics:
    """Exact integer sums over the pixels of the prepared images, before they are encoded.

    sums: (size, size, 3) int64, for each pixel position and RGB channel.
    products: 3x3 Python integers, the sums of red*red, red*green, ... over all pixels.
    Integer sums do not depend on the order, so neither workers nor interruptions change the result.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.sums = np.zeros((size, size, 3), np.int64)
        self.products = [[0] * 3 for _ in range(3)]
        self._library = images.kernels()
        # Small sums are fast to add to, and are flushed before they overflow: 255 * 257 < 2**16, and float32, to
        # which OpenCV adds bytes, is exact for integers below 2**24.
        self._flush_every = 257 if self._library else 65_000
        self._recent = np.zeros((size, size, 3), np.uint16 if self._library else np.float32)
        self._recent_products = np.zeros(6, np.int64)  # of the BGR channels 00, 11, 22, 01, 12, 02
        self._planes = [np.empty((size, size), np.uint8) for _ in range(3)]

    def add_bgr(self, bgr: np.ndarray) -> None:
        """Add one (size, size, 3) uint8 BGR image. `sums` and `products` include it after `flush`."""
        if bgr.dtype != np.uint8 or bgr.shape != self.sums.shape:
            raise ValueError(f"expected uint8 {self.sums.shape}, not {bgr.dtype} {bgr.shape}")
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
        """`_recent_products` of one image, from OpenCV's sums of squares, which are exact and fast for bytes."""
        planes = cv2.split(bgr, self._planes)
        squares = [round(cv2.norm(plane, cv2.NORM_L2SQR)) for plane in planes]
        mixed = []
        for i, j in ((0, 1), (1, 2), (0, 2)):
            difference = round(cv2.norm(planes[i], planes[j], cv2.NORM_L2SQR))
            mixed.append((squares[i] + squares[j] - difference) // 2)  # 2xy = x² + y² − (x−y)²
        return squares + mixed

    def flush(self) -> None:
        """Add the recent images to `sums` and `products`."""
        self.sums += self._recent[:, :, ::-1].astype(np.int64)
        bb, gg, rr, bg, gr, br = map(int, self._recent_products)
        recent = ((rr, gr, br), (gr, gg, bg), (br, bg, bb))
        self.products = [
            [a + b for a, b in zip(*rows, strict=True)] for rows in zip(self.products, recent, strict=True)
        ]
        self._recent[:] = 0
        self._recent_products[:] = 0
