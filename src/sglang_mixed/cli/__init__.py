"""The command line: `main.py` and `loop.py` declare the commands, and a file of its name does the work of each."""
