"""`paracomm train`: a byte-level GPT, trained on one process or on a mesh of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from paracomm.cli.options import count, real
from paracomm.errors import Error, InvalidArgument

if TYPE_CHECKING:
    from paracomm.train.check import Agreement
    from paracomm.train.config import TrainConfig


def train(
    width: Annotated[int, count("Width of the model; a multiple of --heads.")] = 128,
    depth: Annotated[int, count("Number of blocks.")] = 4,
    heads: Annotated[int, count("Attention heads.")] = 4,
    context: Annotated[int, count("Longest sequence, in bytes.")] = 128,
    dropout: Annotated[float, real("Dropout in the blocks.", most=1)] = 0.0,
    steps: Annotated[int, count("Optimizer steps.")] = 2000,
    batch: Annotated[int, count("Sequences a step, over all ranks.")] = 12,
    accumulate: Annotated[int, count("Backward passes a step on each rank.")] = 1,
    lr: Annotated[float, real("Peak learning rate.", above=0)] = 3e-3,
    warmup: Annotated[int, count("Steps of linear warm-up.", 0)] = 100,
    weight_decay: Annotated[float, real("AdamW's decay of matrices.")] = 0.1,
    clip: Annotated[float, real("Largest global norm of the gradients.", above=0)] = 1.0,
    seed: Annotated[int, count("Decides weights, data order and dropout.", 0, 2**63 - 1)] = 0,
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    kernels: Annotated[
        str, typer.Option(help="auto, eager (torch's own operations), or triton (refused where they cannot run).")
    ] = "auto",
    dp: Annotated[
        int | None,
        count("Ranks that share a batch; default: what --cp and --tp leave.", show_default=False),
    ] = None,
    tp: Annotated[int, count("Ranks that share each layer; a divisor of --heads.")] = 1,
    cp: Annotated[int, count("Ranks that share each sequence; --context a multiple of 2 CP.")] = 1,
    zero: Annotated[int, count("0 to 3: dp ranks share states, gradients too, weights too.", 0, 3)] = 0,
    pp: Annotated[int, count("Ranks that share the layers, cut by what each costs here.")] = 1,
    schedule: Annotated[
        str, typer.Option(help="Of the pipeline: gpipe, 1f1b, interleaved, zb-h1, zbv, dualpipev.")
    ] = "1f1b",
    microbatches: Annotated[
        int | None,
        count("Of a rank's sequences, in the pipeline at a time; default: 2 PP.", show_default=False),
    ] = None,
    sequence: Annotated[
        bool, typer.Option("--sequence", help="Sequence parallel: tp ranks share activations too.")
    ] = False,
    cp_method: Annotated[str, typer.Option(help="How attention goes over cp: ring or ulysses.")] = "ring",
    hook: Annotated[
        str | None, typer.Option(help="How gradients travel: int8, bf16, ... default: as they are.", show_default=False)
    ] = None,
    recompute: Annotated[str, typer.Option(help="In backward: none, selective (attention), full (blocks).")] = "none",
    precision: Annotated[
        str | None, typer.Option(help="bfloat16, with weights of --dtype in the optimizer.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A text file or a folder of them; default: Python's own sources.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the run.")] = "gpt",
    runs: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    log_every: Annotated[int, count("Steps between metrics.")] = 20,
    eval_every: Annotated[int, count("Steps between evaluations on held-out files.")] = 500,
    checkpoint_every: Annotated[int, count("Steps between checkpoints.")] = 500,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of checkpoints; default: RUNS/NAME/checkpoints.", show_default=False)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint, in the same layout or another one.")
    ] = False,
    bucket_mib: Annotated[float, real("Size of a gradient bucket, MiB.", above=0)] = 2.0,
    reducer: Annotated[str, typer.Option(help="paracomm, or ddp for torch DDP.")] = "paracomm",
    backend: Annotated[str, typer.Option(help="torch.distributed backend of --reducer ddp.")] = "gloo",
    prompt: Annotated[str, typer.Option(help="Start of the sample.")] = "def ",
    sample_bytes: Annotated[int, count("Length of the sample.", 0)] = 400,
    trace: Annotated[
        Path | None, typer.Option(help="Folder for what each rank did in some steps; then `paracomm trace FOLDER`.")
    ] = None,
    trace_steps: Annotated[int, count("Steps of --trace, after warm-up.")] = 3,
    check: Annotated[
        bool, typer.Option("--check", help="Compare a few steps of this layout with one process instead.")
    ] = False,
    check_steps: Annotated[int, count("Steps of --check.")] = 5,
) -> None:
    """Train a byte-level GPT on any layout of ranks, by default on the Python standard library's own sources.

    One process by itself, or several: torchrun --nproc-per-node 4 -m paracomm train --tp 2 --zero 2

    Ends with 2 for what cannot be, in an option, a file or a folder, and with 1 for what fails in training.
    """
    try:
        from paracomm.models.gpt import GPTConfig
        from paracomm.parallel import Layout
        from paracomm.train.config import TrainConfig
    except ModuleNotFoundError as error:
        typer.echo(f"train needs {error.name}: pip install 'paracomm[train]'", err=True)
        raise typer.Exit(2) from error
    code = 2
    try:
        config = TrainConfig(
            model=GPTConfig(width=width, depth=depth, heads=heads, context=context, dropout=dropout),
            layout=Layout(
                dp=dp,
                cp=cp,
                tp=tp,
                zero=zero,
                sequence=sequence,
                cp_method=cast("Any", cp_method),
                hook=hook,
                recompute=cast("Any", recompute),
                precision=precision,
                pp=pp,
                schedule=schedule,
                microbatches=microbatches,
            ),
            steps=steps,
            batch=batch,
            accumulate=accumulate,
            lr=lr,
            warmup=warmup,
            weight_decay=weight_decay,
            clip=clip,
            seed=seed,
            dtype=dtype,
            kernels=kernels,
            data=data,
            name=name,
            runs=runs,
            log_every=log_every,
            eval_every=eval_every,
            checkpoint_every=checkpoint_every,
            checkpoint=checkpoint,
            resume=resume,
            bucket_mib=bucket_mib,
            reducer=reducer,
            backend=backend,
            prompt=prompt,
            sample_bytes=sample_bytes,
            trace=trace,
            trace_steps=trace_steps,
        )
        if check and trace is not None:
            raise InvalidArgument("train: --trace with --check, which trains in two ways: give one of them")
        code = 1
        agreed = _check(config, check_steps) if check else _train(config)
    except Error as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, InvalidArgument) else code) from error
    if not agreed:
        raise typer.Exit(1)


def _train(config: TrainConfig) -> bool:
    from paracomm.train.loop import train as run

    run(config)
    return True


def _check(config: TrainConfig, steps: int) -> bool:
    import os

    from paracomm.train.check import check as compare

    rows = compare(config, steps)
    agreed = bool(rows) and all(row.ok for row in rows)
    if os.environ.get("RANK", "0") == "0":
        _print_agreement(rows, agreed)
    return agreed


def _print_agreement(rows: list[Agreement], agreed: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from paracomm.train.check import TOLERANCE

    table = Table(title="this layout against one process, relative errors")
    for column in ("dtype", "step", "loss", "error", "norm", "weights", "limit", "worst in", "ranks hold", ""):
        table.add_column(column, overflow="fold")
    for row in rows:
        errors = [f"{error:.0e}" for error in (row.loss_error, row.norm_error, row.weight_error)]
        table.add_row(
            row.dtype,
            str(row.step),
            f"{row.loss:.4f}",
            *errors,
            f"{TOLERANCE[row.dtype]:.0e}",
            row.worst_parameter.removesuffix(".weight"),
            "same bits" if row.identical_ranks else "DIFFERENT BITS",
            "ok" if row.ok else "FAIL",
        )
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)
    console.print("losses and weights agree" if agreed else "losses or weights DISAGREE")
