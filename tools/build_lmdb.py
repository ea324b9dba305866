"""Turn raw images into LMDB shards: python tools/build_lmdb.py SOURCE [OUT]."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
from tqdm import tqdm

from base.errors import DataError
from pipeline.build.cifar import is_archive, unpacked
from pipeline.build.sources import (
    NAMES_OF_VAL,
    Source,
    find_splits,
    missing_classes,
    not_read,
    open_source,
    refuse_splits_as_classes,
    split_source,
)
from pipeline.build.split import MAX_IMAGES_PER_SHARD, Options, Summary, build_split
from pipeline.build.workspace import refuse_taken
from pipeline.shards import ENCODINGS, MANIFEST, Manifest
from tools.lib.cli import echo

DEFAULT_QUALITY = 90
SHOWN_REASONS = 5


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False), default=Path("data/imagenet"))
@click.option(
    "--split", type=click.Choice(["train", "val"]), help="Build only this split.  [default: all that exist]"
)
@click.option(
    "--labels",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File of lines `filename label`, for images without class folders; a label is a wnid or a number.",
)
@click.option(
    "--devkit",
    type=click.Path(path_type=Path, exists=True),
    help="ILSVRC2012_devkit_t12.tar.gz or its folder, with validation labels and class names."
    "  [default: found beside the images]",
)
@click.option(
    "--names",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File of lines `wnid name`.  [default: LOC_synset_mapping.txt or synset_words.txt beside the images]",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Number of processes that decode and write.  [default: one per core]",
)
@click.option(
    "--scheduler",
    metavar="tcp://HOST:PORT",
    help="Build on the Dask cluster with this scheduler; its workers must see SOURCE and OUT at the same paths.",
)
@click.option(
    "--encoding",
    type=click.Choice(ENCODINGS),
    default="jpeg",
    show_default=True,
    help="jpeg is the smallest; png is lossless; raw is lossless, needs no decoding, and is the largest.",
)
@click.option("--quality", type=click.IntRange(1, 100), help=f"JPEG quality.  [default: {DEFAULT_QUALITY}]")
@click.option(
    "--size",
    type=click.IntRange(1, 4096),
    default=256,
    show_default=True,
    help="Side of the stored square images, in pixels.",
)
@click.option(
    "--images-per-shard",
    type=click.IntRange(1),
    help=f"Maximum number of images per shard.  [default: {MAX_IMAGES_PER_SHARD:,}, less for small data sets]",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of the shuffle."
)
@click.option(
    "--val-fraction",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Fraction of each class, such as 0.2, that becomes OUT/val if SOURCE has no validation images."
    " --seed selects the images.",
)
@click.option(
    "--strict", is_flag=True, help="Reject JPEGs that decode with warnings, instead of only listing them."
)
@click.option("--resume", is_flag=True, help="Continue an interrupted build with the same options.")
@click.option("--overwrite", is_flag=True, help="Replace the data set in OUT when the new one is complete.")
def main(
    source: Path,
    out: Path,
    split: str | None,
    labels: Path | None,
    devkit: Path | None,
    names: Path | None,
    workers: int | None,
    scheduler: str | None,
    encoding: str,
    quality: int | None,
    size: int,
    images_per_shard: int | None,
    seed: int,
    val_fraction: float | None,
    strict: bool,
    resume: bool,
    overwrite: bool,
) -> None:
    """Turn raw images into LMDB shards in OUT/train and OUT/val (default OUT: data/imagenet).

    SOURCE is one of:

    \b
      a folder of class folders          SOURCE/<wnid>/**/*.JPEG (JPEG, PNG, GIF, BMP or WebP)
      Kaggle's ImageNet                  the folder that holds ILSVRC/
      a folder with train/ and val/      each a folder of class folders, or flat with --labels or --devkit;
                                         without val/ also valid/, validation/ or test/ with the same classes
      the official tars                  ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar (with the devkit),
                                         or the folder that holds them; they are not unpacked
      parquet files or WebDataset tars   a folder of them, as from Hugging Face; their names contain the split
      cifar-10-python.tar.gz, cifar-10-binary.tar.gz   with --size 32, and --encoding png or raw to be lossless

    The short side of each image is scaled to --size and the central square is stored. EXIF orientation is ignored.
    Files that cannot be decoded are listed in the manifest with the reason. The same source, options and seed give
    the same bytes for any number of workers. docs/data.md has the command for each form of SOURCE.
    """
    if resume and overwrite:
        raise click.UsageError(
            "--resume continues a build, and --overwrite starts a new one: give one of them"
        )
    if quality is not None and encoding != "jpeg":
        raise click.UsageError(f"--quality is for JPEGs, but --encoding is {encoding}")
    quality = (quality or DEFAULT_QUALITY) if encoding == "jpeg" else None
    options = Options(size, encoding, quality, images_per_shard, seed, strict)
    if scheduler is not None:
        if workers:
            raise click.UsageError(
                "--workers is for local builds: leave it out, --scheduler has its own workers"
            )
        _check_address(scheduler)
        if is_archive(source):
            raise click.UsageError(
                "--scheduler cannot read CIFAR archives, which are unpacked here: build without --scheduler"
            )
        source, out = source.absolute(), out.absolute()
    try:
        if is_archive(source):
            echo(f"unpacking {source}", err=True)
            source = click.get_current_context().with_resource(unpacked(source, out))
        if source.is_dir() and source.resolve() == out.resolve():
            raise DataError(f"{out} is the folder of the images: give another OUT")
        splits = find_splits(source, split, rename=val_fraction is None)
        if labels and len(splits) > 1:
            raise click.UsageError("--labels is for one split: add --split train or --split val")
        if val_fraction is not None and (split or list(splits) != ["train"]):
            why = f"--split {split} is given" if split else f"{source} holds {' and '.join(splits)}"
            raise click.UsageError(f"--val-fraction splits training images, but {why}: leave it out")
        if (val := splits.get("val")) and val.parent == source and val.name in NAMES_OF_VAL:
            echo(f"val is {val}", err=True)
        if split is None:
            if not labels:
                refuse_splits_as_classes(source, splits)
            folder, more = not_read(source, splits, [path for path in (out, labels, devkit, names) if path])
            if more:
                some = ", ".join(more[:5]) + (", ..." if len(more) > 5 else "")
                echo(f"{folder} also holds {some}, which is not read", err=True)
        # Check all splits before the first takes hours. With --resume, each is checked when it is built.
        for name in () if resume else (*splits, *(["val"] if val_fraction else [])):
            refuse_taken(out / name, resume=False, overwrite=overwrite)
        make_pool = click.get_current_context().with_resource(_pools(scheduler, source, out))
        for images in _listed(splits, out, labels, devkit, names, val_fraction, seed):
            with tqdm(desc=images.split, total=len(images.images), unit=" images", smoothing=0.1) as bar:
                summary = build_split(
                    images,
                    out,
                    options,
                    workers=workers or len(os.sched_getaffinity(0)),
                    resume=resume,
                    overwrite=overwrite,
                    progress=_progress_of(bar),
                    make_pool=make_pool,
                )
            _report(summary)
            splits[images.split] = images.path
        missing = {"train": "val", "val": "train"}.get("".join(splits))
        if missing and not (out / missing / MANIFEST).exists():
            echo(
                f"train.py also needs {out / missing}: build it from other images with --split {missing}"
                + (", or use some of these with --val-fraction 0.2 --overwrite" if missing == "val" else "")
            )
    except KeyboardInterrupt:
        echo("\nInterrupted: continue with --resume.", err=True)
        sys.exit(130)


def _listed(
    splits: dict[str, Path],
    out: Path,
    labels: Path | None,
    devkit: Path | None,
    names: Path | None,
    val_fraction: float | None,
    seed: int,
) -> list[Source]:
    """List all splits and compare their classes, before the build of the first takes hours."""
    sources: list[Source] = []
    for name, path in splits.items():
        wnids = (sources[0].wnids if sources else _train_wnids(out)) if name == "val" else None
        with tqdm(desc=f"{name}: listing", unit=" files", leave=False) as bar:
            source = open_source(
                path,
                name,
                labels=labels,
                devkit=devkit,
                names=names,
                train_wnids=wnids,
                exclude=[out],
                tick=partial(_count, bar),
            )
        for note in source.notes:
            echo(note, err=True)
        if wnids and (missing := missing_classes(source)):
            echo(f"{path} has no images of {_some(missing)}, which the training set has", err=True)
        sources.append(source)
    if val_fraction is not None:
        sources = list(split_source(sources[0], val_fraction, seed))
    return sources


def _count(bar: Any, found: int) -> None:
    bar.update(found - bar.n)


def _some(classes: list[str]) -> str:
    return ", ".join(classes[:5]) + (f" and {len(classes) - 5} more classes" if len(classes) > 5 else "")


def _check_address(scheduler: str) -> None:
    """Raise UsageError for an address that is not valid; Dask's own errors are long."""
    try:
        url = urlsplit(scheduler if "://" in scheduler else f"tcp://{scheduler}")
        sound = url.scheme in ("tcp", "tls") and url.hostname and url.port and url.path in ("", "/")
    except ValueError:  # the port is not a number, the brackets of an IPv6 address do not match
        sound = False
    if not sound:
        raise click.UsageError(f"--scheduler is {scheduler!r}: give tcp://HOST:PORT")


