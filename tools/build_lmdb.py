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
    "--split", type=click.Choice(["train", "val"]), help="Build this one only.  [default: all found]"
)
@click.option(
    "--labels",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Lines `filename label`, for images without class folders; a label is a wnid or a number.",
)
@click.option(
    "--devkit",
    type=click.Path(path_type=Path, exists=True),
    help="ILSVRC2012_devkit_t12.tar.gz or its folder: validation labels and class names."
    "  [default: looked for beside the images]",
)
@click.option(
    "--names",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Lines `wnid name`.  [default: LOC_synset_mapping.txt or synset_words.txt beside the images]",
)
@click.option(
    "--workers", type=click.IntRange(1), help="Processes that decode and write.  [default: one a core]"
)
@click.option(
    "--scheduler",
    metavar="tcp://HOST:PORT",
    help="Of a Dask cluster whose workers do the work; they must see SOURCE and OUT by the same paths.",
)
@click.option(
    "--encoding",
    type=click.Choice(ENCODINGS),
    default="jpeg",
    show_default=True,
    help="jpeg is the smallest; png loses nothing; raw needs no decoding either, and the most space.",
)
@click.option("--quality", type=click.IntRange(1, 100), help=f"Of the JPEGs.  [default: {DEFAULT_QUALITY}]")
@click.option(
    "--size", type=click.IntRange(1, 4096), default=256, show_default=True, help="Side of the stored squares."
)
@click.option(
    "--images-per-shard",
    type=click.IntRange(1),
    help=f"At most.  [default: {MAX_IMAGES_PER_SHARD:,}, fewer where there are few images]",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the shuffle."
)
@click.option(
    "--val-fraction",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Part of each class, such as 0.2, that becomes OUT/val, where SOURCE has no validation images."
    "  --seed chooses which.",
)
@click.option(
    "--strict", is_flag=True, help="Reject JPEGs that decode with warnings; otherwise they are listed only."
)
@click.option("--resume", is_flag=True, help="Continue an interrupted build; give the same options.")
@click.option("--overwrite", is_flag=True, help="Replace what is in OUT, once the new data set is complete.")
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
      a folder with train/ and val/      each a folder of class folders, or flat with --labels or --devkit
      the official tars, never unpacked  ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar (with the devkit)
      a folder that holds those tars
      a folder of parquet files or WebDataset tars, as from Hugging Face; train and val by their names
      cifar-10-python.tar.gz, cifar-10-binary.tar.gz   with --size 32, and --encoding png or raw for no loss

    Images become squares of --size pixels: short side scaled, centre cut out. EXIF orientation is ignored. What
    cannot be decoded is left out and listed in the manifest with the reason. The same source, options and seed
    give the same bytes for any number of workers. docs/data.md has all forms of SOURCE and what to type for each.
    """
    if resume and overwrite:
        raise click.UsageError("--resume continues a build and --overwrite starts afresh: give one of them")
    if quality is not None and encoding != "jpeg":
        raise click.UsageError(f"--quality is for JPEGs, but --encoding is {encoding}")
    quality = (quality or DEFAULT_QUALITY) if encoding == "jpeg" else None
    options = Options(size, encoding, quality, images_per_shard, seed, strict)
    if scheduler is not None:
        if workers:
            raise click.UsageError("--workers is for this machine, --scheduler has workers of its own")
        _check_address(scheduler)
        if is_archive(source):
            raise click.UsageError(
                "--scheduler takes class folders or tars: the workers cannot see what is unpacked here"
            )
        source, out = source.absolute(), out.absolute()
    try:
        if is_archive(source):
            echo(f"unpacking {source}", err=True)
            source = click.get_current_context().with_resource(unpacked(source, out))
        if source.is_dir() and source.resolve() == out.resolve():
            raise DataError(f"{out} is the folder of the images: name another OUT")
        splits = find_splits(source, split)
        if labels and len(splits) > 1:
            raise click.UsageError("--labels is for one split: give --split train or --split val as well")
        if val_fraction is not None and (split or list(splits) != ["train"]):
            why = f"--split {split} is given" if split else f"{source} holds {' and '.join(splits)}"
            raise click.UsageError(f"--val-fraction divides training images, but {why}: leave it out")
        if split is None:
            if not labels:
                refuse_splits_as_classes(source, splits)
            folder, more = not_read(source, splits, [path for path in (out, labels, devkit, names) if path])
            if more:
                some = ", ".join(more[:5]) + (", ..." if len(more) > 5 else "")
                echo(f"{folder} holds {some} beside {' and '.join(splits)}: not read", err=True)
        # all of them, before hours go into the first; with --resume each is looked at in its turn
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
                f"train.py needs {out / missing} too: build it from other images with --split {missing}"
                + (
                    ", or from a part of these with --val-fraction 0.2 --overwrite"
                    if missing == "val"
                    else ""
                )
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
    """All splits, listed and compared before hours go into the first."""
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
    """Dask takes what it is given, and fails at length."""
    try:
        url = urlsplit(scheduler if "://" in scheduler else f"tcp://{scheduler}")
        sound = url.scheme in ("tcp", "tls") and url.hostname and url.port and url.path in ("", "/")
    except ValueError:  # the port is not a number, the brackets of an IPv6 address do not match
        sound = False
    if not sound:
        raise click.UsageError(f"--scheduler is {scheduler!r}: give tcp://HOST:PORT")


@contextmanager
def _pools(scheduler: str | None, source: Path, out: Path) -> Iterator[Callable[..., Any] | None]:
    """What makes the pool that writes the shards: the cluster of `scheduler`, or None for this machine."""
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
    """The classes that validation labels have to follow, where the training set is there already."""
    if not (out / "train" / MANIFEST).exists():
        return None
    return [str(entry["wnid"]) for entry in Manifest.load(out / "train").classes]


def _progress_of(bar: Any) -> Callable[[int, int], None]:
    """Show on a tqdm bar what `build_split` says."""
    first = True

    def progress(done: int, total: int) -> None:
        nonlocal first
        if first:  # what an earlier run has done must not count as this one's speed
            bar.initial = bar.n = done
            bar.start_t = bar.last_print_t = time.time()
            first = False
        bar.n = done
        bar.refresh()

    return progress


def _report(summary: Summary) -> None:
    """The last lines: counts, speed and the first reasons for rejection."""
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
            f"  {len(summary.warned):,} accepted with warnings, so perhaps damaged (--strict rejects them), all in "
            f"{summary.split_dir / MANIFEST}; {summary.warned[0]['source']!r}: {summary.warned[0]['reason']}"
        )
    if summary.empty_classes:
        echo(f"  no image was accepted of {_some(summary.empty_classes)}")
    if summary.classes == 1:
        echo("  there is one class only: is SOURCE the folder that holds the class folders?")


if __name__ == "__main__":
    main()
