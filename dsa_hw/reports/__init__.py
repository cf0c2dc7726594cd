"""Self-contained HTML reports: of a pruning run, of a comparison, of a latency table.

Each file opens from disk with no network: styles, scripts and figures are
inside it. Nothing here measures or computes a result; what is not in the
input is left out of the page and named there.
"""

from dsa_hw.reports.compare_report import write_comparison_report
from dsa_hw.reports.fields import ReportInputError
from dsa_hw.reports.run_report import write_run_report
from dsa_hw.reports.table_report import write_table_report

__all__ = ["ReportInputError", "write_comparison_report", "write_run_report", "write_table_report"]