@contextmanager
def _pools(scheduler: str | None, source: Path, out: Path) -> Iterator[Callable[..., Any] | None]:
    """Yield the function that creates the pool on the cluster of `scheduler`, or None to use local processes."""
    if scheduler is None:
        yield None
        return
    try:
        from pipeline.build.cluster import Cluster
    except ImportError:
        raise DataError("--scheduler needs Dask: pip install -e '.[cluster]'") from None
    with Cluster(scheduler, source, out) as cluster:
        yield cluster.pool


def _train_wnids(out: Path) -> list[str] | None:
    """The classes of an existing training set, which define the validation labels, or None."""
    if not (out / "train" / MANIFEST).exists():
        return None
    return [str(entry["wnid"]) for entry in Manifest.load(out / "train").classes]


def _progress_of(bar: Any) -> Callable[[int, int], None]:
    """A progress function for `build_split` that updates a tqdm bar."""
    first = True

    def progress(done: int, total: int) -> None:
        nonlocal first
        if first:  # images of an earlier run do not count for the speed
            bar.initial = bar.n = done
            bar.start_t = bar.last_print_t = time.time()
            first = False
        bar.n = done
        bar.refresh()

    return progress


def _report(summary: Summary) -> None:
    """Print the last lines: counts, speed and the first reasons for rejection."""
    accepted, rejected = summary.accepted, len(summary.rejected)
    done = accepted + rejected - summary.resumed
    resumed = f" ({summary.resumed:,} from before)" if summary.resumed else ""
    echo(
        f"{summary.split_dir}: {accepted + rejected:,} images seen{resumed} = {accepted:,} accepted + "
        f"{rejected:,} rejected, {summary.classes:,} classes, {summary.seconds:.1f} s, "
        f"{done / max(summary.seconds, 1e-9):,.0f} images/s"
    )
    for entry in summary.rejected[:SHOWN_REASONS]:
        echo(f"  rejected {entry['source']!r}: {entry['reason']}")
    if rejected > SHOWN_REASONS:
        echo(f"  and {rejected - SHOWN_REASONS:,} more, all in {summary.split_dir / MANIFEST}")
    if summary.warned:
        echo(
            f"  {len(summary.warned):,} accepted with warnings, perhaps damaged (--strict rejects them), all in "
            f"{summary.split_dir / MANIFEST}: {summary.warned[0]['source']!r}, {summary.warned[0]['reason']}"
        )
    if summary.empty_classes:
        echo(f"  classes without an accepted image: {_some(summary.empty_classes)}")
    if summary.classes == 1:
        echo("  there is only one class: is SOURCE the folder that holds the class folders?")


if __name__ == "__main__":
    main()
