"""Hooks around methods are what SGLang's registry would make of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang_mixed.engine.plugin import wrap_method

from .launch import zygote

COPIES = """
import sys
from types import ModuleType
from sglang.srt.plugins import load_plugins
from sglang_mixed.engine import plugin

wrap, wrapped = plugin.wrap_method, []

def note(cls, name, hook):
    wrap(cls, name, hook)
    wrapped.append(vars(cls)[name])

plugin.wrap_method = note
load_plugins()
originals = {id(getattr(one, "__func__", one).__wrapped__) for one in wrapped}
assert len(originals) > 10
modules = [module for module in sys.modules.values() if isinstance(module, ModuleType)]
copies = [(module, name) for module in modules for name, one in list(vars(module).items()) if id(one) in originals]
assert len(modules) > 1000 and not copies, copies
"""


class Base:
    def inherited(self, number: int) -> list[Any]:
        return [self, number]


class Methods(Base):
    def own(self, number: int) -> list[Any]:
        return [self, number]

    @classmethod
    def of_the_class(cls, number: int) -> list[Any]:
        return [cls, number]

    @staticmethod
    def of_nothing(number: int) -> list[Any]:
        return [None, number]


def hook(original: Callable[..., list[Any]], *args: Any, **kwargs: Any) -> list[Any]:
    return [*original(*args, **kwargs), "hooked"]


def test_a_method_of_any_kind_keeps_its_kind_and_its_name() -> None:
    for name in ("own", "of_the_class", "of_nothing", "inherited"):
        wrap_method(Methods, name, hook)
        assert getattr(Methods, name).__name__ == name
    methods = Methods()
    assert methods.own(1) == [methods, 1, "hooked"]
    assert methods.inherited(number=2) == [methods, 2, "hooked"]
    assert Base().inherited(2)[1:] == [2]
    assert Methods.of_the_class(3) == methods.of_the_class(3) == [Methods, 3, "hooked"]
    assert Methods.of_nothing(4) == methods.of_nothing(4) == [None, 4, "hooked"]


def test_no_module_holds_a_copy_of_a_method_that_is_wrapped(tmp_path: Path) -> None:
    job = zygote().start(tmp_path / "log", COPIES)
    assert job.wait(120) == 0, (tmp_path / "log").read_text()
