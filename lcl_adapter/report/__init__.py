"""Output for people: tables, loss plot, accuracy by shots, ROC curves, the page with wrong answers, episode previews,
the run card.
"""

from lcl_adapter.report.card import write_card
from lcl_adapter.report.data_check import show_check
from lcl_adapter.report.judged import is_judged, write_judged
from lcl_adapter.report.pages import read_predictions, write_report_page
from lcl_adapter.report.plan import fact_lines, show_plan
from lcl_adapter.report.plots import plot_accuracy, plot_loss, plot_roc
from lcl_adapter.report.preview import write_preview
from lcl_adapter.report.table import retention_line, show_table, verdict_of

__all__ = [
    "fact_lines",
    "is_judged",
    "plot_accuracy",
    "plot_loss",
    "plot_roc",
    "read_predictions",
    "retention_line",
    "show_check",
    "show_plan",
    "show_table",
    "verdict_of",
    "write_card",
    "write_judged",
    "write_preview",
    "write_report_page",
]
