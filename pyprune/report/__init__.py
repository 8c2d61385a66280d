"""Reports: what a run asked for and did, as plain data, and tables of it."""

from pyprune.report.data import Report, groups_dict
from pyprune.report.evaluation import comparison_table, evaluation_table
from pyprune.report.recovery import recovery_tables
from pyprune.report.table import group_tables, report_tables, score_table

__all__ = [
    "Report",
    "comparison_table",
    "evaluation_table",
    "group_tables",
    "groups_dict",
    "recovery_tables",
    "report_tables",
    "score_table",
]
