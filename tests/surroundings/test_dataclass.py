"""The relay's `dataclass` beside the standard library's, which it stands for."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import pytest

import relay.process.dataclass as own

BOTH = pytest.mark.parametrize("module", [own, dataclasses], ids=["own", "standard"])


def make(module: ModuleType, **how: bool) -> type[Any]:
    @module.dataclass(slots=True, **how)
    class Parcel:
        """A docstring."""

        serial: int
        name: str = "none"
        rests: list[int] = module.field(default_factory=list)

        def twice(self) -> int:
            return 2 * self.serial

        @property
        def size(self) -> int:
            return len(self.rests)

    return Parcel


@BOTH
def test_an_object_is_made_by_position_and_by_name_and_from_defaults(module: ModuleType) -> None:
    parcel = make(module)
    one, other = parcel(1), parcel(serial=1, name="a", rests=[3])
    assert (one.serial, one.name, one.rests, one.twice(), one.size) == (1, "none", [], 2, 0)
    assert (other.serial, other.name, other.rests, other.size) == (1, "a", [3], 1)
    assert parcel(1).rests is not one.rests
    assert parcel.__doc__ == "A docstring."
    for wrong in ({}, {"serial": 1, "unknown": 2}):
        with pytest.raises(TypeError, match=r"__init__\(\)"):
            parcel(**wrong)
    match one:
        case parcel(serial, name):
            assert (serial, name) == (1, "none")


@BOTH
def test_it_is_shown_and_compared_by_its_fields(module: ModuleType) -> None:
    parcel, frozen = make(module), make(module, frozen=True)
    assert repr(parcel(1)) == "make.<locals>.Parcel(serial=1, name='none', rests=[])"
    assert parcel(1) == parcel(1) != parcel(2)
    assert parcel(1) != frozen(1)
    assert parcel(1) != 1
    assert hash(frozen(1, "a", ())) == hash(frozen(1, "a", ())) != hash(frozen(2, "a", ()))
    with pytest.raises(TypeError, match="unhashable"):
        hash(parcel(1, "a", ()))
    by_identity = make(module, frozen=True, eq=False)
    one, other = by_identity(1), by_identity(1)
    assert one != other
    assert len({one, other}) == 2


@BOTH
def test_only_one_that_is_not_frozen_changes_and_none_has_more_than_its_fields(module: ModuleType) -> None:
    parcel, frozen = make(module)(1), make(module, frozen=True)(1)
    parcel.serial = 2
    assert parcel.serial == 2
    with pytest.raises(AttributeError, match="'serial'"):
        frozen.serial = 2
    with pytest.raises(AttributeError, match="'serial'"):
        del frozen.serial
    assert frozen.serial == 1
    for each in (parcel, frozen):
        with pytest.raises((AttributeError, TypeError)):
            each.unknown = 1
        assert not hasattr(each, "__dict__")


@BOTH
def test_a_changed_copy_and_a_dict_have_all_fields(module: ModuleType) -> None:
    one = make(module, frozen=True)(1, "a", [1])
    assert module.replace(one, name="b") == type(one)(1, "b", [1])
    assert module.asdict(one) == {"serial": 1, "name": "a", "rests": [1]}
    with pytest.raises(TypeError):
        module.replace(one, unknown=1)


def test_what_it_does_not_know_is_refused() -> None:
    with pytest.raises(TypeError, match="no class above it"):
        own.dataclass(slots=True)(type("Below", (Exception,), {"__annotations__": {}}))
    with pytest.raises(TypeError, match="has to have slots"):
        own.dataclass(slots=False)(type("Plain", (), {"__annotations__": {}}))
    with pytest.raises(TypeError, match="order"):
        own.dataclass(slots=True, order=True)
