"""One loader or writer of the stage peers: python peer_loaders.py {load,write} NAME CONFIG.json.

Prints a line of JSON. Being a script, each peer runs in a fresh process and, except `ours` and `dali`, in an
environment without this program. All loaders read the same 256 x 256 JPEGs and give float32 batches
(N, 3, crop, crop): random crop, random flip, minus the mean, divided by the deviation. All writers turn the same
photographs into 256 x 256 JPEGs in their own format. Exit code 3: the package is not installed.
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

MEAN, STD = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)
NOT_INSTALLED = 3
Config = dict[str, Any]  # see tools/bench/peers.py


def files(root: str) -> list[tuple[Path, int]]:
    """(image, label) of the class folders in `root`, shuffled as data sets are before they are written."""
    folders = sorted(p for p in Path(root).iterdir() if p.is_dir())
    listed = [(path, label) for label, folder in enumerate(folders) for path in sorted(folder.iterdir())]
    random.Random(0).shuffle(listed)
    return listed


def transform(config: Config) -> Any:
    """torchvision's, for a PIL image or a uint8 tensor."""
    import torch
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.ToImage(),
            v2.RandomCrop(config["crop"]),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32),
            v2.Normalize(MEAN, STD),
        ]
    )


def torch_loader(dataset: Any, config: Config, shuffle: bool = True) -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(
        dataset,
        config["batch"],
        shuffle=shuffle or None,
        num_workers=config["threads"],
        drop_last=True,
        persistent_workers=True,
    )


# --- loaders: each writes its format to config["out"] once, then returns a function that starts an epoch


def ours(config: Config) -> Any:
    from pipeline.load.loader import train_loader
    from pipeline.load.plan import Plan
    from pipeline.preprocess import Preprocess
    from pipeline.shards import ShardReader

    shards = Path(config["shards"])
    reader = ShardReader(shards)
    preprocess = Preprocess.load(shards, config["crop"])
    plan = Plan(len(reader), config["batch"])
    steps = config["warm"] + config["steps"]
    options = {"threads": config["threads"], "prefetch": 2}
    return lambda: train_loader(reader, plan, preprocess, end_step=steps, **options)


def dali(config: Config) -> Any:
    from nvidia import dali
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    fn: Any = dali.fn  # DALI's stubs know neither constants nor a pipeline without a device
    types: Any = dali.types
    pipeline_def: Any = dali.pipeline_def

    @pipeline_def(batch_size=config["batch"], num_threads=config["threads"], device_id=None)
    def graph() -> Any:
        shards = [str(path) for path in sorted(Path(config["shards"]).glob("shard-*"))]
        data, labels = fn.readers.caffe(path=shards, random_shuffle=True, name="reader")
        images = fn.decoders.image(data)
        images = fn.crop_mirror_normalize(
            images,
            crop=(config["crop"],) * 2,
            crop_pos_x=fn.random.uniform(range=(0, 1)),
            crop_pos_y=fn.random.uniform(range=(0, 1)),
            mirror=fn.random.coin_flip(),
            mean=list(MEAN),
            std=list(STD),
            dtype=types.FLOAT,
        )
        return images, labels

    class Epochs:
        def __init__(self) -> None:
            pipe = graph()
            pipe.build()
            names = ["images", "labels"]
            self.batches = DALIGenericIterator([pipe], names, reader_name="reader", auto_reset=True)

        def __iter__(self) -> Iterator[Any]:
            return ((batch[0]["images"], batch[0]["labels"]) for batch in self.batches)

    return Epochs


def torchvision(config: Config) -> Any:
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(config["images"], transform(config))
    return lambda: torch_loader(dataset, config)


def torchvision_decode_jpeg(config: Config) -> Any:
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    def read(path: str) -> Any:
        return decode_jpeg(read_file(path), ImageReadMode.RGB)

    dataset = ImageFolder(config["images"], transform(config), loader=read)
    return lambda: torch_loader(dataset, config)


