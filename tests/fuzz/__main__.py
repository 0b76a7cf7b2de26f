"""Tries mutated files on every reader: python -m tests.fuzz --reader=gguf --inputs=100000.

A right load or an error that names the file are right. Anything else fails: another exception, an
error that is long or has control characters, more than ten seconds or a gigabyte, a file opened
outside the given folder, the end of the process. Failing inputs are kept in a temporary folder.
"""

import argparse
import json
import pathlib
import sys
import tempfile

from tests.fuzz.readers import NAMES, all_readers
from tests.fuzz.run import run
from tests.fuzz.work import Job, work


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--reader", default="all", help="names, with commas")
    parser.add_argument("--inputs", type=int, default=1000, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--input", help="a folder of a kept input, instead of new ones")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--home", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work([Job(**job) for job in json.loads(options.worker)], options.home)
        return 0
    names = NAMES if options.reader == "all" else options.reader.split(",")
    if unknown := set(names) - set(NAMES):
        parser.error(f"readers {sorted(unknown)}: of {', '.join(NAMES)}")
    if options.input:
        reader = all_readers()[names[0]]
        with tempfile.TemporaryDirectory() as folder:
            reader.seeds(pathlib.Path(folder))  # which may set the reader up
        reader.read(pathlib.Path(options.input))
        return 0
    report = run([Job(name, options.seed, options.first, options.inputs) for name in names])
    for failure in report.failures:
        print(failure)
    for name in names:
        counts = report.counts[name]
        print(f"{name:14} {dict(counts)} in {report.seconds[name]:.1f} s")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
