"""The DALI graph, one definition for 'cpu' and 'gpu'.

On a GPU the graph does all of the work. On the CPU it ends with decoding, and one pass over the pixels does the
rest (pipeline/load/views.py); where no compiler is found, the graph does, with the operators that the GPU runs.

Order of work (paper, sections 2 and 4.1): decode, crop, mirror, add the colour shift, subtract the mean.
https://docs.nvidia.com/deeplearning/dali/user-guide/docs/operations/nvidia.dali.fn.crop_mirror_normalize.html
"""

from __future__ import annotations

from typing import Any

import numpy as np
from nvidia import dali
from nvidia.dali import pipeline_def

from pipeline.load.feed import READ_AHEAD
from pipeline.load.views import ten_views, with_mirror_image
from pipeline.preprocess import Preprocess

# their stubs know neither keyword dictionaries nor constants as arguments
fn: Any = dali.fn
types: Any = dali.types


@pipeline_def(enable_conditionals=False)
def graph(
    feed: Any,
    preprocess: Preprocess,
    device: str,
    raw: bool = False,
    ten_crops: bool = False,
    half: bool = False,
    parallel: bool = True,
    decoded: bool = False,
    decoder: str = "mixed",
) -> Any:
    """Images (H, W, 3), or (10, H, W, 3) with `ten_crops`, float32 (float16 with `half`), int64 labels, and shapes.

    `device` 'gpu' computes on the GPU; `decoder` 'mixed' decodes there too, with nvJPEG, and 'cpu' on the host with
    libjpeg-turbo, as `device` 'cpu' does. `raw` records are HWC pixels. The shapes,
    int64 (3,), are those of the whole images: crops would be cut of images of another size, too.
    `decoded`: whole images, (size, size, 3) uint8, and labels.
    """
    gpu, size, crop = device == "gpu", preprocess.size, preprocess.crop
    # the numbers of crop, flip and colour only where the graph needs them: each array costs time on its way
    outputs = 2 if decoded else 5
    record, label, *numbers = fn.external_source(
        feed.records if decoded else feed,
        num_outputs=outputs,
        batch=True,
        batch_info=True,
        parallel=parallel,
        **({"prefetch_queue_depth": READ_AHEAD} if parallel else {}),
        dtype=[types.UINT8, types.INT64, types.INT32, types.INT32, types.FLOAT][:outputs],
        ndim=[3 if raw else 1, 0, 1, 0, 1][:outputs],
    )
    window = types.Constant(np.array([crop, crop], np.int32), device="cpu")
    absolute = {"axes": [0, 1], "normalized_anchor": False, "normalized_shape": False}
    # as tools/build_lmdb.py, which ignores EXIF orientation
    how: dict[str, Any] = {"device": "cpu", "output_type": types.RGB, "adjust_orientation": False}
    if gpu and decoder == "mixed":
        how["device"] = "mixed"
        # no allocation after the first batch, neither in the JPEG engine
        how |= {"preallocate_width_hint": size, "preallocate_height_hint": size}

    if decoded:
        return record if raw else fn.decoders.image(record, **how), label
    anchor, flip, shift = numbers

    per_pixel = preprocess.mean_mode == "pixel"
    channel_mean = np.zeros(3, np.float32) if per_pixel else preprocess.mean[0, 0]
    mean_images = types.Constant(with_mirror_image(preprocess.mean), device=device, layout="HWC")

    def integers(*values: int) -> Any:
        return types.Constant(np.array(values, np.int32), device="cpu")

    def on_device(pixels: Any) -> Any:
        return pixels.gpu() if gpu else pixels

    def normalized(image: Any, anchor: Any, flip: Any) -> Any:
        """Mirror, colour, mean of an image already cropped at `anchor`."""
        out = fn.crop_mirror_normalize(
            image,
            mirror=flip,
            # the shift is added to every pixel alike, so it costs nothing as part of the mean
            mean=types.Constant(channel_mean, device="cpu") - shift,
            std=[1.0, 1.0, 1.0],
            dtype=types.FLOAT if per_pixel or not half else types.FLOAT16,
            output_layout="HWC",
        )
        if per_pixel:
            # the mean belongs to positions of the stored image: column x of it is column 2 * size - 1 - x
            # of the pair, so the crop from x on, mirrored, begins at 2 * size - crop - x
            mirror_side = integers(0, 2 * size - crop) - anchor * integers(0, 2)
            mean = fn.slice(mean_images, anchor + flip * mirror_side, window, **absolute)
            out = out - mean
            out = fn.cast(out, dtype=types.FLOAT16) if half else out
        return out

    if ten_crops:  # paper 4.1: the four corners and the centre, then all five mirrored
        image = on_device(record if raw else fn.decoders.image(record, **how))
        views = []
        for corner, mirrored in zip(*ten_views(size, crop), strict=True):
            at = integers(*corner)
            patch = fn.slice(image, at, window, **absolute)
            views.append(normalized(fn.reshape(patch, layout="HWC"), at, int(mirrored)))
        images = fn.stack(*views)
    else:
        if raw:
            image = fn.slice(on_device(record), anchor, window, **absolute)
        else:
            # decodes no more than the crop; equal to decoding all and cropping, bit for bit on the CPU
            image = on_device(fn.decoders.image_slice(record, anchor, window, **how, **absolute))
        images = normalized(fn.reshape(image, layout="HWC") if raw else image, anchor, flip)
    shapes = record.shape(dtype=types.INT64) if raw else fn.peek_image_shape(record)
    return images, on_device(label), shapes
