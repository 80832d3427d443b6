"""`dataclass` as in the standard library's `dataclasses`, as far as a worker makes use of it, for its memory.

The standard library's imports `inspect`, `ast` and `dis`, and leaves 13 KiB with each class, most of it functions that
are compiled for that class alone: 1.3 MB of a worker that has seen no client. Here one function is compiled for a
class, which sets its slots directly (to make a frozen object takes two thirds of the time), and all share the others.

Type checkers are told that it is the standard library's own. Of that it knows no inheritance, `order`, `InitVar` or
pickling, and says so where a class is made, or has no such argument; `asdict` leaves the values as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

__all__ = ["asdict", "dataclass", "field", "replace"]

C = TypeVar("C", bound=type)
T = TypeVar("T")


class _Made:
    """A default that is made anew for each object."""

    def __init__(self, make: Callable[[], object]) -> None:
        self.make = make


def _field(*, default_factory: Callable[[], object]) -> object:
    return _Made(default_factory)


def _dataclass(*, slots: bool, frozen: bool = False, eq: bool = True) -> Callable[[C], C]:
    def with_slots(cls: C) -> C:
        if not slots or cls.__bases__ != (object,):
            raise TypeError(f"{cls.__qualname__}: it has to have slots, and no class above it")
        names = tuple(cls.__annotations__)
        defaults = {name: value for name, value in vars(cls).items() if name in names}
        body: dict[str, Any] = {"__qualname__": cls.__qualname__, "__slots__": names, "__match_args__": names}
        body["__repr__"] = _repr
        if eq:
            body |= {"__eq__": _eq, "__hash__": _hash if frozen else None}
        if frozen:
            body |= {"__setattr__": _refuse_to_set, "__delattr__": _refuse_to_delete}
        body |= {name: value for name, value in vars(cls).items() if name not in (*names, "__dict__", "__weakref__")}
        made = type(cls)(cls.__name__, cls.__bases__, body)
        type.__setattr__(made, "__init__", _init(made, names, defaults))
        return made

    return with_slots


def _init(cls: type, names: tuple[str, ...], defaults: dict[str, object]) -> Callable[..., None]:
    scope: dict[str, Any] = {f"default_{name}": default for name, default in defaults.items()}
    parameters, lines = [], []
    for name in names:
        scope[f"set_{name}"] = vars(cls)[name].__set__
        parameters.append(f"{name}=default_{name}" if name in defaults else name)
        default, value = defaults.get(name), name
        if isinstance(default, _Made):
            scope[f"make_{name}"] = default.make
            value = f"make_{name}() if {name} is default_{name} else {name}"
        lines.append(f" set_{name}(self, {value})\n")
    exec(f"def __init__(self, {', '.join(parameters)}):\n{''.join(lines)}", scope)
    init: Callable[..., None] = scope["__init__"]
    init.__qualname__ = f"{cls.__qualname__}.__init__"
    return init


def _asdict(of: object) -> dict[str, object]:
    return {name: getattr(of, name) for name in type(of).__match_args__}  # type: ignore[attr-defined]


def _replace(of: T, /, **changes: object) -> T:
    return type(of)(**(_asdict(of) | changes))


def _repr(self: object) -> str:
    return f"{type(self).__qualname__}({', '.join([f'{name}={value!r}' for name, value in _asdict(self).items()])})"


def _eq(self: object, other: object) -> bool:
    return _asdict(self) == _asdict(other) if type(other) is type(self) else NotImplemented


def _hash(self: object) -> int:
    return hash(tuple(_asdict(self).values()))


def _refuse_to_set(self: object, name: str, value: object) -> None:
    raise AttributeError(f"cannot assign to field {name!r}")


def _refuse_to_delete(self: object, name: str) -> None:
    raise AttributeError(f"cannot delete field {name!r}")


if TYPE_CHECKING:
    from dataclasses import asdict, dataclass, field, replace
else:
    asdict, dataclass, field, replace = _asdict, _dataclass, _field, _replace
