"""Everything that knows SGLang: `plugin.py` lists what is hooked, docs/architecture.md follows a weight through it."""
