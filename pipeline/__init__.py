"""Raw images -> LMDB shards -> augmented batches on the device."""

import os

# OpenCV reads these when it is first imported, so they are set before any module of this package can import it.
# MAX_PIXELS, Pillow's limit too (256 MiB of RGB), is a second line of defence behind build.headers.check_size.
MAX_PIXELS = 89_478_485
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # refused files are listed in the manifest instead
