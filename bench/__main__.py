"""`python -m bench` and a command: `python -m bench --help` lists them."""

import argparse
import sys

from . import blocks, compare, coverage, dispatch, memory, models, ops, qualify, regress, report


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. 0: done; 1: something measured or checked isn't as it should be; 2: it can't run here."""
    arguments = sys.argv[1:] if arguments is None else arguments
    p = argparse.ArgumentParser(prog="python -m bench", description="Measurements of fused_attn, from a checkout.")
    commands = p.add_subparsers(dest="command", required=True, metavar="command")
    for module in (ops, blocks, models, memory, compare, regress, qualify, dispatch, coverage, report):
        module.parser(commands.add_parser).set_defaults(main=module.main)
    options = p.parse_args(arguments)
    status: int = options.main(options, arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
