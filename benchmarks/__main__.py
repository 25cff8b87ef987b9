"""``python -m benchmarks SUITE ...``: each suite is a module here with ``main(arguments) -> exit status``."""

import argparse
import sys
from importlib import import_module

SUITES = {"aot": ".aot", "matched": ".matched"}  # name -> module


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see SUITE --help")
    options = parser.parse_args(arguments)
    return import_module(SUITES[options.suite], __package__).main(options.arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
