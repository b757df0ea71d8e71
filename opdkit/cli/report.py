"""`opdkit report`."""

from __future__ import annotations

import argparse
from typing import Any

from opdkit.cli.command import Command


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder")


def report(options: Any) -> None:
    from opdkit.report import write_report
    from opdkit.report.read import need_folder

    print(write_report(need_folder(options.folder)))


REPORT = Command("report", "write report.html of a run folder", report, arguments)