def ffcv(config: Config) -> Any:
    import numpy as np
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    path = Path(config["out"], "images.beton")
    if not path.exists():
        fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}
        DatasetWriter(str(path), fields, num_workers=config["threads"]).from_indexed_dataset(
            ImageFolder(config["images"])
        )
    share = config["crop"] ** 2 / 256**2  # of the area, so that the crop is not resized
    crop = RandomResizedCropRGBImageDecoder((config["crop"],) * 2, scale=(share, share), ratio=(1, 1))
    normal = NormalizeImage(np.array(MEAN), np.array(STD), np.float32)
    image = [crop, RandomHorizontalFlip(), normal, ToTensor(), ToTorchImage()]
    return lambda: Loader(
        str(path),
        batch_size=config["batch"],
        num_workers=config["threads"],
        order=OrderOption.RANDOM,
        drop_last=True,
        pipelines={"image": image, "label": [IntDecoder(), ToTensor(), Squeeze()]},
    )


def webdataset(config: Config) -> Any:
    import webdataset as wds

    out = Path(config["out"])
    if not (out / "done").exists():
        with wds.ShardWriter(str(out / "images-%05d.tar"), maxcount=1000) as writer:
            for number, (path, label) in enumerate(files(config["images"])):
                writer.write({"__key__": f"{number:08d}", "jpg": path.read_bytes(), "cls": label})
        (out / "done").touch()
    shards = [str(path) for path in sorted(out.glob("*.tar"))]
    change = transform(config)

    def loader() -> Any:
        dataset = wds.WebDataset(shards, shardshuffle=len(shards), empty_check=False).shuffle(1000)
        batches = dataset.decode("pil").to_tuple("jpg", "cls").map_tuple(change).batched(config["batch"])
        return wds.WebLoader(batches, batch_size=None, num_workers=min(config["threads"], len(shards)))

    return loader


def streaming(config: Config) -> Any:
    import io

    from PIL import Image
    from streaming import MDSWriter, StreamingDataset

    out = Path(config["out"])
    if not (out / "index.json").exists():
        with MDSWriter(out=str(out), columns={"image": "bytes", "label": "int"}) as writer:
            for path, label in files(config["images"]):
                writer.write({"image": path.read_bytes(), "label": label})
    change = transform(config)

    class Images(StreamingDataset):
        def __getitem__(self, index: int) -> Any:
            sample = super().__getitem__(index)
            return change(Image.open(io.BytesIO(sample["image"])).convert("RGB")), sample["label"]

    dataset = Images(local=str(out), shuffle=True, batch_size=config["batch"])
    return lambda: torch_loader(dataset, config, shuffle=False)


def _as_sample(item: tuple[str, int]) -> dict[str, Any]:
    return {"image": Path(item[0]).read_bytes(), "label": item[1]}


def _decode(change: Callable[[Any], Any], sample: dict[str, Any]) -> tuple[Any, int]:
    import io

    from PIL import Image

    return change(Image.open(io.BytesIO(sample["image"])).convert("RGB")), sample["label"]


def litdata(config: Config) -> Any:
    from litdata import StreamingDataLoader, StreamingDataset, optimize

    out = Path(config["out"])
    if not (out / "index.json").exists():
        listed = [(str(path), label) for path, label in files(config["images"])]
        optimize(_as_sample, listed, str(out), num_workers=config["threads"], chunk_bytes="64MB")
    # its workers are spawned: what they call has to be importable
    change = partial(_decode, transform(config))
    dataset = StreamingDataset(str(out), shuffle=True, drop_last=True, transform=change)
    return lambda: StreamingDataLoader(
        dataset, batch_size=config["batch"], num_workers=config["threads"], drop_last=True
    )


LOADERS = {
    loader.__name__: loader
    for loader in (ours, dali, torchvision, torchvision_decode_jpeg, ffcv, webdataset, streaming, litdata)
}


