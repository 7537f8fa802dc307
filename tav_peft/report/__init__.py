"""Clips side by side: one HTML page with everything in it that plays them in step, or one picture of all their frames."""

from tav_peft.report.page import Shown, write_report
from tav_peft.report.sheet import write_sheet

__all__ = ["Shown", "write_report", "write_sheet"]
