"""What people look at: the page that shows attribution graphs, and plots. Knows nothing of how things were computed."""

from fasttc.report.evidence import FeatureFolder
from fasttc.report.page import page_data, page_html, with_evidence, write_page
from fasttc.report.serve import PageServer
from fasttc.report.state import after_merge, read_state, set_aside, write_state

__all__ = [
    "FeatureFolder",
    "PageServer",
    "after_merge",
    "page_data",
    "page_html",
    "read_state",
    "set_aside",
    "with_evidence",
    "write_page",
    "write_state",
]
