from ..engine.conftest import pytest_sessionfinish

__all__ = ["pytest_sessionfinish"]
