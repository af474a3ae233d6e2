"""One process per rank, started by hand: --tp-size T --dp-size D --rank R --world-size W --dist-init-addr HOST:PORT."""

import sys

from sglang_mixed.cli.main import app

if __name__ == "__main__":
    app(["serve", "--ranks-per-node", "1", *sys.argv[1:]])
