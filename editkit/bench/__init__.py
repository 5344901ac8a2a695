"""Speed of editkit against a reference implementation. Both run in turn, so that a busy machine
slows both.
"""

from __future__ import annotations

from editkit.bench.report import measurements, run_bench, table
from editkit.bench.shapes import shapes

__all__ = ["measurements", "run_bench", "shapes", "table"]
