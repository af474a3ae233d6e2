"""SGLang with a map: --model MODEL --mixed-precision-config MAP [--device D] [--dtype T] [--test] [any SGLang flag]."""

import sys

from sglang_mixed.cli.main import app

if __name__ == "__main__":
    app(["serve", *sys.argv[1:]])
