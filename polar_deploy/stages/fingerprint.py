"""What a result follows from besides the files that were read: one hash for stamps, checkpoints and latency tables.

The rule for a new version of polar_deploy on the folder of an old one:

- What takes minutes (export, surgery, build, parity, bundle, report) is made again, by the new version: where surgery
  was mended, nobody goes on with what the old one cut.
- What takes hours (full, gates) stays, and a half-trained network goes on from its checkpoint: weights are judged by
  parity, whoever trained them. It is trained again only where `TRAINING` was raised: what releases before trained is
  wrong, not merely less good. The changelog says so, and the stage says that it begins again.
- A latency table is measured again, unless a half-trained network was chosen by it: its budget shall not move.
"""

from __future__ import annotations

from polar_deploy import __version__
from polar_deploy.workspace import Fingerprint, digest

TRAINING = 1  # raised when weights, gates or checkpoints of releases before must not be used any more


def of(depends_on: object, *, trained: bool = False) -> Fingerprint:
    """The fingerprint of a result.

    Args:
        depends_on: settings, data and machine that it depends on, as plain JSON.
        trained: whether it is trained, and so outlives a new version.
    """
    program = f"training {TRAINING}" if trained else f"polar_deploy {__version__}"
    return Fingerprint(digest(depends_on), program)
