"""Any image file to RGB, against Pillow; statistics against NumPy integers."""

import contextlib
import ctypes
import gzip
import io
import os
import platform
import re
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import needs_compiler, read_bgr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import native
import pipeline.build.headers
import pipeline.build.images
from pipeline import MAX_PIXELS
from pipeline.build.headers import RejectedError, dimensions, scans
from pipeline.build.images import encode, prepare, shrink, shrinks_as_opencv
from pipeline.build.statistics import Statistics
from pipeline.preprocess import decode


@pytest.fixture(scope="module")
def photo(photos: dict[str, Path]) -> Image.Image:
    """A square RGB photograph: at its own size `prepare` changes nothing."""
    return Image.open(photos["astronaut"]).convert("RGB")


def _file(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def _with_black(photo: Image.Image) -> Image.Image:
    inks = np.asarray(photo.convert("CMYK")).copy()
    black = inks[..., :3].min(axis=-1)
    inks[..., :3] -= black[..., None]
    inks[..., 3] = black
    return Image.fromarray(inks, "CMYK")


def _transparent(photo: Image.Image) -> Image.Image:
    image = photo.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(photo.size))
    return image


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [
        (lambda p: _file(p, "JPEG"), 1),
        (lambda p: _file(p, "JPEG", progressive=True), 1),
        (lambda p: _file(p.convert("L"), "JPEG"), 1),
        (lambda p: _file(p.convert("CMYK"), "JPEG"), 3),
        (lambda p: _file(_with_black(p), "JPEG"), 3),
        # Byte 17 is the transform flag of the Adobe segment, which comes first: 2 says YCCK.
        (lambda p: (b := _file(_with_black(p), "JPEG"))[:17] + b"\x02" + b[18:], 3),
        (lambda p: _file(p, "PNG"), 0),
        (lambda p: _file(p.convert("P"), "PNG"), 0),
        (lambda p: _file(p.convert("P"), "PNG", transparency=3), 0),
        (lambda p: _file(p.convert("1"), "PNG", icc_profile=None), 0),
        (lambda p: _file(_transparent(p), "PNG"), 0),
        (lambda p: _file(_transparent(p).convert("LA"), "PNG", icc_profile=None), 0),
        (lambda p: _file(p, "GIF"), 0),
        (lambda p: _file(p, "BMP"), 0),
        (lambda p: _file(p, "WEBP"), 2),
        (lambda p: _file(_transparent(p), "WEBP", lossless=True, exact=True), 0),
    ],
    ids=[
        "rgb",
        "progressive",
        "grey",
        "cmyk",
        "cmyk-black",
        "ycck",
        "png",
        "palette",
        "palette-transparent",
        "bit",
        "rgba",
        "grey-alpha",
        "gif",
        "bmp",
        "webp",
        "webp-alpha",
    ],
)
def test_every_kind_becomes_the_rgb_that_pillow_sees(
    photo: Image.Image, make: Callable[[Image.Image], bytes], tolerance: int
) -> None:
    data = make(photo)
    assert dimensions(data) == photo.size
    got = prepare(data, photo.width)
    assert got.dtype == np.uint8 and got.shape == (512, 512, 3)
    assert np.abs(got - _pillow(data)).max() <= tolerance


