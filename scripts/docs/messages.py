"""docs/troubleshooting.md: every message that the package raises, read from the places that raise it."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from sglang_mixed import errors
from sglang_mixed.engine.unsupported import UNSUPPORTED

SOURCE = Path(errors.__file__).parent
TREE = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.MixedPrecisionError)
}
Function = ast.FunctionDef | ast.AsyncFunctionDef
#: What parameters are called that hold a part of a message.
TEXTS = {"what", "problem", "rule", "remedy"}
HEAD = """\
# Troubleshooting by error message

<!-- Written by scripts/docs/write.py from the places that raise the errors. -->

Every error of this package says what is wrong, in which file, tensor or line, the rule it breaks, and the remedy:

```text
error: unknown source 'fp88' (did you mean 'fp8'?)
  file:   map.yaml:6
  remedy: declare it as fp88_path
```

Search this page for the words of yours; what stands in `{braces}` here is filled in there. The errors are classes, and
their tree is on top of `sglang_mixed/errors.py`; all of them are `MixedPrecisionError`. An error at the start ends the
process before a weight is loaded; a command ends with status 1. What is not an error of this package is a bug or
another program's, and keeps its traceback.
"""


@dataclass(frozen=True, slots=True, order=True)
class Message:
    """One message of one class, with the rules and remedies that it comes with."""

    kind: str
    what: str
    rule: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Scope:
    """Where an expression stands: its function, and for parameters of it what one of its callers gives."""

    function: Function | None
    given: Mapping[str, tuple[ast.expr, Scope]] = field(default_factory=dict)


class Module:
    """One source file: its calls of errors, and what the names in them stand for."""

    def __init__(self, tree: ast.Module, constants: Mapping[str, ast.expr]) -> None:
        self.constants = constants
        self.functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
        self.calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]

    def messages(self) -> Iterator[Message]:
        """All that the file raises, without errors that it only hands on."""
        for call in self.calls:
            yield from self.read(call)

    def read(self, call: ast.Call) -> list[Message]:
        """What a call says, if it makes an error."""
        kind, found = called(call), list[Message]()
        if kind not in TREE or not call.args:
            return []
        told = {keyword.arg: keyword.value for keyword in call.keywords}
        for scope in self._scopes(call):
            whats = self.texts(call.args[0], scope)
            rules, remedies = (self.texts(told.get(name), scope) for name in ("rule", "remedy"))
            for place, what in enumerate(whats):
                found.append(Message(kind, what, _beside(rules, place, whats), _beside(remedies, place, whats)))
        return found

    def texts(self, node: ast.expr | None, scope: Scope) -> list[str]:
        """Every text that an expression can be; none for what another error says."""
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=values):
                return ["".join(part.value if isinstance(part, ast.Constant) else _blank(part) for part in values)]
            case ast.IfExp(body=one, orelse=other):
                return self.texts(one, scope) + self.texts(other, scope)
            case ast.BinOp(left=left, right=right):
                pairs = product(*(self.texts(side, scope) or ["{...}"] for side in (left, right)))
                return ["".join(pair) for pair in pairs]
            case ast.BoolOp(values=values):
                return [text for value in values for text in self.texts(value, scope)]
            case ast.Name():
                return [text for value, there in self._values(node, scope) for text in self.texts(value, there)]
            case ast.Subscript(value=ast.Name(id=name)):
                table = self.constants.get(name)
                return [text for value in getattr(table, "values", ()) for text in self.texts(value, scope)]
        return []

    def _values(self, node: ast.Name, scope: Scope) -> list[tuple[ast.expr, Scope]]:
        if node.id in scope.given:
            return [scope.given[node.id]]
        # What the statements beside it assign comes before what any branch may have.
        beside = [
            value for one in _block(scope.function, node) for target, value in _assigned(one) if target == node.id
        ]
        if beside:
            return [(beside[-1], scope)]
        found = [value for one in _walk(scope.function) for target, value in _assigned(one) if target == node.id]
        if not found and node.id in self.constants:
            found = [self.constants[node.id]]
        return [(value, scope) for value in found]

    def _scopes(self, call: ast.Call) -> list[Scope]:
        """One for each caller in this file of the function around a call that hands on what it was given."""
        around = [one for one in self.functions if one.lineno <= call.lineno <= (one.end_lineno or 0)]
        function = max(around, key=lambda one: one.lineno, default=None)
        parameters, scopes = _parameters(function), []
        said = {
            one.id for one in (*call.args, *(keyword.value for keyword in call.keywords)) if isinstance(one, ast.Name)
        }
        if function is None or not said & TEXTS & {*parameters}:
            return [Scope(function)]
        for caller in self.calls:
            if called(caller) == function.name and caller is not call:
                given = dict(zip(parameters, caller.args, strict=False))
                given |= {keyword.arg: keyword.value for keyword in caller.keywords if keyword.arg}
                for scope in self._scopes(caller):
                    scopes.append(Scope(function, {name: (value, scope) for name, value in given.items()}))
        return scopes or [Scope(function)]


def called(call: ast.Call) -> str:
    """The name of what is called."""
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


def _parameters(function: Function | None) -> list[str]:
    if function is None:
        return []
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    return names[names[:1] in (["self"], ["cls"]) :]


def _walk(function: Function | None) -> Iterator[ast.AST]:
    return ast.walk(function) if function else iter(())


def _block(function: Function | None, node: ast.expr) -> list[ast.stmt]:
    """The statements before `node` in the innermost block around it."""
    blocks = [
        block
        for one in _walk(function)
        for name in ("body", "orelse")
        if isinstance(block := getattr(one, name, None), list)
    ]
    around = [block for block in blocks if block and block[0].lineno <= node.lineno <= (block[-1].end_lineno or 0)]
    return [one for one in max(around, key=lambda block: block[0].lineno, default=[]) if one.lineno < node.lineno]


def _assigned(one: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """The names that a statement gives values, and these."""
    if isinstance(one, ast.Assign | ast.AnnAssign) and one.value is not None:
        for target in one.targets if isinstance(one, ast.Assign) else [one.target]:
            if isinstance(target, ast.Tuple) and isinstance(one.value, ast.Tuple):
                pairs = zip(target.elts, one.value.elts, strict=False)
                yield from ((part.id, value) for part, value in pairs if isinstance(part, ast.Name))
            elif isinstance(target, ast.Name):
                yield target.id, one.value


def _blank(part: ast.expr) -> str:
    """`{name}` for what is filled in, by the last word of the expression."""
    words = re.findall(r"[A-Za-z_]+", ast.unparse(part.value)) if isinstance(part, ast.FormattedValue) else []
    return "{" + (words[-1].strip("_") if len(words) in (1, 2) else "...") + "}"


def _beside(texts: list[str], place: int, whats: list[str]) -> str:
    return texts[place] if len(texts) == len(whats) else "; or: ".join(dict.fromkeys(texts))


@functools.cache
def _trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py")) if path.stem != "errors"}


@functools.cache
def constants() -> dict[str, ast.expr]:
    """Every value that a module gives a name, by that name."""
    statements = [statement for tree in _trees().values() for statement in tree.body]
    return {name: value for statement in statements for name, value in _assigned(statement)}


def all_messages() -> list[Message]:
    """Every message of the package."""
    return sorted({message for tree in _trees().values() for message in Module(tree, constants()).messages()})


def page() -> str:
    """The page in Markdown."""
    found, lines = all_messages(), [HEAD]
    for name, kind in TREE.items():
        messages = [message for message in found if message.kind == name]
        if not messages:
            continue
        lines += [
            f"## {name}",
            "",
            (kind.__doc__ or "").strip(),
            "",
            "| message | rule | remedy |",
            "| --- | --- | --- |",
        ]
        lines += [f"| {_code(one.what)} | {_cell(one.rule)} | {_cell(one.remedy)} |" for one in messages]
        lines.append("")
        if name == "UnsupportedError":
            lines += [*_flags(), ""]
    return "\n".join(lines)


def _flags() -> list[str]:
    lines = [
        "The flags of SGLang that cannot be combined with a map:",
        "",
        "| flags | rule | remedy |",
        "| --- | --- | --- |",
    ]
    for group in UNSUPPORTED:
        flags = ", ".join(
            f"`--{name.replace('_', '-')}`" + (f" (other than {', '.join(map(str, allowed))})" if allowed else "")
            for name, allowed in group.allowed.items()
        )
        lines.append(f"| {flags} | {group.rule} | {_cell(group.remedy.format(flag='it'))} |")
    return lines


def _code(text: str) -> str:
    fence = "``" if "`" in text else "`"
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{_cell(text)}{pad}{fence}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
