"""docs/commands.md: the commands and their options, from the program itself."""

from __future__ import annotations

from typing import Any

import typer

from sglang_mixed.cli.main import app

HEAD = """\
# Commands

<!-- Written by scripts/docs/write.py from the program itself. -->

`sglang-mixed COMMAND --help` tells the same. A command prints a table, or JSON with `--json` where it has that flag; an
error is one message on standard error and exit status 1 ([all of them](troubleshooting.md)).
"""


def page() -> str:
    """The page in Markdown."""
    group: Any = typer.main.get_command(app)
    return "\n".join(
        [HEAD, *(line for name in sorted(group.commands) for line in _section(name, group.commands[name]))]
    )


def _section(name: str, command: Any) -> list[str]:
    arguments = [one.metavar for one in command.params if one.param_type_name == "argument"]
    lines = [
        f"## {name}",
        "",
        (command.help or "").strip(),
        "",
        "```text",
        " ".join(["sglang-mixed", name, *arguments, "[OPTIONS]"]),
    ]
    lines += ["```", "", "| option | meaning | default |", "| --- | --- | --- |"]
    for option in command.params:
        if option.param_type_name == "option":
            names = ", ".join(f"`{one}`" for one in option.opts)
            default = "" if option.default is None or option.is_flag else f"`{option.default}`"
            lines.append(f"| {names} | {option.help or ''} | {default} |")
    return [*lines, ""]
