"""What `polar-deploy doctor --json` prints: what this machine can build and run."""

from __future__ import annotations

from polar_deploy.config import NonNegative
from polar_deploy.documents.parity import Machine
from polar_deploy.documents.part import Part


class Device(Part):
    """A GPU: its compute capability, such as "9.0", and the precisions that its matrix units lack."""

    name: str
    capability: str
    lacks: list[str]


class TargetHere(Part):
    """A target: what is missing here to build and to run its engines, a clause each, and the line that installs it.

    `proves_types`: whether the runtime tells in which types its layers run.
    """

    build: list[str]
    run: list[str]
    proves_types: bool
    install: str

    @property
    def missing(self) -> list[str]:
        """What is missing for either."""
        return list(dict.fromkeys([*self.build, *self.run]))


class Timed(Part):
    """A small network in a target: the median milliseconds of an inference by batch size, or why it was not timed."""

    error: str | None = None
    build_seconds: NonNegative | None = None
    ms: dict[str, NonNegative] | None = None


class Examined(Part):
    """All of it. `no_gpu` says why there is none; `auto` is what `--target auto` means; `timed` goes by target."""

    polar_deploy: str
    python: str
    machine: Machine
    int8_instructions: list[str]
    gpus: list[Device]
    no_gpu: str | None
    cuda: str | None
    packages: dict[str, str | None]
    providers: list[str]
    targets: dict[str, TargetHere]
    auto: str
    timed: dict[str, Timed] | None = None
