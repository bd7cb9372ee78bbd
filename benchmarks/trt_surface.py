"""What our code asks of TensorRT's bindings, found in its source, and what bindings offer, found in them.

The source is read with `ast`: a value is followed from where it comes from the library (`library.load`, a parameter
that is called as the library's thing is, a binding's method, whose docstring tells what it gives) to where an
attribute is taken of it. Taken by `getattr` with a default, or where such a one was found to be there, is guarded.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

MODULE = "module"
# What untyped parameters hold, by their names, and what a call gives that leads through another library
NAMES = {
    "trt": MODULE,
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "layer": "ILayer",
    "makers": "ILayer",
    "tensor": "ITensor",
    "image": "ITensor",
    "error": "ParserError",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
}
_UNTYPED = re.compile(r"^(Any|ModuleType|list\[Any\]|dict\[str, Any\]|Sequence\[Any\])$")
_GIVES = re.compile(r"-> (?:[\w.]+\[)?[\w.]*\.([A-Z]\w+)")

Surface = dict[str, dict[str, str]]  # class, or "module" -> attribute -> class of what it gives, "" if unknown


@dataclass(frozen=True)
class Use:
    """One attribute taken: of what, and where. `guard` is the attribute whose presence was asked for before."""

    owner: str
    name: str
    file: str
    line: int
    guard: str = ""

    def __str__(self) -> str:
        return f"{self.owner}.{self.name}"


def surface(module: ModuleType) -> Surface:
    """What bindings offer. Nothing is made of them, so no GPU is needed."""
    found: Surface = {MODULE: dict.fromkeys(dir(module), "")}
    found[MODULE]["__version__"] = str(getattr(module, "__version__", ""))
    for name, value in inspect.getmembers(module, inspect.isclass):
        _describe(name, value, found)
    return found


def uses(files: Iterable[Path], offered: Surface) -> list[Use]:
    """Every attribute of the library that some source files take; `offered` tells what methods give."""
    found: dict[Use, None] = {}
    for path in files:
        found |= dict.fromkeys(_File(path, offered).uses())
    return list(found)


def missing(wanted: Iterable[Use], offered: Surface) -> list[Use]:
    """The uses that bindings do not have. An object's class may be one of its base's."""
    return [use for use in wanted if use.name not in offered.get(use.owner, {})]


def merged(surfaces: Iterable[Surface]) -> Surface:
    """All of several surfaces."""
    result: Surface = {}
    for each in surfaces:
        for owner, attributes in each.items():
            known = result.setdefault(owner, {})
            known |= {name: gives or known.get(name, "") for name, gives in attributes.items()}
    return result


def _describe(name: str, value: type, found: Surface) -> None:
    found[name] = {}
    for attribute in dir(value):
        member = inspect.getattr_static(value, attribute)
        if inspect.isclass(member) and not attribute.startswith("_"):
            _describe(f"{name}.{attribute}", member, found)
        documented = member.fget if isinstance(member, property) else member
        text = _GIVES.search(str(getattr(documented, "__doc__", "") or ""))
        found[name][attribute] = text[1] if text else ""


@dataclass(frozen=True)
class _Value:
    """What an expression is: of a class, or such a class itself (`made`: calling it gives one), or many of them."""

    kind: str
    many: bool = False
    made: bool = False


@dataclass
class _Scope:
    """Names known in a function, with those of what is around it, and what is known to be there."""

    names: dict[str, _Value]
    attributes: dict[str, _Value]  # of self
    asked: dict[str, str] = field(default_factory=dict)  # variable -> attribute that getattr looked for


class _File:
    """One source file."""

    def __init__(self, path: Path, offered: Surface) -> None:
        self.path, self.offered = path, offered
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.functions = {each.name: each for each in self.tree.body if isinstance(each, ast.FunctionDef)}
        self.found: list[Use] = []

    def uses(self) -> list[Use]:
        """All of it, in the order of the lines."""
        self._block(self.tree.body, _Scope({}, {}), "")
        return sorted(self.found, key=lambda use: use.line)

    def _block(self, body: list[ast.stmt], scope: _Scope, guard: str) -> None:
        for statement in body:
            if isinstance(statement, ast.ClassDef):
                self._expressions(statement.bases, scope, guard)
                attributes = self._self_attributes(statement, scope)
                self._block(statement.body, replace(scope, attributes=attributes), guard)
            elif isinstance(statement, ast.FunctionDef):
                inner = self._enter(statement, scope)
                self._block(statement.body, inner, guard)
            elif isinstance(statement, ast.If):
                self._expressions([statement.test], scope, guard)
                there, absent = _asks(statement.test, scope)
                self._block(statement.body, scope, there or guard)
                self._block(statement.orelse, scope, absent or guard)
                if absent and isinstance(statement.body[-1], (ast.Return, ast.Raise)):
                    guard = absent  # whoever comes past this has it
            else:
                self._expressions(
                    [each for each in ast.iter_child_nodes(statement) if isinstance(each, ast.expr)], scope, guard
                )
                for inner_body in ("body", "handlers", "orelse", "finalbody", "cases"):
                    for each in getattr(statement, inner_body, ()):
                        nested = each.body if isinstance(each, (ast.ExceptHandler, ast.match_case)) else [each]
                        self._block(nested, scope, guard)
                for item in getattr(statement, "items", ()):
                    self._expressions([item.context_expr], scope, guard)

    def _expressions(self, nodes: Iterable[ast.AST], scope: _Scope, guard: str) -> None:
        for node in nodes:
            if isinstance(node, ast.IfExp):
                there, absent = _asks(node.test, scope)
                self._expressions([node.test], scope, guard)
                self._expressions([node.body], scope, there or guard)
                self._expressions([node.orelse], scope, absent or guard)
                continue
            if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
                scope = self._comprehension(node, scope)
            if isinstance(node, ast.Attribute):
                self._note(self._value(node.value, scope), node.attr, node, guard)
            if attribute := _looked_up(node):
                assert isinstance(node, ast.Call)
                self._note(self._value(node.args[0], scope), attribute, node, attribute)
            self._expressions(ast.iter_child_nodes(node), scope, guard)

    def _note(self, owner: _Value | None, name: str, node: ast.expr, guard: str) -> None:
        if owner is not None and not owner.many:
            self.found.append(Use(owner.kind, name, self.path.name, node.lineno, guard))

    def _enter(self, function: ast.FunctionDef, around: _Scope) -> _Scope:
        """The names of a function: its parameters, and what is assigned in it, in two passes."""
        names = {**around.names, **_parameters(function)}
        scope = _Scope(names, around.attributes, dict(around.asked))
        for node in [*_walk(function)] * 2:
            for target, value in _assignments(node):
                if isinstance(target, ast.Name):
                    found = self._value(value, scope) or _by_name(target.id, value)
                    if found is not None:
                        names[target.id] = found
                    if attribute := _looked_up(value):
                        scope.asked[target.id] = attribute
            if isinstance(node, ast.For) and isinstance(node.target, ast.Name):
                self._bind_each(node.target, node.iter, scope)
        return scope

    def _self_attributes(self, owner: ast.ClassDef, around: _Scope) -> dict[str, _Value]:
        """What `self.x = ...` puts into x, from all methods."""
        attributes: dict[str, _Value] = {}
        for method in [each for each in owner.body if isinstance(each, ast.FunctionDef)] * 2:
            scope = self._enter(method, replace(around, attributes=attributes))
            for node in _walk(method):
                for target, value in _assignments(node):
                    if isinstance(target, ast.Attribute) and _is_self(target.value):
                        found = self._value(value, scope)
                        if found is not None:
                            attributes[target.attr] = found
        return attributes

    def _comprehension(self, node: Any, scope: _Scope) -> _Scope:
        inner = replace(scope, names=dict(scope.names))
        for generator in node.generators:
            if isinstance(generator.target, ast.Name):
                inner.names.pop(generator.target.id, None)
                self._bind_each(generator.target, generator.iter, inner)
        return inner

    def _bind_each(self, target: ast.Name, iterated: ast.expr, scope: _Scope) -> None:
        many = self._value(iterated, scope)
        if many is not None and many.many:
            scope.names[target.id] = replace(many, many=False)

    def _value(self, node: ast.expr, scope: _Scope, depth: int = 0) -> _Value | None:
        """What an expression is, if it comes from the library."""
        if depth > 8:
            return None
        go = lambda other: self._value(other, scope, depth + 1)  # noqa: E731
        match node:
            case ast.Name(id=name):
                return scope.names.get(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if name in scope.attributes:
                return scope.attributes[name]
            case ast.Attribute(value=value, attr=name):
                return self._attribute(go(value), name)
            case ast.Subscript(value=value):
                many = go(value)
                return replace(many, many=False) if many else None
            case ast.List(elts=[first, *_]) | ast.Tuple(elts=[first, *_]):
                return _many(go(first.value if isinstance(first, ast.Starred) else first))
            case ast.ListComp(elt=element) | ast.GeneratorExp(elt=element):
                return _many(self._value(element, self._comprehension(node, scope), depth + 1))
            case ast.DictComp(value=element):
                return _many(self._value(element, self._comprehension(node, scope), depth + 1))
            case ast.NamedExpr(value=value):
                return go(value)
            case ast.IfExp(body=body, orelse=orelse):
                return go(body) or go(orelse)
            case ast.Call():
                return self._call(node, scope, depth)
        return None

    def _attribute(self, owner: _Value | None, name: str) -> _Value | None:
        if owner is None or owner.many:
            return None
        inner = name if owner.kind == MODULE else f"{owner.kind}.{name}"
        if inner in self.offered:
            return _Value(inner, made=True)
        if owner.made:  # a member of an enumeration
            return _Value(owner.kind)
        gives = self.offered.get(owner.kind, {}).get(name, "")
        return _Value(gives) if gives in self.offered else None

    def _call(self, node: ast.Call, scope: _Scope, depth: int) -> _Value | None:
        match node.func:
            case ast.Attribute(value=ast.Name(id="library"), attr="load"):
                return _Value(MODULE)
            case ast.Name(id="getattr") if len(node.args) >= 2 and isinstance(node.args[1], ast.Constant):
                return self._attribute(self._value(node.args[0], scope, depth + 1), str(node.args[1].value))
            case ast.Name(id=name) if name in self.functions:
                return self._result(self.functions[name], node, scope, depth)
            case ast.Attribute(value=value, attr="get" | "pop"):
                many = self._value(value, scope, depth + 1)
                if many is not None and many.many:
                    return replace(many, many=False)
        called = self._value(node.func, scope, depth + 1)
        return replace(called, made=False) if called else None

    def _result(self, function: ast.FunctionDef, call: ast.Call, scope: _Scope, depth: int) -> _Value | None:
        """What a function of this file gives for these arguments."""
        given = {
            parameter.arg: value
            for parameter, argument in zip(function.args.args, call.args, strict=False)
            if (value := self._value(argument, scope, depth + 1)) is not None
        }
        inner = self._enter(function, _Scope(given, {}))
        for node in _walk(function):
            if isinstance(node, ast.Return) and node.value is not None:
                found = self._value(node.value, inner, depth + 1)
                if found is not None:
                    return found
        return None


def _parameters(function: ast.FunctionDef) -> dict[str, _Value]:
    """Untyped parameters by their names."""
    found = {}
    for parameter in (*function.args.args, *function.args.kwonlyargs):
        words = ast.unparse(parameter.annotation) if parameter.annotation else "Any"
        if _UNTYPED.match(words) and parameter.arg in NAMES:
            found[parameter.arg] = _Value(NAMES[parameter.arg], many="[" in words)
    return found


def _by_name(name: str, value: ast.expr) -> _Value | None:
    """What another library's call gives into a variable that is called as a thing of this one."""
    if name in NAMES and isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        return _Value(NAMES[name])
    return None


