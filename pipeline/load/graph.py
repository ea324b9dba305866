"""The DALI graph, one definition for 'cpu' and 'gpu'.

On a GPU the graph does all of the work. On the CPU it ends with decoding, and one pass over the pixels does the
rest (pipeline/load/views.py); if that kernel cannot be built, the graph uses the same operators as on a GPU.

Order of work (paper, sections 2 and 4.1): decode, subtract the mean image, crop, mirror, add the colour shift.
https://docs.nvidia.com/deeplearning/dali/user-guide/docs/operations/nvidia.dali.fn.crop_mirror_normalize.html
"""

from __future__ import annotations

from typing import Any

import numpy as np
from nvidia import dali
from nvidia.dali import pipeline_def

from pipeline.load.feed import READ_AHEAD
from pipeline.load.views import ten_views
from pipeline.preprocess import Preprocess

# DALI's stubs know neither keyword dictionaries nor constants as arguments
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
    """Builds the graph.

    Args:
        feed: gives records, labels, and the anchors, flips and colour shifts of the crops.
        device: "gpu" computes on the GPU.
        raw: records are HWC pixels and need no decoding.
        ten_crops: the ten crops of section 4.1 instead of the crop that the feed asks for.
        half: images are float16 instead of float32.
        parallel: reader processes run the feed.
        decoded: stop after decoding.
        decoder: on a GPU, "mixed" decodes with nvJPEG and "cpu" with libjpeg-turbo on the host.

    Returns:
        Images (crop, crop, 3), or (10, crop, crop, 3) with `ten_crops`; int64 labels; and int64 (3,) shapes of the
        whole images, since crops could be cut from images of a wrong size too. With `decoded`: whole images
        (size, size, 3) uint8 and labels.
    """
    gpu, size, crop = device == "gpu", preprocess.size, preprocess.crop
    # ask for crop, flip and colour only if the graph needs them: each array takes time on its way here
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
        layout=["HWC" if raw else "", "", "", "", ""][:outputs],
    )
    # EXIF orientation is ignored, as in tools/build_lmdb.py
    decoding: dict[str, Any] = {"device": "cpu", "output_type": types.RGB, "adjust_orientation": False}
    if gpu and decoder == "mixed":
        decoding["device"] = "mixed"
        # no allocation after the first batch, in the JPEG engine as well
        decoding |= {"preallocate_width_hint": size, "preallocate_height_hint": size}

    # whole images: decoding the crop alone takes libjpeg-turbo longer
    image = record if raw else fn.decoders.image(record, **decoding)
    if decoded:
        return image, label

    def on_device(data: Any) -> Any:
        return data.gpu() if gpu else data

    image = on_device(image)
    channel_mean = np.zeros(3, np.float32)
    if preprocess.mean_mode == "pixel":
        # DALI's operators take one tensor per sample, so on a GPU a constant is copied once per sample, when the
        # graph starts: 0.8 MB each. Subtracting before the crop needs no slices of these copies.
        image = image - types.Constant(preprocess.mean, device=device, layout="HWC")
    else:
        channel_mean = preprocess.mean[0, 0]

    def view(top: Any, left: Any, flip: Any, mean: Any) -> Any:
        """Crops, mirrors and subtracts `mean` of each channel."""
        slack = max(1, size - crop)
        return fn.crop_mirror_normalize(
            image,
            crop=(crop, crop),
            crop_pos_y=top / slack,
            crop_pos_x=left / slack,
            mirror=flip,
            mean=mean,
            std=[1.0, 1.0, 1.0],
            dtype=types.FLOAT16 if half else types.FLOAT,
            output_layout="HWC",
        )

    if ten_crops:  # section 4.1: the four corners and the centre, then the same five mirrored
        anchors, flips = (array.tolist() for array in ten_views(size, crop))
        views = [(top, left, flip) for (top, left), flip in zip(anchors, flips, strict=True)]
        images = fn.stack(*(view(*place, channel_mean.tolist()) for place in views))
    else:
        anchor, flip, shift = numbers
        # the shift is the same for every pixel, so it costs nothing as part of the mean
        images = view(anchor[0], anchor[1], flip, types.Constant(channel_mean, device="cpu") - shift)
    shapes = record.shape(dtype=types.INT64) if raw else fn.peek_image_shape(record)
    return images, on_device(label), shapes
