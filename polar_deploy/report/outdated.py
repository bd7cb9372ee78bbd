"""Whether what a stage wrote is still of the run that its folder holds: told by the stamps, without data or network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polar_deploy.errors import ContentError, UsageError, printable
from polar_deploy.workspace import digest, read_json

if TYPE_CHECKING:
    from polar_deploy.config import Settings


def depends_on(settings: Settings) -> dict[str, Any]:
    """The settings that a report depends on, as plain JSON: all but where files lie on this machine."""
    from polar_deploy.config import LOCAL_PATHS

    return settings.model_dump(mode="json", exclude=LOCAL_PATHS)


def warn(folder: Path, stage: str) -> None:
    """Say on stderr in what the files that a stage wrote are not of the run as its folder now holds it."""
    stamps = {path.stem: stamp for path in folder.glob("stamps/*.json") if (stamp := _read(path)) is not None}
    if not stamps:
        return  # files alone, which were brought here: nobody knows
    found = _differences(stamps, stage) if stage in stamps else [f"stage {stage} has begun again and not ended"]
    if stage == "report" and stage in stamps and _has_other_settings(folder, stamps[stage]):
        found.append(f"{folder / 'run.yaml'} has other settings")
    if found:
        told = f"warning: this is of an earlier run in {folder}: {'; '.join(found)}"
        print(printable(f"{told}; the run's command without --until makes it anew"), file=sys.stderr)


def _differences(stamps: dict[str, dict[str, Any]], stage: str) -> list[str]:
    """What the stage, or one that it builds on, has read and is another file now."""
    made = {name: (maker, sha) for maker, stamp in stamps.items() for name, sha in stamp.get("outputs", {}).items()}
    found, waiting, seen = [], [stage], set[str]()
    while waiting:
        seen.add(reader := waiting.pop())
        read = stamps[reader].get("inputs", {})
        if changed := [name for name, sha in read.items() if name in made and made[name][1] != sha]:
            found.append(f"{changed[0]} is another one than stage {reader} has read")
        waiting += {made[name][0] for name in read if name in made} - seen - {*waiting}
    return found


def _read(path: Path) -> dict[str, Any] | None:
    try:
        stamp = read_json(path)
    except (UsageError, ContentError):  # a damaged one is none, as for the stages
        return None
    return stamp if isinstance(stamp, dict) else None


def _has_other_settings(folder: Path, stamp: dict[str, Any]) -> bool:
    from polar_deploy import recipes

    try:
        settings = recipes.load(folder / "run.yaml", {})
    except UsageError:  # none, or of another version, whose settings had other names
        return False
    return bool(digest(depends_on(settings)) != stamp.get("settings"))
