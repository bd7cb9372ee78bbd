"""What a person reads at the end of a run: `build` makes report.json from the stages' files, `table` prints it, `page`
makes report.html of it."""

from __future__ import annotations

from polar_deploy.report.document import build
from polar_deploy.report.page import Shown, page, read_samples
from polar_deploy.report.table import table

__all__ = ["Shown", "build", "page", "read_samples", "table"]
