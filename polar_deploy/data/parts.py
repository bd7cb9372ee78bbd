"""Folders of pictures with something beside each, boxes or masks, in parts; and what becomes of what is broken."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Generic, NamedTuple, Protocol, TypeAlias, TypeVar

from polar_deploy.data.folders import drawn_for_test
from polar_deploy.data.threads import parallel
from polar_deploy.errors import ContentError

_LEAST = {"train": 2, "test": 1, "validation": 1}  # pictures in a part


def require_sound(broken: Sequence[ContentError], in_all: str, such: str) -> None:
    """ContentError with the first of what is broken, if there is any; `in_all` and `such` are what messages call it."""
    if broken:
        more = f" ({len(broken)} {in_all})" if len(broken) > 1 else ""
        raise ContentError(broken[0].what + more, f"{broken[0].todo}, or leave such {such} out with --skip-broken")


def left_out(broken: Sequence[ContentError], many: str, one: str) -> str:
    """The note on what is left out: `many` are, or `one`."""
    return f"{f'{len(broken)} {many} are left out, first' if len(broken) > 1 else one} {broken[0].what}"


class Pictured(Protocol):
    """What belongs to a picture, and its name relative to the root."""

    @property
    def picture(self) -> str: ...


class Sight(NamedTuple):
    """What was seen of a picture: why it cannot be used, whether EXIF turns it, which classes its mask has."""

    problem: ContentError | None
    turned: bool = False
    classes: Collection[int] = ()


One = TypeVar("One", bound=Pictured)
# Of each part its pictures; what is wrong with names and files; notes.
Found: TypeAlias = tuple[dict[str, list[One]], list[ContentError], list[str]]


@dataclass(frozen=True)
class PartedFolder(ABC, Generic[One]):
    """A folder of pictures with something beside each. A subclass knows how that lies there, and what is sound.

    Args:
        root: the folder.
        skip_broken: whether what cannot be used is left out.

    Every property may raise:
        UsageError: there is no such folder. ContentError: it holds something else, or a part of it cannot be used.
    """

    root: Path
    skip_broken: bool = False

    layout: ClassVar[str]  # how the folder has to look, as advice
    held: ClassVar[str] = ""  # what the pictures of a part have, where messages count them
    broken: ClassVar[tuple[str, str]]  # for `require_sound`
    dropped: ClassVar[tuple[str, str]]  # for `left_out`
    beside: ClassVar[str]  # what lies beside a picture

    @cached_property
    @abstractmethod
    def _found(self) -> Found[One]: ...

    @cached_property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """By index; (): they have none."""

    @abstractmethod
    def _look(self, one: One) -> Sight: ...

    @abstractmethod
    def _absent(self) -> list[str]:
        """The note on classes that are nowhere in training."""

    @property
    def listed(self) -> dict[str, list[One]]:
        """The pictures of "train", "test" and, where it is there, "validation", before one is looked at."""
        return self._found[0]

    @cached_property
    def classes(self) -> int:
        """How many there are."""
        return len(self.class_names)

    @cached_property
    def parts(self) -> dict[str, list[One]]:
        """The pictures `listed`, without those that cannot be used."""
        if not self.skip_broken:
            require_sound(self._broken, *self.broken)
        parts = {
            name: [one for one in listed if self._seen[one.picture].problem is None]
            for name, listed in self.listed.items()
        }
        for name, pictures in parts.items():
            if len(pictures) < _LEAST[name]:
                held = f"{len(pictures)} picture{'s' * (len(pictures) != 1)}{self.held}"
                raise ContentError(f"{self.root} has {held} for {name}, {_LEAST[name]} are needed", self.layout)
        return parts

    @cached_property
    def _seen(self) -> dict[str, Sight]:
        """Each picture, after a look at it."""
        listed = [one for part in self.listed.values() for one in part]
        return dict(zip((one.picture for one in listed), parallel(self._look, listed), strict=True))

    @property
    def _broken(self) -> list[ContentError]:
        return [*self._found[1], *(sight.problem for sight in self._seen.values() if sight.problem)]

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a user should know, a sentence each."""
        notes = [left_out(self._broken, *self.dropped)] if self._broken else []
        notes += self._found[2]
        if turned := [one.picture for part in self.parts.values() for one in part if self._seen[one.picture].turned]:
            which = f"{len(turned)} pictures, first {self.root / turned[0]}"
            notes.append(f"EXIF turns or mirrors {which}: {self.beside} are taken as being upright")
        return (*notes, *self._absent())


def with_test(parts: dict[str, list[One]]) -> dict[str, list[One]]:
    """The same parts; where none tests, a fifth of the training pictures does."""
    if "test" in parts:
        return parts
    drawn = drawn_for_test([one.picture for one in parts["train"]])
    test = [one for one in parts["train"] if one.picture in drawn]
    return parts | {"train": [one for one in parts["train"] if one.picture not in drawn], "test": test}
