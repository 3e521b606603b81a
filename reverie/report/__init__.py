"""The report of a run: `write(folder)` makes one HTML page of its files."""

from reverie.report.page import write

__all__ = ['write']
