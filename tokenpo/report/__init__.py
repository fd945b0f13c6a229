"""What a run or a model shows: curves now; heat maps and pages are written here too."""

from tokenpo.report.curves import draw_curves

__all__ = ["draw_curves"]
