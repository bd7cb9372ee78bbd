"""TensorBoard: events in `tensorboard/` of the run's folder, for `tensorboard --logdir runs`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class Tracker:
    """Scalars by epoch, the settings as text, and the figures of the result beside them under HPARAMS."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._settings = settings
        self._writer = SummaryWriter(str(folder / "tensorboard"))
        lines = (f"    {key}: {value}" for key, value in settings.items())  # four spaces: as it stands, in Markdown
        self._writer.add_text("settings", "\n".join(lines))
        self._writer.flush()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def end(self, figures: Mapping[str, float], files: Sequence[Path], verdict: str | None, *, failed: bool) -> None:
        """Write the figures and the verdict; files stay where they are: TensorBoard keeps none."""
        if figures:
            plain = {key: _plain(value) for key, value in self._settings.items()}
            self._writer.add_hparams(plain, dict(figures), run_name=".")
        self._writer.add_text("verdict", "failed" if failed else verdict or "none yet")
        self._writer.close()


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
