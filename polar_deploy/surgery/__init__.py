"""Exact removal of dead channels and blocks from any ONNX graph in which gates, or zero filters, close channels.

    from polar_deploy.surgery import compress_file
    compress_file("gated.onnx", "compressed.onnx")

Facts come first (`facts`: constants forward, need backward; `sets`: what can only go together), cuts after (`cut`).
What an operator does to channels stands in one handler a family (`ops`). Needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polar_deploy.surgery.operation import Surgery as Surgery
    from polar_deploy.surgery.operation import compress as compress
    from polar_deploy.surgery.operation import compress_file as compress_file
    from polar_deploy.surgery.operation import cost as cost

__all__ = ["Surgery", "compress", "compress_file", "cost"]


def __getattr__(name: str) -> Any:
    """Import what takes all of surgery when it is asked for: most modules need one file of it."""
    if name in __all__:
        from polar_deploy.surgery import operation

        return getattr(operation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
