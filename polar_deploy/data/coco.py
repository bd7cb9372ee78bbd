"""Pictures and the boxes of objects in them, as COCO lays them out: DIR/annotations/instances_*.json and folders.

The format is that of https://cocodataset.org/#format-data ("object detection"); segmentations are not read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, ValidationError

from polar_deploy.data.dataset import Indices, Pixels
from polar_deploy.data.decode import decode, problem, upright_size
from polar_deploy.data.folders import VALIDATION
from polar_deploy.data.moves import stretched
from polar_deploy.data.parts import Found, PartedFolder, Sight, with_test
from polar_deploy.data.pictures import LazyImages
from polar_deploy.data.threads import parallel
from polar_deploy.errors import ContentError, UsageError, one_line

ANNOTATIONS, PREFIX = "annotations", "instances_"
_LAYOUT = (
    "give DIR/annotations/instances_train.json and instances_val.json with pictures in DIR/train and DIR/val, "
    "or one instances_NAME.json with pictures in DIR/NAME or DIR/images"
)
_SLACK = 1.0  # pixels that a box may stand out by: tools round, and COCO's own boxes do

Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Image(BaseModel):
    id: int
    file_name: Annotated[str, Field(min_length=1)]
    width: Annotated[int, Field(gt=0)]
    height: Annotated[int, Field(gt=0)]


class _Annotation(BaseModel):
    image_id: int
    category_id: int
    bbox: tuple[Finite, Finite, Finite, Finite]  # left, top, width, height, in pixels
    iscrowd: bool = False


class _Category(BaseModel):
    id: int
    name: Annotated[str, Field(min_length=1)]


class _Document(BaseModel):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


class Boxed(NamedTuple):
    """A picture with its objects.

    Attributes:
        picture: name relative to the root.
        size: width and height in pixels, as it is seen.
        boxes: float64 [M, 4]: left, top, right, bottom, as shares of width and height.
        labels: int64 [M], from 0.
        crowd: bool [M]: a box around many objects, which is not learned from; what is found in it is not judged.
    """

    picture: str
    size: tuple[int, int]
    boxes: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    crowd: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class CocoFolder(PartedFolder[Boxed]):
    """A folder of pictures with boxes of objects."""

    layout, beside = _LAYOUT, "boxes"
    broken = "such pictures or annotations in all", "ones"
    dropped = "pictures or annotations", "left out:"

    @cached_property
    def parts(self) -> dict[str, list[Boxed]]:
        """Those with boxes in each part."""
        parts = super().parts
        for name, pictures in parts.items():
            if not sum(int((~each.crowd).sum()) for each in pictures):
                raise ContentError(f"{self.root} has no box in any picture for {name}", "annotate some objects")
        return parts

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """By index; in the order of the categories' ids."""
        return tuple(self._categories[each] for each in sorted(self._categories))

    @property
    def most(self) -> int:
        """The largest number of boxes in a picture, 1 or more."""
        return max(1, *(len(each.labels) for part in self.parts.values() for each in part))

    def _absent(self) -> list[str]:
        learned = {int(label) for each in self.parts["train"] for label in each.labels[~each.crowd]}
        if absent := [name for label, name in enumerate(self.class_names) if label not in learned]:
            many = f"{len(absent)} of {len(self.class_names)} classes are"
            return [f"{many} in no training picture, first {absent[0]}"]
        return []

    @cached_property
    def _documents(self) -> dict[str, tuple[Path, _Document, Path]]:
        """Of each part the file of its annotations, their content, and the folder of its pictures."""
        if not self.root.is_dir():
            raise UsageError(f"there is no folder {self.root}", _LAYOUT)
        found = sorted((self.root / ANNOTATIONS).glob(f"{PREFIX}*.json"))
        named = {path: path.stem.removeprefix(PREFIX) for path in found if not path.name.startswith(".")}
        parts: dict[str, Path] = {}
        for part, words in (("train", ("train",)), ("test", ("test",)), ("validation", VALIDATION)):
            fitting = [path for path, name in named.items() if name.lower().startswith(words)]
            if len(fitting) > 1:
                what = f"{self.root / ANNOTATIONS} has {' and '.join(path.name for path in fitting)}"
                raise ContentError(f"{what}: it is not clear which one is for {part}", "keep one of them")
            if fitting:
                parts[part] = fitting[0]
        if "train" not in parts:
            if parts or len(named) != 1:
                what = "no training set" if named else f"no file {PREFIX}*.json"
                raise ContentError(f"{self.root / ANNOTATIONS} has {what}", _LAYOUT)
            parts["train"] = next(iter(named))
        if "test" not in parts and "validation" in parts:
            parts["test"] = parts.pop("validation")
        return {part: (path, _read(path), self._pictures(named[path])) for part, path in parts.items()}

    def _pictures(self, name: str) -> Path:
        """The folder of a set's pictures."""
        choices = [self.root / name, self.root / "images" / name, self.root / "images"]
        for folder in choices:
            if folder.is_dir():
                return folder
        raise ContentError(f"there is no folder {choices[0]} with the pictures of {PREFIX}{name}.json", _LAYOUT)

    @cached_property
    def _categories(self) -> dict[int, str]:
        """Names by id, the same in all files."""
        names: dict[int, str] = {}
        for path, document, _ in self._documents.values():
            for position, each in enumerate(document.categories):
                if names.setdefault(each.id, each.name) != each.name:
                    what = f"{path}: categories[{position}] is '{one_line(each.name)}' with the id {each.id}"
                    raise ContentError(f"{what}, which is that of '{one_line(names[each.id])}'", "give each its own id")
        if not names:
            raise ContentError(f"{self.root / ANNOTATIONS} names no category", "name each class in 'categories'")
        if len({*names.values()}) < len(names):
            twice = next(name for name in names.values() if [*names.values()].count(name) > 1)
            raise ContentError(
                f"{self.root / ANNOTATIONS}: two categories are called '{one_line(twice)}'", "rename one"
            )
        return names

    @cached_property
    def _found(self) -> Found[Boxed]:
        """As far as the annotations tell."""
        order = {category: label for label, category in enumerate(sorted(self._categories))}
        parts: dict[str, list[Boxed]] = {}
        problems: list[ContentError] = []
        for part, (path, document, folder) in self._documents.items():
            images: dict[int, _Image] = {}
            for position, image in enumerate(document.images):
                if images.setdefault(image.id, image) is not image:
                    what = f"{path}: images[{position}] has the id {image.id}, as another picture has"
                    raise ContentError(what, "give each picture its own id")
            held: dict[int, list[tuple[int, _Annotation]]] = {key: [] for key in images}
            for position, each in enumerate(document.annotations):
                wrong = _problem(each, images.get(each.image_id), order)
                if wrong is None:
                    held[each.image_id].append((order[each.category_id], each))
                else:
                    problems.append(ContentError(f"{path}: annotations[{position}] {wrong[0]}", wrong[1]))
            inside = folder.relative_to(self.root).as_posix()
            parts[part] = [_boxes(f"{inside}/{image.file_name}", image, held[key]) for key, image in images.items()]
        return with_test(parts), problems, []

    def _look(self, boxed: Boxed) -> Sight:
        """At the header and the end of its file."""
        path = self.root / boxed.picture
        if not path.is_file():
            return Sight(ContentError(f"there is no picture {path}, which has annotations", "add it, or take it out"))
        if (found := problem(path, thorough=self.skip_broken)) is not None:
            return Sight(found)
        size, turned = upright_size(path)
        if size != boxed.size:
            upright = ", turned as its EXIF says" if turned else ""
            sizes = f"{path} has {size[0]} × {size[1]} pixels{upright}, {boxed.size[0]} × {boxed.size[1]} as annotated"
            return Sight(ContentError(sizes, "annotate the picture as it is seen"), turned)
        return Sight(None, turned)


