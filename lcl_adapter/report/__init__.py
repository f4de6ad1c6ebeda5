"""What a person looks at: loss plot, accuracy by shots, wrong answers as pictures, episode previews, the run card."""

from lcl_adapter.report.card import write_card
from lcl_adapter.report.pages import write_report_page
from lcl_adapter.report.plots import plot_accuracy, plot_loss
from lcl_adapter.report.preview import write_preview
from lcl_adapter.report.table import show_table

__all__ = ["plot_accuracy", "plot_loss", "show_table", "write_card", "write_preview", "write_report_page"]
