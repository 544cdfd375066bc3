"""Results as one page that a browser opens without a network, to look at and to mail."""

from retrace.analyze.report.page import page, report

__all__ = ["page", "report"]