def _assignments(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Targets and values, tuples taken apart."""
    if isinstance(node, ast.NamedExpr) or (isinstance(node, ast.AnnAssign) and node.value is not None):
        assert node.value is not None
        yield node.target, node.value
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                yield from zip(target.elts, node.value.elts, strict=False)
            else:
                yield target, node.value


def _walk(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """All inside of a function, in the order of the lines."""
    inner = [node for statement in function.body for node in ast.walk(statement)]
    return iter(sorted(inner, key=lambda node: getattr(node, "lineno", 0)))


def _many(value: _Value | None) -> _Value | None:
    return replace(value, many=True) if value else None


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _looked_up(node: ast.AST) -> str:
    """The attribute that `getattr(x, "name", default)` or `hasattr(x, "name")` looks for."""
    match node:
        case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), _]):
            return name
        case ast.Call(func=ast.Name(id="hasattr"), args=[_, ast.Constant(value=str(name))]):
            return name
    return ""


def _asks(test: ast.expr, scope: _Scope) -> tuple[str, str]:
    """The attribute that is there if a test holds, and the one that is there if it does not; "": none."""
    match test:
        case ast.Compare(left=ast.Name(id=name), ops=[ast.IsNot()], comparators=[ast.Constant(value=None)]):
            return scope.asked.get(name, ""), ""
        case ast.Compare(left=ast.Name(id=name), ops=[ast.Is()], comparators=[ast.Constant(value=None)]):
            return "", scope.asked.get(name, "")
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return tuple(reversed(_asks(operand, scope)))  # type: ignore[return-value]
        case ast.Name(id=name):
            return scope.asked.get(name, ""), ""
    return _looked_up(test), ""


def as_rows(found: Iterable[Use], surfaces: Mapping[str, Surface]) -> list[dict[str, Any]]:
    """Each attribute once: where it is taken, whether that is guarded, and who has it."""
    rows: dict[str, dict[str, Any]] = {}
    for use in found:
        row = rows.setdefault(str(use), {"use": str(use), "at": [], "guarded": True})
        row["at"].append(f"{use.file}:{use.line}")
        row["guarded"] &= bool(use.guard)
        row |= {name: not missing([use], offered) for name, offered in surfaces.items()}
    return sorted(rows.values(), key=lambda row: str(row["use"]))


if __name__ == "__main__":  # in the Python that the bindings are for
    print(json.dumps(surface(import_module(sys.argv[1]))))