def test_sixteen_bits_keep_the_high_byte(photo: Image.Image) -> None:
    rgb = np.asarray(photo)
    data = cv2.imencode(".png", rgb[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
    assert np.array_equal(prepare(data, 512), rgb)
    grey = np.asarray(photo.convert("L"))
    data = cv2.imencode(".png", grey.astype(np.uint16) * 257)[1].tobytes()
    assert np.array_equal(prepare(data, 512), np.repeat(grey[..., None], 3, axis=2))


def _area_weights(source: int, target: int) -> np.ndarray:
    """(target, source): how much of each source pixel a target pixel covers."""
    edges = np.arange(target + 1) * source / target
    pixels = np.arange(source)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.clip(overlap, 0, None) * target / source


def test_shrinking_averages_the_central_square(photos: dict[str, Path]) -> None:
    for path in photos.values():
        rgb = np.asarray(Image.open(path).convert("RGB")).astype(float)
        side = min(rgb.shape[:2])
        top, left = (rgb.shape[0] - side) // 2, (rgb.shape[1] - side) // 2
        square = rgb[top : top + side, left : left + side]
        weights = _area_weights(side, 256)
        expected = np.einsum("ys,stc,xt->yxc", weights, square, weights, optimize=True)
        error = np.abs(prepare(path.read_bytes(), 256) - expected)
        assert error.mean() < 0.6 and error.max() < 3, path


def _bmp(header: bytes, masks: bytes, palette: bytes, pixels: bytes) -> bytes:
    offset = 14 + len(header + masks + palette)
    start = struct.pack("<2sIHHI", b"BM", offset + len(pixels), 0, 0, offset)
    return start + header + masks + palette + pixels


def test_kinds_of_bmp(photo: Image.Image) -> None:
    """Each written here by the letter of the format: rows from the bottom, padded to four bytes."""
    small = photo.resize((10, 10))
    rgb = np.asarray(small)

    def rows(lines: np.ndarray) -> bytes:
        return b"".join(line.tobytes() + bytes(-line.nbytes % 4) for line in lines[::-1])

    os2 = struct.pack("<IHHHH", 12, 10, 10, 1, 24)
    assert np.array_equal(prepare(_bmp(os2, b"", b"", rows(rgb[..., ::-1])), 10), rgb)

    info = struct.pack("<IiiHHIIiiII", 40, 10, 10, 1, 16, 3, 0, 0, 0, 0, 0)
    r, g, b = (rgb[..., i].astype(np.uint16) for i in range(3))
    packed = (r >> 3) << 11 | (g >> 2) << 5 | b >> 3
    image = prepare(_bmp(info, struct.pack("<III", 0xF800, 0x07E0, 0x001F), b"", rows(packed)), 10)
    assert np.abs(image.astype(int) - rgb).max() <= 7
    info = struct.pack("<IiiHHIIiiII", 40, 10, 10, 1, 32, 3, 0, 0, 0, 0, 0)
    packed32 = np.dstack([np.full_like(rgb[..., :1], 0), rgb[..., ::-1]])  # blue in the second byte, ...
    masks = struct.pack("<III", 0xFF000000, 0xFF0000, 0xFF00)
    assert np.array_equal(prepare(_bmp(info, masks, b"", rows(packed32)), 10), rgb)

    palette = bytes(range(256)) * 4
    levels = np.asarray(small.convert("L"))
    info = struct.pack("<IiiHHIIiiII", 40, 10, 10, 1, 8, 1, 0, 0, 0, 256, 0)
    # run lengths: pairs of a count and a value; 0 0 ends a row, 0 1 the image
    runs = b"".join(b"".join(bytes([1, v]) for v in line) + b"\0\0" for line in levels[::-1]) + b"\0\1"
    colours = np.frombuffer(palette, np.uint8).reshape(256, 4)[:, 2::-1]
    assert np.array_equal(prepare(_bmp(info, b"", palette, runs), 10), colours[levels])
    # literal runs are padded to two bytes each, as ImageMagick writes them
    runs = b"".join(
        bytes([0, 9]) + line[:9].tobytes() + b"\0" + bytes([1, line[9], 0, 0]) for line in levels[::-1]
    )
    assert np.array_equal(prepare(_bmp(info, b"", palette, runs + b"\0\1"), 10), colours[levels])


def test_a_run_length_encoded_bmp_that_would_take_long_is_rejected() -> None:
    wide = struct.pack("<IiiHHIIiiII", 40, 80_000_000, 1, 1, 8, 1, 0, 0, 0, 256, 0)
    with pytest.raises(RejectedError, match="80,000,000 columns"):
        prepare(_bmp(wide, b"", bytes(1024), b"\0\2\xff\xff" * 10))


def test_transparent_pixels_keep_their_colour() -> None:
    image = Image.new("P", (8, 8), 3)
    image.putpalette([0, 0, 0, 9, 9, 9, 0, 0, 255, 200, 100, 50])
    for kind in ("GIF", "PNG"):
        data = _file(image, kind, transparency=3)
        assert (prepare(data, 8) == (200, 100, 50)).all(), kind
    assert (prepare(_file(Image.new("RGBA", (8, 8), (200, 100, 50, 0)), "PNG"), 8) == (200, 100, 50)).all()


def test_a_gzipped_jpeg_is_unzipped(photo: Image.Image) -> None:
    data = _file(photo, "JPEG")
    assert np.array_equal(prepare(gzip.compress(data)), prepare(data))


def test_a_tiny_webp_is_read() -> None:
    data = bytes.fromhex("524946461a000000574542505650384c0d0000002f0000001007101111888808080700")[:34]
    assert prepare(data, 4).shape == (4, 4, 3)


def test_exif_orientation_is_ignored_and_its_damage_harmless(photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    turned = _file(photo, "JPEG", exif=exif)
    assert np.array_equal(prepare(turned), prepare(_file(photo, "JPEG")))
    damaged = bytearray(turned)
    start = damaged.index(b"Exif") + 8
    damaged[start : start + 16] = b"\xff" * 16
    assert np.array_equal(prepare(bytes(damaged)), prepare(turned))


@pytest.mark.parametrize("size", [(1, 1), (1, 999), (999, 1), (2, 3), (255, 255), (257, 256)])
def test_any_shape_fills_the_square(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (10, 200, 30))
    assert (prepare(_file(image, "PNG")) == (10, 200, 30)).all()


def test_bytes_after_the_end_are_harmless(photo: Image.Image) -> None:
    data = _file(photo, "JPEG")
    assert np.array_equal(prepare(data + b"<!-- served by -->" * 9), prepare(data))


def _png_bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _webp(width: int, height: int) -> bytes:
    header = struct.pack("<BI", 0x2F, width - 1 | height - 1 << 14)
    return b"RIFF" + struct.pack("<I", 12 + len(header)) + b"WEBPVP8L" + struct.pack("<I", 5) + header + b"\0"


def test_what_is_no_image_is_rejected_with_the_reason(photo: Image.Image) -> None:
    jpeg, png = _file(photo, "JPEG"), _file(photo, "PNG")
    huge = jpeg.replace(struct.pack(">HH", 512, 512), struct.pack(">HH", 65500, 65500), 1)
    for data, reason in [
        (b"", "empty file"),
        (b"some text\n" * 20, "not a JPEG"),
        (b"II*\0" + bytes(50), "not a JPEG"),
        (jpeg[: len(jpeg) // 2], "truncated JPEG"),
        (jpeg[:-2], "truncated JPEG"),
        (jpeg[:30], "truncated JPEG"),
        (jpeg[:4], "truncated JPEG"),
        (_file(photo, "JPEG", progressive=True)[:20000], "truncated JPEG"),
        (png[: len(png) // 2], "truncated PNG"),
        (png[:20], "truncated PNG"),
        (png[:-1], "truncated PNG"),
        (png[:-12], "truncated PNG"),  # IEND is missing
        (b"GIF89a" + bytes(1 << 20), "blocks in a GIF"),
        (b"\x1f\x8b" + bytes(30), "damaged gzip file"),
        (gzip.compress(jpeg)[:-9], "truncated"),
        # a chunk that claims 4 GB, for which no memory is allocated
        (png[:33] + b"\xff\xff\xff\xf0" + png[37:], "truncated PNG"),
        (png[:33] + (bytes(4) + b"teXt" + bytes(4)) * 70_000 + png[33:], "chunks in a PNG"),
        (_png_bomb(60000, 60000), "60000x60000 pixels"),
        (_png_bomb(0, 10), "no pixels"),
        (_png_bomb(100, 100), "damaged"),
        (huge, "65500x65500 pixels"),
        (_webp(8193, 8193), "8193x8193 pixels, more than the limit of 67,108,864"),
        (_webp(8192, 8192), "damaged"),
        (
            struct.pack("<2sIHHIIii", b"BM", 60, 0, 0, 54, 40, 1 << 20, -(1 << 20))
            + b"\1\0\x18\0"
            + bytes(36),
            "pixels, more",
        ),
        (b"GIF89a\x01", "truncated header"),
    ]:
        with pytest.raises(RejectedError, match=reason):
            prepare(data)
    assert MAX_PIXELS * 3 <= 1 << 28 and os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] == str(MAX_PIXELS)


def test_the_scans_of_a_jpeg_are_counted_as_a_decoder_reads_them(photo: Image.Image) -> None:
    small = _file(photo.resize((64, 64)), "JPEG", progressive=True)
    plain, progressive = _file(photo, "JPEG"), _file(photo, "JPEG", progressive=True)
    assert (scans(plain), scans(progressive)) == (1, 10)
    # a thumbnail in a segment, restarts in the scan, another picture and a film behind the end
    thumbnail = b"\xff\xe2" + struct.pack(">H", 2 + len(small)) + small
    assert scans(plain[:2] + thumbnail + plain[2:] + small + b"\xff\xda\x00\x02" * 999) == 1
    restarts = cv2.imencode(".jpg", np.asarray(photo), [cv2.IMWRITE_JPEG_RST_INTERVAL, 1])[1].tobytes()
    assert restarts.count(b"\xff\xd7") > 99 and scans(restarts) == 1
    # the last scan once more, and more: the decoder reads them, for the pixels change
    again = progressive[:-2] + progressive[progressive.rindex(b"\xff\xda") : -2] * 3 + b"\xff\xd9"
    assert scans(again) == 13
    assert not np.array_equal(prepare(again), prepare(progressive))


def test_more_scans_than_any_encoder_writes_are_rejected_before_they_are_decoded(
    photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    progressive = _file(photo, "JPEG", progressive=True)
    start = progressive.rindex(b"\xff\xda")
    scan = progressive[start:-2]
    tiny = _file(photo.resize((8, 8)), "JPEG", progressive=True)
    tail = tiny[tiny.rindex(b"\xff\xda") : -2]
    segments = progressive[:2] + b"\xff\xe5\x00\x02" * 70_000 + progressive[2:]
    # encoders write no file of 67 megapixels in the time of a test: a small one with its size changed
    frame = progressive.index(b"\xff\xc2") + 5
    large = progressive[:frame] + struct.pack(">HH", 8193, 8193) + progressive[frame + 4 :]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.build.images.cv2, "imdecode", lambda *_: pytest.fail("decoded"))
        for data, reason in [
            (large, "^10 scans of 8193x8193 pixels"),
            (tiny[:-2] + tail * 500 + b"\xff\xd9", "^510 scans of 8x8 pixels"),
            (segments, "more than 65,536 segments"),
            (tiny[:-2] + b"\xff\xe5\x00\x02" * 70_000 + b"\xff\xd9", "more than 65,536 segments"),
        ]:
            with pytest.raises(RejectedError, match=reason):
                prepare(data)
        monkeypatch.setattr(pipeline.build.headers, "MAX_SCANNED_PIXELS", 11 * 512 * 512)
        with pytest.raises(RejectedError, match=r"^12 scans of 512x512 pixels"):
            prepare(progressive[:-2] + scan * 2 + b"\xff\xd9")
    prepare(progressive[:-2] + scan + b"\xff\xd9")


def test_headers_are_read_in_the_time_of_their_bytes() -> None:
    for filler in (b"\0", b"\xff", b"\xff\xd8", b"\xff\x01", b"\xff\0"):
        began = time.process_time()
        with pytest.raises(RejectedError, match="truncated JPEG"):
            prepare(b"\xff\xd8\xff" + filler * ((1 << 24) // len(filler)))
        assert time.process_time() - began < 1  # 16 MiB; byte by byte in Python takes more


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(
        [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"RIFF\0\0\0\0WEBPVP8 ", b""]
    ),
    rest=st.binary(max_size=200),
)
def test_hostile_bytes_never_do_more_than_be_rejected(kind: bytes, rest: bytes) -> None:
    try:
        assert prepare(kind + rest, 8).shape == (8, 8, 3)
    except RejectedError as error:
        assert str(error)


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(0, 10**9), flip=st.integers(0, 7), keep=st.booleans())
def test_damaged_jpegs_never_crash(photo: Image.Image, cut: int, flip: int, keep: bool) -> None:
    data = bytearray(_file(photo.resize((64, 64)), "JPEG"))
    position = cut % len(data)
    data[position] ^= 1 << flip
    with contextlib.suppress(RejectedError):
        prepare(bytes(data) if keep else bytes(data[:position]), 32)


@pytest.mark.parametrize("encoding", ["jpeg", "png", "raw"])
def test_encodings_keep_the_picture(photo: Image.Image, encoding: str) -> None:
    rgb = prepare(_file(photo, "PNG"))
    data = np.frombuffer(encode(rgb, encoding, 90), np.uint8)
    back = data.reshape(256, 256, 3) if encoding == "raw" else decode(data, 256)
    assert back is not None
    if encoding == "jpeg":
        assert cv2.PSNR(back, rgb) > 30
    else:
        assert np.array_equal(back, rgb)


def test_a_record_of_another_size_does_not_decode(photo: Image.Image) -> None:
    data = np.frombuffer(_file(photo, "JPEG"), np.uint8)
    assert decode(data, 512) is not None
    assert decode(data, 256) is None and decode(data[:50], 512) is None


@pytest.fixture(params=[pytest.param("native", marks=needs_compiler), "opencv"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the C++ of native/prepare.cpp, and without."""
    kind: str = request.param
    if kind == "opencv":
        monkeypatch.setattr(pipeline.build.images, "kernels", lambda: None)
    else:
        request.getfixturevalue("native_kernels")
    return kind


@pytest.fixture
def native_kernels() -> ctypes.CDLL:
    """native/prepare.cpp. Where it cannot be built, or is found to be wrong, tests fail; they do not skip."""
    library = pipeline.build.images.kernels()
    assert library is not None
    return library


@needs_compiler
def test_a_kernel_that_rounds_otherwise_is_noticed(native_kernels: ctypes.CDLL) -> None:
    """Products and sums rounded once, where OpenCV rounds twice."""
    assert shrinks_as_opencv(native_kernels)
    if not (platform.machine() == "aarch64" or re.search(r"\bfma\b", Path("/proc/cpuinfo").read_text())):
        pytest.skip("this CPU rounds products and sums apart in any case")
    fused = native.library("prepare", "", "-ffp-contract=fast")
    assert fused is not None and not shrinks_as_opencv(fused)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(1, 70), more=st.integers(1, 300), left=st.integers(0, 9), seed=st.integers(0, 2**32))
def test_shrinking_averages_areas_as_opencv_does(
    kernels: str, size: int, more: int, left: int, seed: int
) -> None:
    side = size + more
    image = np.random.default_rng(seed).integers(0, 256, (side + 2, side + 13, 3), np.uint8)
    square = image[1 : side + 1, left : left + side]
    ours = shrink(square, size)
    assert np.array_equal(ours, cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA))
    # and both are the mean of what lies under each pixel, here by NumPy: the share of each row, and each column
    edges = np.arange(size + 1) * (side / size)
    starts, pixel = edges[:-1, None], np.arange(side)
    share = np.clip(np.minimum(pixel + 1, edges[1:, None]) - np.maximum(pixel, starts), 0, None) * size / side
    assert np.abs(ours - np.einsum("yi,ijc,xj->yxc", share, square, share, optimize=True)).max() < 0.502


@needs_compiler
def test_photographs_are_shrunk_as_opencv_does(native_kernels: ctypes.CDLL, photos: dict[str, Path]) -> None:
    for path in photos.values():
        image = read_bgr(path)
        side = min(image.shape[:2])
        square = image[:side, -side:]
        for size in [size for size in (37, 100, 227, 300) if size < side and side % size]:
            expected = cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA)
            assert np.array_equal(shrink(square, size), expected)


@needs_compiler
@pytest.mark.parametrize(("side", "size"), [(1007, 1006), (1500, 1001), (2600, 1999), (3001, 256), (4001, 7)])
def test_large_squares_are_shrunk_as_opencv_does(native_kernels: ctypes.CDLL, side: int, size: int) -> None:
    """Edges closer than a thousandth of a pixel, which both leave out, and sums of many pixels."""
    square = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    expected = cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA)
    assert np.array_equal(shrink(square, size), expected)


@pytest.mark.usefixtures("kernels")
def test_what_cannot_be_shrunk_or_counted_is_refused() -> None:
    square = np.zeros((9, 9, 3), np.uint8)
    for wrong in (
        square[:8],
        square[..., :2],
        square[:, ::-1],
        square.astype(np.int8),
        square.swapaxes(0, 1),
    ):
        with pytest.raises(ValueError, match="not a square RGB image"):
            shrink(wrong, 4)
    for size in (0, 9, 10):
        with pytest.raises(ValueError, match="is not less than the image's 9"):
            shrink(square, size)
    with pytest.raises(ValueError, match="expected uint8"):
        Statistics(8).add_bgr(square)


@pytest.mark.parametrize(
    "environment",
    [{"CXX": "/no/such/compiler"}, {"ALEXNET_NATIVE": "0"}, pytest.param({}, marks=needs_compiler)],
    ids=str,
)
def test_without_the_kernel_opencv_does_it(
    photo: Image.Image, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    expected = prepare(_file(photo, "PNG"), 300)
    monkeypatch.delenv("ALEXNET_NATIVE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if not environment:  # an OpenCV that rounds differently
        resize = cv2.resize
        monkeypatch.setattr(cv2, "resize", lambda *args, **kwargs: resize(*args, **kwargs) // 2)
        expected = expected // 2
    caches = native._load, pipeline.build.images.kernels
    for cache in caches:
        cache.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            assert np.array_equal(prepare(_file(photo, "PNG"), 300), expected)
            assert np.array_equal(prepare(_file(photo, "PNG"), 300), expected)
        messages = [str(w.message) for w in warned if "prepared by OpenCV alone" in str(w.message)]
        assert len(messages) == ("ALEXNET_NATIVE" not in environment)
        assert all("no/such/compiler" in line or "rounds differently" in line for line in messages)
    finally:
        for cache in caches:
            cache.cache_clear()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seeds=st.lists(st.tuples(st.integers(0, 2**32), st.integers(0, 255), st.integers(1, 256)), max_size=6))
def test_statistics_are_exact(kernels: str, seeds: list[tuple[int, int, int]]) -> None:
    statistics = Statistics(17)
    sums, products = np.zeros((17, 17, 3), np.int64), np.zeros((3, 3), np.int64)
    for seed, low, span in seeds:
        rng = np.random.default_rng(seed)
        rgb = np.minimum(255, low + rng.integers(0, span, (17, 17, 3))).astype(np.uint8)
        statistics.add_bgr(np.ascontiguousarray(rgb[..., ::-1]))
        sums += rgb
        pixels = rgb.reshape(-1, 3).astype(np.int64)
        products += pixels.T @ pixels
    statistics.flush()
    assert np.array_equal(statistics.sums, sums)
    assert statistics.products == products.tolist()


def test_statistics_stay_exact_beyond_float_range(kernels: str) -> None:
    white = np.full((1, 1, 3), 255, np.uint8)
    statistics = Statistics(1)
    for _ in range(66_000):
        statistics.add_bgr(white)
    statistics.flush()
    assert (statistics.sums == 66_000 * 255).all()
    assert statistics.products == [[66_000 * 255**2] * 3] * 3
    big = Statistics(1024)
    big.add_bgr(np.full((1024, 1024, 3), 255, np.uint8))
    big.flush()
    assert big.products == [[1024**2 * 255**2] * 3] * 3
