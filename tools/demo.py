"""Demo of the whole program on photographs: class folders -> LMDB -> AlexNet -> pictures."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np

from base.errors import DataError

ROOT = Path(__file__).resolve().parent.parent
# photographs in the scikit-image wheel, one class each: a network that tells them apart recognises colours and
# textures in parts of the photographs that it has not been trained on
PHOTOGRAPHS = [
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
]
TRAIN_TILES, VAL_TILES = 160, 40  # per class
TRAIN_IMAGES = 16_000  # over all epochs; takes about 5 minutes on 2 cores
MOST_IMAGES = 4_000  # used of a user's folders


def cut_tiles(out: Path, seed: int = 0) -> None:
    """Cut JPEG tiles of many sizes; training and validation come from disjoint parts of each photograph."""
    import cv2
    import skimage

    random = np.random.default_rng(seed)
    for name in PHOTOGRAPHS:
        photograph = cv2.imread(str(Path(skimage.__file__).parent / "data" / name), cv2.IMREAD_COLOR)
        if photograph is None:
            raise DataError(f"the scikit-image wheel has no {name}: install the version in constraints.txt")
        # along the longer axis, the first 70 % are for training and the rest for validation
        axis = int(photograph.shape[1] >= photograph.shape[0])
        cut = int(photograph.shape[axis] * 0.7)
        parts = np.split(photograph, [cut], axis=axis)
        for split, part, tiles in zip(("train", "val"), parts, (TRAIN_TILES, VAL_TILES), strict=True):
            folder = out / split / Path(name).stem
            folder.mkdir(parents=True)
            for i in range(tiles):
                height, width = (
                    int(random.integers(min(64, side // 2), min(side, 360) + 1)) for side in part.shape[:2]
                )
                top = int(random.integers(0, part.shape[0] - height + 1))
                left = int(random.integers(0, part.shape[1] - width + 1))
                tile = part[top : top + height, left : left + width]
                cv2.imwrite(str(folder / f"{i:04d}.jpg"), tile, [cv2.IMWRITE_JPEG_QUALITY, 95])


def thin_folders(source: Path, out: Path) -> Path:
    """The user's class folders, or if they hold more than MOST_IMAGES, links to a part of each class in `out`."""
    classes = sorted(p for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        raise DataError(
            f"{source} has {len(classes)} class folders: put the photographs of each class in a folder"
        )
    images = {
        folder: sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
        for folder in classes
    }
    total, most = sum(map(len, images.values())), max(10, MOST_IMAGES // len(classes))
    if total <= MOST_IMAGES:
        return source
    for folder, files in images.items():
        (out / folder.name).mkdir(parents=True)
        for index in np.linspace(0, len(files) - 1, min(most, len(files))).round().astype(int):
            (out / folder.name / files[index].name).symlink_to(files[index].resolve())
    print(f"   {total:,} images are too many for a demo: using at most {most} of each class, evenly spaced")
    return out


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("photographs", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Folder for everything that the demo writes.",
)
@click.option(
    "--train-images",
    type=click.IntRange(1),
    default=TRAIN_IMAGES,
    show_default=True,
    help="Number of images to train on, over all epochs.",
)
def main(photographs: Path | None, out: Path, train_images: int) -> None:
    """Build, train, evaluate and draw on PHOTOGRAPHS: class folders, or train/ and val/ with class folders.

    Without PHOTOGRAPHS, the demo uses tiles of the photographs in the scikit-image wheel. OUT is overwritten.
    """
    began = time.monotonic()
    raw, data, run = out / "photographs", out / "data", out / "run"
    if photographs is not None and out.resolve() in (photographs.resolve(), *photographs.resolve().parents):
        raise DataError(f"{photographs} is inside {out}, which would be overwritten: give another --out")
    if out.exists() and not (out / ".demo").exists() and any(out.iterdir()):
        raise DataError(f"{out} exists and was not made by the demo: give another --out")
    shutil.rmtree(out, ignore_errors=True)
    raw.mkdir(parents=True)
    (out / ".demo").touch()

    fraction: tuple[object, ...] = ()
    if photographs is None:
        print(f"1. Cutting tiles from {len(PHOTOGRAPHS)} photographs into {raw}/train and {raw}/val")
        cut_tiles(raw)
    elif (photographs / "train").is_dir() and (photographs / "val").is_dir():
        raw = photographs
    else:
        print(f"1. Using the photographs in {photographs}, a fifth of each class for validation")
        raw, fraction = thin_folders(photographs, raw), ("--val-fraction", 0.2)

    print("2. Building shards")
    call("tools/build_lmdb.py", raw, data, *fraction)
    from pipeline.shards import Manifest

    count = Manifest.load(data / "train").count
    epochs = max(1, min(30, round(train_images / count)))
    print(f"3. Training for {epochs} epochs on {count} images")
    call("train.py", "--data", data, "--out", run, "--epochs", epochs)
    print("4. Evaluating with one crop and with the paper's ten")
    call("tools/evaluate.py", run, "--data", data, "--crops", 1)
    call("tools/evaluate.py", run, "--data", data, "--crops", 10)
    print("5. Drawing pictures")
    call("tools/show.py", "batch", data, "--out", out / "batch.png")
    call("tools/show.py", "curves", run, "--out", out / "curves.png")
    call("tools/show.py", "filters", run, "--out", out / "filters.png")
    chance = 1 / len(Manifest.load(data / "train").classes)
    print(
        f"Done in {(time.monotonic() - began) / 60:.1f} minutes. Guessing would be right {chance:.1%} of the time. "
        f"Pictures: {out}/batch.png, {out}/curves.png, {out}/filters.png"
    )


def call(script: str, *arguments: object) -> None:
    """Print and run one of the program's commands."""
    print("$ python", shlex.join([script, *map(str, arguments)]), flush=True)
    process = subprocess.Popen([sys.executable, str(ROOT / script), *map(str, arguments)])
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:  # the terminal also sends it to the command, which saves and exits
            continue
    if code:
        sys.exit(code if code > 0 else 128 - code)


if __name__ == "__main__":
    main()