def _read(path: Path) -> _Document:
    try:
        return _Document.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in first["loc"]).removeprefix(".")
        what = f"{path}: {place + ': ' if place else ''}{one_line(first['msg'])}"
        raise ContentError(what, "see https://cocodataset.org/#format-data, and correct the file") from error


def _problem(each: _Annotation, image: _Image | None, categories: dict[int, int]) -> tuple[str, str] | None:
    """Why an annotation cannot be used, and what to do; None: it can."""
    if image is None:
        return f"is of the picture {each.image_id}, which is not in 'images'", "add the picture, or delete it"
    if each.category_id not in categories:
        known = ", ".join(map(str, sorted(categories)[:6]))
        return f"is of the category {each.category_id}, which is not in 'categories' ({known}, …)", "add the category"
    left, top, width, height = each.bbox
    box = f"has the box [{', '.join(f'{value:g}' for value in each.bbox)}]"
    if width <= 0 or height <= 0:
        return f"{box} (left, top, width, height), which has no area", "delete it, or correct it"
    over = max(-left, -top, left + width - image.width, top + height - image.height)
    if over > _SLACK or left >= image.width or top >= image.height or left + width <= 0 or top + height <= 0:
        where = f"{one_line(image.file_name)} of {image.width} × {image.height} pixels"
        return f"{box} (left, top, width, height), which is not inside of {where}", "correct the box"
    return None


def _boxes(name: str, image: _Image, held: Sequence[tuple[int, _Annotation]]) -> Boxed:
    boxes = np.array([each.bbox for _, each in held], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return Boxed(
        name,
        (image.width, image.height),
        np.clip(boxes / np.array([image.width, image.height] * 2), 0, 1),
        np.array([label for label, _ in held], np.int64),
        np.array([each.iscrowd for _, each in held], bool),
    )


@dataclass(frozen=True, eq=False)
class LazyBoxed:
    """Pictures with boxes, decoded when they are asked for.

    Args:
        root: the folder that the pictures belong to.
        boxed: the pictures.
        size: pixels a side, which they are stretched to.
    """

    root: Path
    boxed: Sequence[Boxed]
    size: int

    @cached_property
    def _images(self) -> LazyImages:
        return LazyImages(self.root, np.array([each.picture for each in self.boxed], object), self.size, self.size)

    def plain(self, index: Indices) -> list[Pixels]:
        """The chosen ones, uint8 [size, size, 3] each."""
        return parallel(
            lambda each: stretched(np.asarray(decode(self.root / self.boxed[each].picture)), self.size), index.tolist()
        )

    def whole(self, index: Indices) -> list[Pixels]:
        """The chosen ones as they are, but for a shorter side of 1.5 · size pixels at most."""
        return self._images.whole(index)

    def fingerprint(self) -> str:
        """SHA-256 of the size, of every file's name and length in bytes, and of all boxes."""
        digest = hashlib.sha256(self._images.fingerprint().encode())
        for each in self.boxed:
            for values in (each.boxes, each.labels, each.crowd):
                digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()
