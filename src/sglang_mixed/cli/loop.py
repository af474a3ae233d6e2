"""The commands of the loop that writes maps and shows what they gain: sensitivity, plan, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import AllowDifferentBase, AsJson, reported, show

loop = typer.Typer()
Sources = Annotated[
    list[str] | None, typer.Argument(metavar="[MAP | NAME=PATH...]", help="A map whose sources are meant, or sources.")
]
FirstSource = Annotated[
    list[str] | None, typer.Option("--sources", metavar="NAME=PATH", help="Sources; more may follow as arguments.")
]
SplitMatrices = Annotated[
    bool, typer.Option("--split", help="Let parts of a fused matrix and of an expert differ (a GPU runs it in part).")
]
TrafficCounts = Annotated[
    str | None, typer.Option(metavar="FILE|URL", help="What the experts did: their errors are weighted by use.")
]


@loop.command()
def sensitivity(
    sources: Sources = None,
    first: FirstSource = None,
    text: Annotated[
        Path | None, typer.Option(help="Run the model on this text: KL divergence of its predictions.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text to measure on.")] = 4096,
    window: Annotated[int, typer.Option(min=2, help="Tokens that are read together.")] = 256,
    split: SplitMatrices = False,
    experts: TrafficCounts = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The JSON file; resumes what it holds.")] = None,
    allow_different_base: AllowDifferentBase = False,
    as_json: AsJson = False,
) -> None:
    """Measure the error that each source brings to each part: of its weights, or with --text of the model's output."""
    with reported():
        from .sensitivity import render, run

        report = run(
            [*(first or ()), *(sources or ())],
            text,
            output,
            tokens=tokens,
            window=window,
            split=split,
            experts=experts,
            allow_different_base=allow_different_base,
        )
        show(report, as_json, lambda report: render(report, output))


@loop.command()
def plan(
    sources: Sources = None,
    first: FirstSource = None,
    budget: Annotated[str | None, typer.Option(help="Bytes of weights of the fullest rank, e.g. 24GiB.")] = None,
    bits: Annotated[float | None, typer.Option(help="Bits a weight, on average over the model.")] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="Expert-parallel ranks, a divisor of --tp.")] = 1,
    errors: Annotated[
        Path | None,
        typer.Option("--sensitivity", help="Errors measured by sensitivity; else those expected of formats."),
    ] = None,
    experts: TrafficCounts = None,
    formats_per_layer: Annotated[int, typer.Option(min=1, help="Formats among a layer's experts: launches.")] = 3,
    split: SplitMatrices = False,
    output: Annotated[Path, typer.Option("-o", "--output", help="The map to write.")] = Path("map.yaml"),
    picture: Annotated[Path | None, typer.Option("--png", help="Error against bytes, as a picture.")] = None,
    allow_different_base: AllowDifferentBase = False,
    as_json: AsJson = False,
) -> None:
    """Write the map of least error within a budget: for each module and expert, the source it comes from."""
    with reported():
        from .plan import render, run

        report = run(
            [*(first or ()), *(sources or ())],
            output,
            budget=budget,
            bits=bits,
            tp=tp,
            ep=ep,
            sensitivity=errors,
            experts=experts,
            formats_per_layer=formats_per_layer,
            split=split,
            picture=picture,
            allow_different_base=allow_different_base,
        )
        show(report, as_json, render)


@loop.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def compare(
    context: typer.Context,
    one: Annotated[str, typer.Argument(metavar="A", help="A server's address, or a map or checkpoint to serve.")],
    other: Annotated[str, typer.Argument(metavar="B", help="Likewise.")],
    text: Annotated[Path, typer.Option(help="The text that both predict.")],
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to read.")] = 8192,
    window: Annotated[int, typer.Option(min=2, help="Tokens that are read together.")] = 256,
    top: Annotated[int, typer.Option(min=1, help="Likeliest tokens to compare; the others count as one.")] = 128,
    api_key: Annotated[str | None, typer.Option(help="The servers' key.")] = None,
    picture: Annotated[Path | None, typer.Option("--png", help="The comparison as a picture.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what B predicts otherwise than A, and what it saves; further flags are SGLang's, for maps served here."""
    with reported():
        from .compare import render, run

        given, flags = (one, other), tuple(context.args)
        report = run(given, text, tokens=tokens, window=window, top=top, api_key=api_key, picture=picture, flags=flags)
        show(report, as_json, render)
