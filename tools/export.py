"""Export a trained network for other programs: python tools/export.py RUN --onnx FILE --safetensors FILE ..."""

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
@cli.file_option("--onnx", "Write an ONNX file and verify it with ONNX Runtime.")
@cli.file_option("--safetensors", "Write the weights as a safetensors file.")
@cli.file_option("--torchvision", "Write a state dict for torchvision.models.alexnet (only for variant owt).")
@cli.file_option("--from-torchvision", "Import such a state dict instead: make a checkpoint (--out).")
@cli.file_option("--out", "Checkpoint (.pt) that --from-torchvision writes.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Data set to take the classes for --from-torchvision from.",
)
@click.option(
    "--names",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="File of `wnid name` lines to take the classes from, for example LOC_synset_mapping.txt.",
)
@cli.option(
    "--mean",
    type=float,
    nargs=3,
    default=None,
    show_default="torchvision's, of ImageNet",
    help="Channel means that the imported weights expect to be subtracted from pixels in 0..1.",
)
@cli.option(
    "--std",
    type=float,
    nargs=3,
    default=None,
    show_default="torchvision's, of ImageNet",
    help="Channel deviations that they then expect the pixels to be divided by.",
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

    Inputs are (N, 3, crop, crop) float32, RGB in 0..255 minus the mean; outputs are logits. The metadata of ONNX
    and safetensors files describes the preprocessing and the classes (see docs/tools.md and the example
    docs/onnx_predict.py).

    --from-torchvision makes a checkpoint for evaluate.py, predict.py and show.py. Without --data and --names, the
    classes are numbers, with torchvision's names if there are 1000.

    --onnx and --safetensors need the extra packages of `pip install -e '.[export]'`.
    """
    outputs = {"onnx": onnx_path, "safetensors": safetensors_path, "torchvision": torchvision_path}
    if from_torchvision_path:
        if run or any(outputs.values()):
            raise click.UsageError(
                "--from-torchvision takes no RUN and exports nothing: export the checkpoint afterwards"
            )
        if not out_path:
            raise click.UsageError("--from-torchvision needs --out: give the checkpoint to write")
        if data and names:
            raise click.UsageError("--data and --names both give the classes: give one of them")
        from tools.lib import formats

        normalisation = {name: value for name, value in (("mean", mean), ("std", std)) if value}
        message = formats.from_torchvision(
            from_torchvision_path, out_path, data=data, names=names, **normalisation
        )
        cli.echo(cli.printable(message))
        return
    if out_path or data or names:
        raise click.UsageError("--out, --data and --names need --from-torchvision")
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
