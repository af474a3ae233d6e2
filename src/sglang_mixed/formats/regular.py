"""Regular expressions out of a checkpoint's config, refused where they could take more than a blink on a name.

Python's `re` backtracks: `(a+)+$` takes 2^n steps on a name of n characters. What is let through has no repetition
inside a repetition, and few that can share out the same characters in several ways.
"""

from __future__ import annotations

import re
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from ..errors import FormatError

#: Repetitions of one expression that may compete for the same characters: a name of 60 takes 60^4 steps at worst.
MAX_COMPETING = 4
MAX_LENGTH = 20_000
_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT)


def compile_regex(regex: str) -> re.Pattern[str]:
    """The compiled expression. Raises FormatError for what is none, or could take exponentially long."""
    try:
        if len(regex) > MAX_LENGTH:
            raise _costly(regex, f"it has {len(regex)} characters")
        parsed = _parser.parse(regex)
        if (competing := _competing(parsed, regex)) > MAX_COMPETING:
            raise _costly(regex, f"{competing} repetitions may compete for the same characters")
        return re.compile(regex)
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        raise FormatError(
            f"quantization_config holds {regex!r:.200}, which is not a regular expression: {error}",
            rule="module names in dynamic, extra_config, ignore and targets are Python regular expressions",
            remedy="correct quantization_config in config.json",
        ) from error


def _costly(regex: str, why: str) -> FormatError:
    return FormatError(
        f"quantization_config holds the regular expression {regex!r:.200}: {why}",
        rule=f"no repetition within a repetition, and at most {MAX_COMPETING} that may compete, in at most "
        f"{MAX_LENGTH} characters",
        remedy="write it more plainly in config.json, e.g. one expression a projection",
    )


def _competing(items: Any, regex: str) -> int:
    """How many repetitions in a row may share out the same characters. Raises FormatError where they nest."""
    total, listed = 0, list(items)
    for (kind, argument), following in zip(listed, [*listed[1:], (None, None)], strict=False):
        if kind in _REPEATS:
            least, most, body = argument
            inner = _competing(body, regex)
            if most > 1 and (inner or _branches(body)):
                raise _costly(regex, "a repetition within a repetition")
            total += inner + (least != most and not _ends_before(body, following))
        elif kind is codes.BRANCH:
            total += max((_competing(branch, regex) for branch in argument[1]), default=0)
        else:
            total += sum(_competing(part, regex) for part in _parts(argument))
    return total


def _parts(argument: Any) -> list[Any]:
    """The expressions inside a group, a look-around or a conditional."""
    if isinstance(argument, _parser.SubPattern):
        return [argument]
    return [part for one in argument for part in _parts(one)] if isinstance(argument, tuple) else []


def _branches(body: Any) -> bool:
    return any(kind is codes.BRANCH or any(map(_branches, _parts(argument))) for kind, argument in body)


def _ends_before(body: Any, following: tuple[Any, Any]) -> bool:
    """Whether the repeated character is never the one that must follow: `\\d+\\.` gives nothing back."""
    kind, wanted = following
    if kind is not codes.LITERAL or len(body) != 1:
        return False
    code, argument = body[0]
    if code is codes.LITERAL:
        return bool(argument != wanted)
    if code is not codes.IN:
        return False
    one = re.compile(_character_class(argument)) if _is_simple(argument) else None
    return one is not None and one.fullmatch(chr(wanted)) is None


_CLASSES = {codes.CATEGORY_DIGIT: r"\d", codes.CATEGORY_WORD: r"\w", codes.CATEGORY_SPACE: r"\s"}


def _is_simple(argument: Any) -> bool:
    known = (codes.LITERAL, codes.RANGE, codes.NEGATE)
    return all(code in known or (code is codes.CATEGORY and value in _CLASSES) for code, value in argument)


def _character_class(argument: Any) -> str:
    pieces = ["["]
    for code, value in argument:
        if code is codes.NEGATE:
            pieces.append("^")
        elif code is codes.CATEGORY:
            pieces.append(_CLASSES[value])
        else:
            ends = value if code is codes.RANGE else (value, value)
            pieces.append("-".join(f"\\U{end:08x}" for end in ends))
    return "".join([*pieces, "]"])
