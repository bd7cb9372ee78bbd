"""A bundle as one file: a .zip whose members are stored, not compressed.

Stored members take in the archive what they take on the disk, so there are no bombs: what would come out larger than
the archive itself is refused.
"""

from __future__ import annotations

import argparse
import errno
import shutil
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from polar_deploy.workspace import atomic_path

_CHUNK = 1 << 20
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the zip format's first moment: an archive of the same bundle is the same bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bundle archive`."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder, or another .zip")
    parser.add_argument("archive", type=Path, metavar="FILE", help="the .zip to write")


def run(arguments: argparse.Namespace) -> int:
    """Check a bundle and write it as one file."""
    from polar_deploy.bundle.read import MANIFEST, opened
    from polar_deploy.bundle.refusal import require_outside

    require_outside(arguments.archive, arguments.bundle)
    with opened(arguments.bundle) as bundle:
        pack(bundle.folder, [MANIFEST, *bundle.manifest.files], arguments.archive)
    print(f"{arguments.archive}: {arguments.archive.stat().st_size:,} bytes, manifest sha256 {bundle.sha256}")
    return 0


def pack(folder: Path, names: list[str], path: Path) -> None:
    """Write the files `names` of `folder` into a .zip: sorted, stored, without times and owners."""
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(names):
            member = zipfile.ZipInfo(name, _EPOCH)
            member.external_attr = (stat.S_IFREG | 0o644) << 16
            with (folder / name).open("rb") as source, archive.open(member, "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, _CHUNK)


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Unpack a bundle's archive into a temporary folder, and give that.

    Raises:
        ContentError: it is no .zip, or damaged, or has members that a bundle has not.
    """
    from polar_deploy.bundle.refusal import refused

    with TemporaryDirectory(prefix="polar_deploy-") as name:
        folder = Path(name)
        try:
            with zipfile.ZipFile(path) as archive:
                for member in _checked(archive, path):
                    _extract(archive, member, folder / member.filename, path)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
            raise refused(path, f"is no .zip archive, or damaged: {error}") from error
        except OSError as error:
            if error.errno != errno.EINVAL:  # a member that begins before the file does
                raise
            raise refused(path, "is no .zip archive, or damaged: it names places outside of itself") from error
        yield folder


def _checked(archive: zipfile.ZipFile, path: Path) -> list[zipfile.ZipInfo]:
    """The members, if each is a plain stored file under a name that a bundle can have, and none is there twice."""
    from pydantic import TypeAdapter, ValidationError

    from polar_deploy.bundle.manifest import FilePath
    from polar_deploy.bundle.read import MOST_FILES
    from polar_deploy.bundle.refusal import refused

    members = archive.infolist()
    if len(members) > MOST_FILES:
        raise refused(path, f"has {len(members)} members, a bundle has at most {MOST_FILES}")
    names = TypeAdapter(FilePath)
    seen: set[str] = set()
    for member in members:
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise refused(path, f"has the member {member.filename!r}, which is no plain file")
        try:
            names.validate_python(member.filename)
        except ValidationError as error:
            raise refused(path, f"has a member with the name {member.filename[:200]!r}") from error
        if member.filename.lower() in seen:
            raise refused(path, f"has the member {member.filename!r} twice")
        seen.add(member.filename.lower())
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise refused(path, f"has the member {member.filename!r} compressed or encrypted; a bundle's are stored")
    folders = {str(parent).lower() for member in members for parent in PurePosixPath(member.filename).parents}
    if both := sorted(folders & seen):
        raise refused(path, f"has {both[0]!r} both as a file and a folder")
    if (total := sum(member.file_size for member in members)) > path.stat().st_size:
        raise refused(path, f"would unpack to {total:,} bytes, more than its own {path.stat().st_size:,}")
    return members


def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, path: Path) -> None:
    """Write one member, as many bytes as it says; the zip's own checksum is held against them."""
    from polar_deploy.bundle.refusal import refused

    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(member) as source, target.open("xb") as file:
        shutil.copyfileobj(source, file, _CHUNK)
    if target.stat().st_size != member.file_size:
        raise refused(path, f"has fewer bytes of {member.filename!r} than it says")
