"""The report of a run: what is counted while it is judged, figures, a page, and TensorBoard."""

from utils.report.callback import Report, report_on_folds

__all__ = ["Report", "report_on_folds"]