# --- writers: each returns a function that writes the photographs to config["out"]


def square_image(path: str | Path) -> Any:
    """Decodes and resizes with Pillow: the central square at 256 x 256."""
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize((max(256, round(image.width * scale)), max(256, round(image.height * scale))))
    left, top = (image.width - 256) // 2, (image.height - 256) // 2
    return image.crop((left, top, left + 256, top + 256))


def write_ffcv(config: Config) -> Callable[[], object]:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(config["photographs"], loader=square_image)
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}
    path = str(Path(config["out"], "images.beton"))
    return lambda: DatasetWriter(path, fields, num_workers=config["workers"]).from_indexed_dataset(dataset)


def _prepared_sample(item: tuple[str, int]) -> dict[str, Any]:
    import io

    jpeg = io.BytesIO()
    square_image(item[0]).save(jpeg, "JPEG", quality=90)
    return {"image": jpeg.getvalue(), "label": item[1]}


def write_litdata(config: Config) -> Callable[[], object]:
    from litdata import optimize

    listed = [(str(path), label) for path, label in files(config["photographs"])]
    options = {"num_workers": config["workers"], "chunk_bytes": "64MB"}
    return lambda: optimize(_prepared_sample, listed, config["out"], **options)


WRITERS = {"ffcv": write_ffcv, "litdata": write_litdata}


# --- measuring


def forever(loader: Any) -> Iterator[Any]:
    """Batches, epoch after epoch."""
    epochs = loader()
    while True:
        count = 0
        for batch in epochs:
            count += 1
            yield batch
        if not count:
            raise SystemExit("an epoch without a batch: give more images or a smaller --batch")


def anonymous_memory() -> int:
    """Bytes that this process and its children hold, without pages of mapped files."""
    total = 0
    pending = ["self"]
    while pending:
        process = pending.pop()
        with suppress(OSError):  # it has ended meanwhile
            for line in Path(f"/proc/{process}/status").read_text().splitlines():
                if line.startswith(("RssAnon:", "RssShmem:")):
                    total += int(line.split()[1]) * 1024
            for task in Path(f"/proc/{process}/task").iterdir():
                pending += (task / "children").read_text().split()
    return total


def measure_loader(name: str, config: Config) -> dict[str, float]:
    """Images per second, seconds until the first batch, and bytes of memory."""
    loader = LOADERS[name](config)
    began = time.perf_counter()
    batches = forever(loader)
    images = next(batches)[0]
    first = time.perf_counter() - began
    wanted = [config["batch"], 3, config["crop"], config["crop"]]
    if list(images.shape) != wanted or str(images.dtype) != "torch.float32":
        raise SystemExit(f"{name} gives {images.dtype} {tuple(images.shape)}, not float32 {wanted}")
    for _ in range(config["warm"] - 1):
        next(batches)
    began, done = time.perf_counter(), 0
    for _ in range(config["steps"]):
        done += len(next(batches)[0])
    rate = done / (time.perf_counter() - began)
    return {"rate": rate, "first_batch": first, "memory": anonymous_memory()}


def measure_writer(name: str, config: Config) -> dict[str, float]:
    """Images per second, without the import of the package."""
    write = WRITERS[name](config)
    began = time.perf_counter()
    write()
    return {"rate": len(files(config["photographs"])) / (time.perf_counter() - began)}


def main() -> None:
    what, name, path = sys.argv[1:]
    measure = {"load": measure_loader, "write": measure_writer}[what]
    try:
        result = measure(name, json.loads(Path(path).read_text()))
    except ImportError as error:
        print(f"{name}: {error}", file=sys.stderr)
        os._exit(NOT_INSTALLED)
    print("\n" + json.dumps(result), flush=True)
    os._exit(0)  # does not wait for worker processes


if __name__ == "__main__":
    main()
