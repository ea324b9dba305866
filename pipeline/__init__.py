"""Raw images -> LMDB shards -> augmented batches on the device."""

import os

# OpenCV reads these variables when it is first imported, so they are set before any module of this package does so.
# MAX_PIXELS (256 MiB of RGB) is also Pillow's limit; it backs up the check in build.headers.check_size.
MAX_PIXELS = 89_478_485
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # rejected files are listed in the manifest
