"""Maps that exhaust a parser, that mean something else than they say, or that ask for code."""

from __future__ import annotations

from typing import Any

from sglang_mixed.errors import MapSyntaxError, MissingFileError, PatternError, UnknownKeyError, UnknownSourceError

from .base import Attack, append_map, rewrite_map

MAP = "map.yaml"
RULE = '    "model.layers.0.mlp.experts.0.**": fp8'


def _whole(text: str | bytes) -> Any:
    return lambda folder: (folder / MAP).write_bytes(text if isinstance(text, bytes) else text.encode())


def _rule(pattern: str, source: str = "fp8") -> Any:
    return rewrite_map(RULE, f'    "{pattern}": {source}')


_BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
ATTACKS = [
    Attack("aliases that double nine times", _whole(_BOMB), MapSyntaxError, "no anchors", MAP),
    Attack("a mapping that holds itself", _whole("mixed_precision: &a\n  default: *a\n"), MapSyntaxError, "no anchors", MAP),
    Attack("a tag that runs a command", _whole("mixed_precision: !!python/object/apply:os.system [touch opened]\n"), MapSyntaxError, "plain", MAP),
    Attack("100,000 nested lists", _whole("a: " + "[" * 100_000), MapSyntaxError, "YAML", MAP),
    Attack("20 MB of map", _whole(b"#" * (20 << 20)), MapSyntaxError, "at most 16 MiB", MAP),
    Attack("a map that is not UTF-8", _whole(b"\xff\xfe\0"), MapSyntaxError, "", MAP),
    Attack("a map that is a list", _whole("- a\n"), MapSyntaxError, "mapping of sections", MAP),
    Attack("an empty map", _whole(""), MapSyntaxError, "mapping of sections", MAP),
    Attack("two documents in a file", append_map("---\nmixed_precision: {}\n"), MapSyntaxError, "", MAP),
    Attack("a merge key", append_map('inference: {"<<": {dtype: auto}}\n'), UnknownKeyError, "known keys", MAP),
    Attack("a section given twice", append_map("mixed_precision: {}\n"), MapSyntaxError, "stands once", MAP),
    Attack("a pattern given twice", rewrite_map(RULE, f"{RULE}\n{RULE}"), MapSyntaxError, "stands once", MAP),
    Attack("no as a source", _rule("lm_head", "no"), MapSyntaxError, "", MAP),
    Attack("on as a source", _rule("lm_head", "on"), MapSyntaxError, "", MAP),
    Attack("off as a key", rewrite_map("  default: bf16", "  off: bf16"), MapSyntaxError, "", MAP),
    Attack("a number as a source", _rule("lm_head", "1e5"), UnknownSourceError, "declared", MAP),
    Attack("a date as a source", _rule("lm_head", "2026-01-01"), MapSyntaxError, "plain", MAP),
    Attack("a misspelt key", rewrite_map("  default:", "  defualt:"), UnknownKeyError, "known keys", MAP),
    Attack("a source nobody declares", _rule("lm_head", "fp9"), UnknownSourceError, "declared", MAP),
    Attack("a pattern of 1 MB", _rule("x" * (1 << 20)), MapSyntaxError, "YAML", MAP),
    Attack("a pattern of 1,001 characters", _rule("x" * 1001), PatternError, "at most 1000 characters", MAP),
    Attack("braces that stand for 10^15 names", _rule("{0..65535}{0..65535}{0..65535}"), PatternError, "braces", MAP),
    Attack("nine ranges of 60,000 numbers", _rule(".".join(f"{{{one}..{60_000 + one}}}" for one in range(9))), PatternError, "all parts", MAP),
    Attack("a range of 10^9 numbers", _rule("model.layers.{0..999999999}.**"), PatternError, "range", MAP),
    Attack("a range that counts down", _rule("model.layers.{9..0}.**"), PatternError, "range", MAP),
    Attack("2^20 alternatives with dots", _rule(".".join(["{a.b,c.d}"] * 20)), PatternError, "alternatives", MAP),
    Attack("a glob that backtracks", _rule("*a" * 400 + "b"), PatternError, "a pattern names", MAP),
    Attack("300 times any number of parts", _rule("**.a." * 190 + "b"), PatternError, "a pattern names", MAP),
    Attack("braces that do not end", _rule("model.{a,b"), PatternError, "pairs", MAP),
    Attack("a pattern that names nothing", _rule("model.layers.0.mlp.experts.7.**"), PatternError, "a pattern names", MAP),
    Attack("a source that is a file", rewrite_map("fp8_path: ", "fp8_path: /etc/passwd # "), MissingFileError, "is a folder", MAP),
    Attack("a source of 5,000 characters", rewrite_map("fp8_path: ", f"fp8_path: {'x' * 5000} # "), MissingFileError, "is a folder", MAP),
    Attack("a NUL in a source", rewrite_map("fp8_path: ", 'fp8_path: "a\\0b" # '), MissingFileError, "is a folder", MAP),
    Attack("a source of nobody's home", rewrite_map("fp8_path: ", "fp8_path: ~nobody-at-all/x # "), MissingFileError, "is a folder", MAP),
    Attack("a port of 99,999", append_map("server: {port: 99999}\n"), MapSyntaxError, "", MAP),
    Attack("an infinite length", append_map("inference: {max_seq_length: .inf}\n"), MapSyntaxError, "", MAP),
]  # fmt: skip
