"""The report of a run: one HTML file that explains what was learnt, readable without a network."""

from opdkit.report.html import write_report

__all__ = ["write_report"]
