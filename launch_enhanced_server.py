"""An older name of launch_sglang_mixed_precision.py: --config MAP --model MODEL [any SGLang flag]."""

import sys

from sglang_mixed.cli.main import app

if __name__ == "__main__":
    app(["serve", *("-c" if one == "--config" else one for one in sys.argv[1:])])
