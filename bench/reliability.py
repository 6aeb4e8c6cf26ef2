"""Try the faults that a run must survive, and write results/reliability.md: what was tried, and how it ended.

python bench/reliability.py            # some ten minutes on two quiet cores
"""

import argparse
import contextlib
import datetime
import os
import platform
import sys
import time
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common

FILES = {
    "bad_input": "Bad input: exit code 2, one line that names the thing",
    "hostile": "Files that mean harm: no code run, nothing written elsewhere, no terminal steered",
    "reliability": "Faults of a run, of its files and of the machine",
    "processes": "Several processes",
    "server": "Servers",
}


@common.command_line
def main(argv=None):
    args = parse_args(argv)
    begun = time.monotonic()
    code, reports = run_tests()
    common.write_atomically(args.output, write_page(reports, time.monotonic() - begun))
    return int(code)


def parse_args(argv):
    parser = common.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "results/reliability.md", help="page to write (default %(default)s)"
    )
    return parser.parse_args(argv)


def run_tests():
    """Pytest's exit code, and its report of each test that ran."""
    reports = []

    def keep(report):
        if report.when == "call":
            reports.append(report)

    files = [str(ROOT / f"tests/test_{name}.py") for name in FILES]
    plugin = types.SimpleNamespace(pytest_runtest_logreport=keep)
    with contextlib.redirect_stdout(sys.stderr):
        return pytest.main(["-q", "-p", "no:cacheprovider", *files], plugins=[plugin]), reports


def write_page(reports, seconds: float) -> str:
    """The page: for each file a table with a line for each test, its cases counted."""
    passed = sum(report.outcome == "passed" for report in reports)
    today, machine = datetime.datetime.now(datetime.UTC).date(), f"{os.cpu_count()} cores of {platform.machine()}"
    lines = [
        "# What a run survives",
        "",
        f"Made by `python bench/reliability.py` on {today}, {machine}, Python {platform.python_version()}, without a GPU,",
        f"in {seconds:.0f} s: {passed} of {len(reports)} cases ended as they must. Windows, file systems without locks,",
        "full disks and faulty servers were simulated on one Linux machine.",
    ]
    for name, heading in FILES.items():
        tests = {}
        for report in reports:
            path, _, test = report.nodeid.partition("::test_")
            if path.endswith(f"test_{name}.py"):
                tests.setdefault(test.partition("[")[0], []).append(report)
        lines += ["", f"## {heading}", "", "| tried | ended as they must | figures |", "| --- | ---: | --- |"]
        for test, cases in tests.items():
            good = sum(case.outcome == "passed" for case in cases)
            figures = "; ".join(f"{key}: {value}" for case in cases for key, value in case.user_properties)
            lines.append(f"| {test.replace('_', ' ')} | {good} of {len(cases)} | {figures} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
