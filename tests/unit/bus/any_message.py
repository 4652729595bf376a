"""Strategies for every message there is, made from the types themselves, so that a new one is covered at once."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect as types

from bus import messages as m
from bus import wire
from bus.stats import Figures

TEXT = st.characters(exclude_categories=["Cs"])
MANY = 6


def values(kind: types.Type) -> st.SearchStrategy[Any]:
    """All values of a msgspec type; collections stay small."""
    match kind:
        case types.IntType(ge=ge, le=le):
            return st.integers(-(2**63) if ge is None else ge, 2**63 - 1 if le is None else le)
        case types.FloatType(ge=ge, le=le):
            return st.floats(min_value=ge, max_value=le, allow_nan=False)
        case types.BoolType():
            return st.booleans()
        case types.NoneType():
            return st.none()
        case types.StrType(pattern=str(pattern), max_length=most):
            return st.from_regex(pattern).filter(lambda text: most is None or len(text) <= most)
        case types.StrType(max_length=most):
            return st.text(TEXT, max_size=min(most or 40, 40))
        case types.BytesType(min_length=least, max_length=most):
            return st.binary(min_size=least or 0, max_size=most)
        case types.EnumType(cls=cls):
            return st.sampled_from(list(cls))
        case types.VarTupleType(item_type=item, max_length=most):
            return st.lists(values(item), max_size=min(most or MANY, MANY)).map(tuple)
        case types.TupleType(item_types=items):
            return st.tuples(*map(values, items))
        case types.DictType(key_type=key, value_type=value):
            return st.dictionaries(values(key), values(value), max_size=MANY)
        case types.UnionType(types=kinds):
            return st.one_of(*map(values, kinds))
        case types.StructType(cls=cls):
            return structs(cls)
        case _:
            raise NotImplementedError(f"no strategy for {kind}")


def structs(kind: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    """Instances of a struct, all fields drawn."""
    info = types.type_info(kind)
    assert isinstance(info, types.StructType)
    return st.fixed_dictionaries({field.name: values(field.type) for field in info.fields}).map(lambda f: kind(**f))


@st.composite
def messages(draw: st.DrawFn, kind: type[m.Message] | None = None) -> tuple[m.Message, list[bytes]]:
    """A message with payload frames that fit it."""
    chosen = kind or draw(st.sampled_from(list(wire.BY_OPCODE.values())))
    message = draw(structs(chosen))
    least, most = chosen.payloads
    payload = draw(st.lists(st.binary(max_size=64), min_size=least, max_size=most))
    if most:
        message = msgspec.structs.replace(message, payload=wire.describe(payload))
    return message, payload


def any_frames() -> st.SearchStrategy[list[bytes]]:
    """Frames that are nothing, or a message of any kind."""
    whole = messages().map(lambda drawn: [wire.encode(drawn[0]), *drawn[1]])
    return st.one_of(st.lists(st.binary(max_size=40), max_size=3), whole)


def figures() -> st.SearchStrategy[Figures]:
    return st.sampled_from(Figures.__subclasses__()).flatmap(structs)
