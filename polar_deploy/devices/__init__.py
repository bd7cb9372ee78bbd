"""What widths cost on devices and runtimes: one file each, measured or asked of the device's compiler.

A device punishes some widths: it computes channels in packs, and 33 of them cost as much as 48. The files here say what
each width costs, where that comes from, and which widths are worth choosing (`Device.offered`).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from polar_deploy.devices.device import Device, Precision
from polar_deploy.errors import ContentError, UsageError, first_problem
from polar_deploy.workspace import read_json

if TYPE_CHECKING:
    from polar_deploy.devices.width_costs import WidthCosts

__all__ = ["Chosen", "Device", "choose", "load", "names"]

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Chosen:
    """A device in one of the precisions that its file has."""

    device: Device
    precision: Precision

    @cached_property
    def costs(self) -> WidthCosts:
        """What channels cost there."""
        from polar_deploy.devices.width_costs import WidthCosts

        return WidthCosts(self.device, self.precision)

    def offers(self, width: int) -> bool:
        """Whether so many channels are worth choosing."""
        return self.device.offers(width, self.precision)

    def described(self) -> dict[str, Any]:
        """What a plan says of it."""
        return {
            "name": self.device.name,
            "precision": self.precision,
            "source": f"{self.device.source.kind}, {self.device.source.tool} {self.device.source.version}",
            "widths": list(self.device.offered(self.precision)),
        }


def choose(name: str, precision: str | None = None) -> Chosen:
    """A device (see `load`) in a precision, or in the file's first one where it has no such costs."""
    device = load(name)
    return Chosen(device, device.nearest(precision or ""))


def given(device: Chosen | Path | str | None) -> Chosen | None:
    """A device as callers name it: what `choose` gave, a name or a file that it takes, or None.

    Raises:
        UsageError: it is nothing of these.
    """
    if device is None or isinstance(device, Chosen):
        return device
    if isinstance(device, (str, Path)):
        return choose(str(device))
    raise UsageError(
        f"device={device!r}", "give a name that `polar-deploy devices list` tells, or the path of a .json file"
    )


def names() -> list[str]:
    """The devices that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def load(name: str) -> Device:
    """The device of a name, or of a file: NAME.json, as `polar_deploy.devices measure` writes it.

    Raises:
        UsageError: there is no such device or file.
        ContentError: the file is not what the schema says.
    """
    if not name.endswith(".json"):
        if name not in names():
            near = difflib.get_close_matches(name, names(), n=1, cutoff=0.4)
            todo = f"did you mean {near[0]}?" if near else "choose one of them, or give the path of a .json file"
            raise UsageError(f"unknown device {name!r}; known are {', '.join(names())}", todo)
        return _read(_FOLDER / f"{name}.json")
    return _read(Path(name))


def _read(path: Path) -> Device:
    try:
        return Device.model_validate(read_json(path))
    except ValidationError as error:
        what = f"{path}: {first_problem(error, 'the document')}"
        raise ContentError(what, "see polar_deploy/schemas/device.schema.json, or measure it again") from error
