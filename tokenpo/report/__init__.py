"""What a run or a model shows: heat maps of tokens, curves, tables; as a page, in the terminal, as picture and data."""

from tokenpo.report.curves import draw_curves
from tokenpo.report.data import write_rows
from tokenpo.report.heatmap import render, write_html
from tokenpo.report.online import is_online, online_report
from tokenpo.report.png import draw_heatmap
from tokenpo.report.run import is_run, run_report, write_run_report
from tokenpo.report.terminal import show
from tokenpo.report.views import Group, Layer, Panel, Piece, Report, Response, Table, pieces

__all__ = [
    "Group",
    "Layer",
    "Panel",
    "Piece",
    "Report",
    "Response",
    "Table",
    "draw_curves",
    "draw_heatmap",
    "is_online",
    "is_run",
    "online_report",
    "pieces",
    "render",
    "run_report",
    "show",
    "write_html",
    "write_rows",
    "write_run_report",
]
