"""Hand a trained network to other programs: python tools/export.py RUN --onnx FILE --safetensors FILE ..."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from tools.lib import cli


@click.command(
    context_settings=cli.CONTEXT,
    epilog=cli.examples(
        "python tools/export.py runs/paper --onnx alexnet.onnx --safetensors alexnet.safetensors",
        "python tools/export.py --from-torchvision alexnet-owt-7be5be79.pth --out alexnet.pt",
    ),
)
@cli.run_argument(required=False)
@cli.file_option("--onnx", "Write an ONNX file, checked with ONNX Runtime; LRN is ONNX's own operator.")
@cli.file_option("--safetensors", "Write the state dict as a safetensors file.")
@cli.file_option("--torchvision", "Write a state dict for torchvision.models.alexnet (variant owt only).")
@cli.file_option("--from-torchvision", "The way back: make a checkpoint (--out) of such a state dict.")
@cli.file_option("--out", "The checkpoint (.pt) that --from-torchvision makes.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Take the classes for --from-torchvision from this data set.",
)
@click.option(
    "--names",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Take them from this file of `wnid name` lines, for example LOC_synset_mapping.txt.",
)
@cli.option(
    "--mean",
    type=float,
    nargs=3,
    default=None,
    show_default="torchvision's, of ImageNet",
    help="Mean for each channel that those weights expect to be subtracted from pixels in 0..1.",
)
@cli.option(
    "--std",
    type=float,
    nargs=3,
    default=None,
    show_default="torchvision's, of ImageNet",
    help="Standard deviation for each channel that they expect the difference to be divided by.",
)
def main(
    run: Path | None,
    onnx_path: Path | None,
    safetensors_path: Path | None,
    torchvision_path: Path | None,
    from_torchvision_path: Path | None,
    out_path: Path | None,
    data: Path | None,
    names: Path | None,
    mean: tuple[float, float, float] | None,
    std: tuple[float, float, float] | None,
) -> None:
    """Write the network of RUN, a folder that train.py wrote or a checkpoint, for other programs.

    Inputs are (N, 3, crop, crop) float32, RGB levels of 0..255 minus the mean; outputs are logits. ONNX and
    safetensors files say in their metadata how to make inputs of photographs and what the outputs are called
    (docs/tools.md); docs/onnx_predict.py does it in a few lines.

    --from-torchvision makes a checkpoint for evaluate.py, predict.py and show.py. Without --data and --names the
    classes are numbers, with torchvision's names where there are 1000.

    --onnx and --safetensors need the extra packages of `pip install -e '.[export]'`.
    """
    outputs = {"onnx": onnx_path, "safetensors": safetensors_path, "torchvision": torchvision_path}
    if from_torchvision_path:
        if run or any(outputs.values()):
            raise click.UsageError("--from-torchvision makes a checkpoint and takes no RUN; export that next")
        if not out_path:
            raise click.UsageError("--from-torchvision needs --out for the checkpoint")
        if data and names:
            raise click.UsageError("the classes come from --data or from --names: give one of them")
        from tools.lib import formats

        normalisation = {name: value for name, value in (("mean", mean), ("std", std)) if value}
        made = formats.from_torchvision(
            from_torchvision_path, out_path, data=data, names=names, **normalisation
        )
        cli.echo(cli.printable(made))
        return
    if out_path or data or names:
        raise click.UsageError("--out, --data and --names go with --from-torchvision")
    if not run:
        raise click.UsageError("give a RUN to export, or --from-torchvision")
    if not any(outputs.values()):
        raise click.UsageError("nothing to write: give --onnx, --safetensors or --torchvision")
    from tools.lib import formats
    from tools.lib.runs import load_run

    trained = load_run(run)
    for kind, path in outputs.items():
        if path:
            write = partial(formats.WRITERS[kind], trained)
            cli.echo(cli.printable(f"{path}: {formats.write_file(path, write)}"))


if __name__ == "__main__":
    main()
