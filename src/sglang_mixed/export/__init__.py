"""A mix as one self-contained checkpoint folder."""

from .export import export

__all__ = ["export"]
