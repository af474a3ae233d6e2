"""The HTTP app of a tokenizer worker (`--tokenizer-worker-num`), a process that SGLang starts without its plugins."""

from sglang.srt.entrypoints.http_server import app
from sglang.srt.plugins import load_plugins

from .routes import add_routes

load_plugins()
add_routes(app)

__all__ = ["app"]
