"""`sglang-mixed`: one word per task. Every import that takes time waits until its command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .loop import loop
from .options import AllowDifferentBase, AsJson, reported, show

app = typer.Typer(
    name="sglang-mixed",
    help="Serve one model from several checkpoints: each weight from the one that a YAML map names.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(loop)


@app.callback()
def main() -> None:
    """Serve one model from several checkpoints."""


@app.command()
def inspect(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Checkpoint folders, or cached hub names.")],
    as_json: AsJson = False,
) -> None:
    """Show what checkpoints are: model, the format of every module, bytes, and what is odd; headers alone are read."""
    with reported():
        from .inspect import describe_all, render

        show(describe_all(paths), as_json, render)


@app.command()
def check(
    map_path: Annotated[Path, typer.Argument(metavar="MAP", help="The YAML map.")],
    model_path: Annotated[
        str | None, typer.Option(help="The base model, as given to SGLang: a folder or a cached hub name.")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks to compute the bytes of one rank for.")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="Expert-parallel ranks, a divisor of --tp.")] = 1,
    allow_different_base: AllowDifferentBase = False,
    verify_values: Annotated[
        bool, typer.Option("--verify-values", help="Read every weight and refuse NaN, infinities and unfilled scales.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Resolve a map and check everything that can be checked without an engine; no weight is kept."""
    with reported():
        from .check import describe, render

        report = describe(
            map_path,
            model_path,
            allow_different_base=allow_different_base,
            tp=tp,
            ep=ep,
            verify_values=verify_values,
        )
        show(report, as_json, render)


@app.command()
def size(
    map_path: Annotated[Path, typer.Argument(metavar="MAP", help="The YAML map, or a checkpoint folder.")],
    model_path: Annotated[str | None, typer.Option(help="The base model, as given to SGLang.")] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="Expert-parallel ranks, a divisor of --tp.")] = 1,
    gpu_memory: Annotated[float, typer.Option(min=0.001, help="Memory of one GPU in GiB.")] = 80,
    mem_fraction_static: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="As given to SGLang; without it, SGLang's own rule.")
    ] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="As given to SGLang: auto, bf16, fp8_e4m3, fp8_e5m2.")] = "auto",
    allow_different_base: AllowDifferentBase = False,
    as_json: AsJson = False,
) -> None:
    """Tell what every rank will hold and read, to the byte, and how many tokens of cache fit beside it."""
    with reported():
        from .size import describe, render

        report = describe(
            map_path,
            model_path,
            tp=tp,
            ep=ep,
            gpu_memory=gpu_memory,
            mem_fraction_static=mem_fraction_static,
            kv_cache_dtype=kv_cache_dtype,
            allow_different_base=allow_different_base,
        )
        show(report, as_json, render)


@app.command()
def export(
    map_path: Annotated[Path, typer.Argument(metavar="MAP", help="The YAML map.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="The new folder.")],
    max_shard_size: Annotated[str, typer.Option(help="Most bytes of tensors in one file.")] = "5GB",
    model_path: Annotated[str | None, typer.Option(help="The base model, as given to SGLang.")] = None,
    allow_different_base: AllowDifferentBase = False,
    as_json: AsJson = False,
) -> None:
    """Write the mix as one checkpoint folder, which SGLang serves without a map; run again, it goes on."""
    with reported():
        from .export import render, run

        report = run(map_path, folder, max_shard_size, model_path, allow_different_base=allow_different_base)
        show(report, as_json, render)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Option("-m", "--model", "--model-path", help="The base model: a folder or hub name.")],
    map_path: Annotated[
        Path | None, typer.Option("-c", "--mixed-precision-config", help="The YAML map; without one, plain SGLang.")
    ] = None,
    tp: Annotated[int | None, typer.Option("-t", "--tp", "--tp-size", "--tensor-parallel-size", min=1)] = None,
    dp: Annotated[int | None, typer.Option("-d", "--dp", "--dp-size", "--data-parallel-size", min=1)] = None,
    ep: Annotated[int | None, typer.Option("-e", "--ep", "--ep-size", "--expert-parallel-size", min=1)] = None,
    address: Annotated[str | None, typer.Option("-a", "--address", metavar="HOST:PORT", help="Listen here.")] = None,
    host: Annotated[str | None, typer.Option(help="As in --address.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="As in --address.")] = None,
    nnodes: Annotated[int | None, typer.Option(min=1, help="Nodes over which the ranks are spread.")] = None,
    node_rank: Annotated[int | None, typer.Option(min=0, help="This node's number.")] = None,
    dist_init_addr: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where the nodes meet.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Instead of the node's number: its first rank.")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="With --rank; as a rule the node's GPUs.")] = None,
    world_size: Annotated[int | None, typer.Option(min=1, help="With --rank: must be tp × dp.")] = None,
    enable: Annotated[bool, typer.Option("--enable-mixed-precision", help="Said by the map already.")] = False,
    ask: Annotated[bool, typer.Option("--test", help="Start, ask one question, check the proof, stop.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print SGLang's command line instead.")] = False,
) -> None:
    """Start SGLang's server, with a map or without; flags that are not listed here are SGLang's own."""
    with reported():
        from . import serve as command

        if address is not None:
            host, port = command.parse_address(address)
        flags = (*(("--enable-mixed-precision",) if enable and map_path is None else ()), *context.args)
        launch = command.Launch(model, map_path, tp, dp, ep, host, port, nnodes, node_rank, dist_init_addr, flags)
        if rank is not None:
            launch = command.placed(launch, rank, ranks_per_node, world_size)
        command.run(launch, ask=ask, dry_run=dry_run)


@app.command()
def proof(
    url: Annotated[str, typer.Argument(metavar="URL", help="A running server, e.g. http://127.0.0.1:30000")],
    api_key: Annotated[str | None, typer.Option(envvar="SGLANG_MIXED_API_KEY", help="The server's key.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show where a running server's weights came from, and that memory holds what the files hold."""
    with reported():
        from rich.console import Console

        from .proof import fetch_proof, print_proof

        show(fetch_proof(url, api_key=api_key), as_json, lambda report: print_proof(report, Console()))


@app.command()
def experts(
    sources: Annotated[
        list[str], typer.Argument(metavar="URL|FILE...", help="Running servers and exported files; several are merged.")
    ],
    top: Annotated[int, typer.Option(min=1, help="How many experts and layers to show.")] = 10,
    layer: Annotated[int | None, typer.Option(min=0, help="Show this layer alone.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write one line per expert.")] = None,
    export: Annotated[Path | None, typer.Option(help="Write the merged statistics as JSON.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the page's pictures (needs matplotlib).")] = None,
    reset: Annotated[
        bool, typer.Option("--reset", help="Clear the servers' counts; what was cleared is shown and written.")
    ] = False,
    api_key: Annotated[str | None, typer.Option(envvar="SGLANG_MIXED_API_KEY", help="The servers' key.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show which experts a server's requests activate, and how evenly; export, merge and draw it."""
    with reported():
        from . import experts as command

        statistics = command.gather(sources, reset=reset, api_key=api_key)
        command.write(statistics, sources, csv=csv, export=export, png=png, api_key=api_key)
        show(command.describe(statistics, top, layer), as_json, command.render)


if __name__ == "__main__":
    app()
