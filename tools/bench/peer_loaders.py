"""One loader on the images of the stage peers: python peer_loaders.py NAME CONFIG.json, prints one line of JSON.

A script of its own, so that each loader runs in a fresh process and, but for `ours` and `dali`, in an environment
that need not hold this program. All get the same 256 x 256 JPEGs and give float32 batches (N, 3, crop, crop):
random crop, random flip, minus the mean, divided by the deviation. Exit code 3: the package is not installed.
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
Config = dict[str, Any]  # images, shards, out, batch, threads, steps, warm, crop


def files(config: Config) -> list[tuple[Path, int]]:
    """(JPEG, label) of the prepared images, in an order of its own for each format's writer."""
    folders = sorted(p for p in Path(config["images"]).iterdir() if p.is_dir())
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


# --- the loaders: each makes its format in config["out"] once, then returns what can be iterated over for an epoch


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

    fn: Any = dali.fn  # the stubs know neither constants nor a pipeline without a device
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
    share = config["crop"] ** 2 / 256**2  # of the area: a crop of that size, not resized
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
            for number, (path, label) in enumerate(files(config)):
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
            for path, label in files(config):
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
        listed = [(str(path), label) for path, label in files(config)]
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
    """Bytes that this process and its children hold, pages of mapped files left out."""
    total = 0
    pending = ["self"]
    while pending:
        process = pending.pop()
        with suppress(OSError):  # gone meanwhile
            for line in Path(f"/proc/{process}/status").read_text().splitlines():
                if line.startswith(("RssAnon:", "RssShmem:")):
                    total += int(line.split()[1]) * 1024
            for task in Path(f"/proc/{process}/task").iterdir():
                pending += (task / "children").read_text().split()
    return total


def main() -> None:
    name, config = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    began = time.perf_counter()
    try:
        loader = LOADERS[name](config)
    except ImportError as error:
        print(f"{name}: {error}", file=sys.stderr)
        os._exit(NOT_INSTALLED)
    prepared = time.perf_counter() - began
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
    result = {"rate": rate, "first_batch": first, "memory": anonymous_memory(), "prepared": prepared}
    print(json.dumps(result), flush=True)
    os._exit(0)  # without the farewells of worker processes


if __name__ == "__main__":
    main()
