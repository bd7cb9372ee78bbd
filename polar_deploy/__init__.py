"""polar_deploy: train a network once with polarized gates, cut it exactly, build an engine, prove it is as good."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polar_deploy.gating.gates import Gates as Gates

__all__ = ["Gates"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for."""
    if name == "Gates":
        from polar_deploy.gating.gates import Gates

        return Gates
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
