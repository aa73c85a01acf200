"""Strict YAML and `a.b=value` overrides into pydantic models; each mistake is one line: where, what, and the way out.

    configs/demo.yaml:12: tasks.sst.head has no field 'hiden'; did you mean 'hidden'?
    override 'tasks.sst.weight=two': tasks.sst.weight is 'two', not a number

A file that starts with `extends: base.yaml` is laid over that one (see `overlay`) and shows only what it changes.
Unions of models are told apart by a field `kind: Literal[...]`; a bare kind stands for it: `mixer: joint` is
`mixer: {kind: joint}`.
"""

import difflib
import json
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, NoReturn, TypeVar, Union, cast, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema

CONFIG_FILE = "config.yaml"  # of a run folder, with every default filled in
PLACES = "_places"  # what a config that was loaded knows besides its fields: where each of its parts was written

LONE_SURROGATE = re.compile("[\ud800-\udfff]")

Keys = tuple[str | int, ...]  # ("tasks", "sst", "files", 0)
Mistake = Mapping[str, Any]  # as pydantic tells it


class UserError(Exception):
    """A mistake in what the user wrote; the message is all they see."""


class MisfitError(ValueError):
    """For validators that see several parts of a config: which of them does not fit the others."""

    def __init__(self, keys: Keys, message: str) -> None:
        super().__init__(message)
        self.keys = keys


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Makes a line for the user of an error of the operating system: `what` could not be done, and why."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {error.strerror or error}") from error


def _scalars_made_strict(schema: Any) -> Any:
    if isinstance(schema, dict):
        strict = {"strict": True} if schema.get("type") in ("bool", "int", "float", "str") else {}
        return strict | {key: part if key == "default" else _scalars_made_strict(part) for key, part in schema.items()}
    return [_scalars_made_strict(part) for part in schema] if isinstance(schema, list) else schema


class Config(BaseModel):
    """Base of every config: no unknown fields, no changes once read, no "5" or true where a number is due."""

    # Fields named model_* are ours, not pydantic's.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        # ConfigDict(strict=True) would also refuse a list for a tuple and a text for a path.
        return cast(CoreSchema, _scalars_made_strict(handler(source)))

    def place_of(self, *keys: str | int) -> str:
        """What an error about a part begins with: its file and line, or the override, and its name."""
        places: dict[Keys, str] = self.__dict__.get(PLACES, {})
        written = next((places[keys[:end]] for end in range(len(keys), 0, -1) if keys[:end] in places), None)
        return f"{written}: {_dotted(keys)}" if written else _dotted(keys)


def _home_expanded(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError("a path cannot hold a NUL character")
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"{path} starts in the home of an unknown user") from None


def _is_regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"'{text}' is not a regular expression: {error}") from None
    return text


Pattern = Annotated[str, AfterValidator(_is_regex)]  # a regular expression, found anywhere in a parameter's name
UserPath = Annotated[Path, AfterValidator(_home_expanded)]  # a path in which ~ is somebody's home

T = TypeVar("T", bound=Config)


def load(model: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """The config in a YAML file, after overrides such as `optim.rules.0.lr=1e-5`; the last of two wins."""
    raw, places = _read_mapping(model, path)
    if "extends" in raw:
        name = raw.pop("extends")
        if not isinstance(name, str):
            raise UserError(f"{places['extends',]}: extends is {_show(name)}, not text")
        try:
            base, base_places = _read_mapping(model, path.parent / _home_expanded(Path(name)))
        except (UserError, ValueError) as error:
            raise UserError(f"{places['extends',]}: extends {name!r}: {error}") from None
        if "extends" in base:
            raise UserError(f"{base_places['extends',]}: {path} extends this file, which may not extend another one")

        raw = overlay(base, raw, on_replaced=partial(_forget, base_places))
        places = {keys: place for keys, place in base_places.items() if keys not in places} | places
    of_files = deepcopy(raw)
    for override in overrides:
        _override(model, raw, override, places)

    try:
        config = model.model_validate(raw)
    except ValidationError as error:
        before = _before_each(model, of_files, overrides)
        raise UserError("\n".join(_explain(model, error, places, before))) from None
    config.__dict__[PLACES] = places
    return config


def made(model: type[T], what: str, **values: Any) -> T:
    """The config of values that a program gives; `what` is what a mistake's line begins with."""
    try:
        return model.model_validate(_kinds_written_out(values, [model]))
    except ValidationError as error:
        raise UserError("\n".join(_explain(model, error, {(): what}, []))) from None


def overlay(below: Any, above: Any, keys: Keys = (), on_replaced: Callable[[Keys], object] = lambda keys: None) -> Any:
    """`above` laid over `below`, mapping by mapping; null takes away what is below it.

    Whatever is no mapping replaces what is below it whole, and so does a file (a mapping with a `path`) or a mapping of
    another `kind`; `on_replaced` hears where.
    """
    mappings = isinstance(below, dict) and isinstance(above, dict)
    if not mappings or "path" in above or above.get("kind", below.get("kind")) != below.get("kind"):
        on_replaced(keys)
        return above
    laid = {key: overlay(below.get(key), value, (*keys, key), on_replaced) for key, value in above.items()}
    return {key: value for key, value in (below | laid).items() if value is not None or key not in laid.keys() & below}


def _read_mapping(model: type[Config], path: Path) -> tuple[dict[str, Any], dict[Keys, str]]:
    """What a YAML file holds, kinds written out, and where each part of it was written, in the order of the file."""
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{line}: not UTF-8 text") from None

    places: dict[Keys, str] = {}
    raw = _read(text, lambda line: f"{path}:{line}", (), places)
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise UserError(f"{places[()]}: the top level is {_show(raw)}, not a mapping")
    return _kinds_written_out(raw, [model]), places


def _kinds_written_out(value: Any, types: list[Any]) -> Any:
    """The value of a part that may be of these types; each bare kind in it as the mapping that it stands for."""
    if isinstance(value, str) and any(map(_is_by_kind, types)):
        return {"kind": value}
    if isinstance(value, dict):
        return {key: _kinds_written_out(part, _inner_types(types, value, key)) for key, part in value.items()}
    if isinstance(value, list):
        return [_kinds_written_out(part, _inner_types(types, value, index)) for index, part in enumerate(value)]
    return value


def dump(config: Config) -> str:
    """The config as YAML, defaults filled in; `load` reads an equal one back."""
    return block(config.model_dump(mode="json", by_alias=True, round_trip=True))


def block(value: Any) -> str:
    """A value as YAML over many lines."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def flow(value: Any) -> str:
    """A value as YAML on one line, which an override may have behind its `=`."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=2**31, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def schema(model: type[Config]) -> dict[str, Any]:
    """The JSON schema that editors check a config against while it is typed."""
    whole = model.model_json_schema()
    whole = _with_bare_kinds(whole, whole.get("$defs", {}))
    whole["properties"]["extends"] = {"type": "string", "description": "A file that this one is laid over."}
    if "required" in whole:
        whole["anyOf"] = [{"required": ["extends"]}, {"required": whole.pop("required")}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole}


def _with_bare_kinds(part: Any, models: Mapping[str, Any]) -> Any:
    if isinstance(part, list):
        return [_with_bare_kinds(inner, models) for inner in part]
    if not isinstance(part, dict):
        return part
    part = {key: _with_bare_kinds(inner, models) for key, inner in part.items()}
    if "discriminator" not in part:
        return part
    by_kind = {key: part.pop(key) for key in ("discriminator", "oneOf")}
    needs = {kind: models[ref.rpartition("/")[2]] for kind, ref in by_kind["discriminator"]["mapping"].items()}
    alone = [kind for kind, member in needs.items() if set(member.get("required", ())) <= {"kind"}]
    return {"anyOf": [{"enum": alone}, by_kind], **part}


# YAML 1.2's core schema in decimal. PyYAML alone follows 1.1, where `no` is false, 1e-5 a text and 1:30 is ninety.
_SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]{1,300}", int),  # longer ones are floats, and infinite
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    ),
    "str": (r"(?s:.*)", str),
}
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Knows the scalars above and no others."""


class _Dumper(yaml.SafeDumper):
    """Quotes a text that looks like something else to YAML 1.2, or to the 1.1 of other tools."""


_Loader.yaml_implicit_resolvers = {}
for _name in ("null", "bool", "int", "float"):
    for _yaml in (_Loader, _Dumper):
        _yaml.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_SCALARS[_name][0]})\Z"), None)


def _read(text: str, place: Callable[[int], str], root: Keys, places: dict[Keys, str]) -> Any:
    """The value of a YAML text; notes in `places` where each part of it stands, as `place` names a line."""

    def fail(mark: yaml.Mark, problem: str) -> NoReturn:
        raise UserError(f"{place(mark.line + 1)}: {problem}")

    def check_characters(node: yaml.ScalarNode, keys: Keys) -> None:
        if LONE_SURROGATE.search(node.value):  # written as "\uD800": no file has such a name, no screen shows it
            fail(node.start_mark, f"{_dotted(keys)} has half a surrogate pair, which is no character")

    def build(node: yaml.Node, keys: Keys, mark: yaml.Mark) -> Any:
        places[keys] = place(mark.line + 1)
        if len(keys) > 99:  # or an alias of its own parent would never end
            fail(mark, "nested more than 99 levels deep")
        name = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and name == "map":
            mapping: dict[str, Any] = {}
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    fail(key.start_mark, f"{_dotted(keys)} has a list or a mapping as a key")
                check_characters(key, (*keys, key.value))
                if key.value in mapping:
                    child = (*keys, key.value)
                    fail(key.start_mark, f"{_dotted(child)} is given twice; first at {places[child]}")
                mapping[key.value] = build(value, (*keys, key.value), key.start_mark)
            return mapping
        if isinstance(node, yaml.SequenceNode) and name == "seq":
            return [build(item, (*keys, index), item.start_mark) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and name in _SCALARS:
            check_characters(node, keys)
            pattern, make = _SCALARS[name]
            if re.fullmatch(pattern, node.value):
                return make(node.value)
        fail(node.start_mark, f"{_dotted(keys)} is no valid {node.tag.replace(_TAG, '!!')}")

    if unprintable := _Loader.NON_PRINTABLE.search(text):
        line = 1 + text.count("\n", 0, unprintable.start())
        raise UserError(f"{place(line)}: the character {unprintable.group()!r} is not allowed in YAML")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        problem = ", ".join(filter(None, (error.context, error.problem)))
        fail(error.problem_mark or loader.get_mark(), f"not YAML: {problem}")
    except (ValueError, OverflowError, RecursionError) as error:  # PyYAML's slips, as on "\U00110000"
        fail(loader.get_mark(), f"not YAML: {error}")
    if node is None:
        places[root] = place(1)
        return None
    return build(node, root, node.start_mark)


def _override(model: type[Config], raw: dict[str, Any], override: str, places: dict[Keys, str]) -> None:
    place = f"override {override!r}"
    name, equals, text = override.partition("=")
    parts = name.split(".")
    if not (equals and all(parts)):
        raise UserError(f"{place}: not of the form a.b=value")
    if name == "extends":
        raise UserError(f"{place}: a file extends another one, an override does not; write it into the file")

    here: Any = [raw]
    key: str | int = 0
    keys: Keys = ()
    types: list[Any] = [model]
    for part in parts:
        if here[key] is None:
            here[key] = {}
            places[keys] = place
        here, around = here[key], types
        if isinstance(here, dict):
            was_there = part in here
            here.setdefault(part, None)
            key = part
        elif isinstance(here, list) and part in map(str, range(len(here))):
            was_there = True
            key = int(part)
        else:
            raise UserError(f"{place}: {_dotted(keys)} is {_show(here)}; there is no {part!r} in it")
        types = _inner_types(around, here, key)
        keys = (*keys, key)
    _forget(places, keys)
    here[key] = _kinds_written_out(_read(text, lambda line: place, keys, places), types)
    if here[key] is None and isinstance(here, dict) and not any(map(_may_be_null, types)):
        if not was_there and any(get_origin(outer) is dict for outer in _members(around)):
            known = [other for other in here if other != key]
            raise UserError(f"{place}: {_dotted(keys[:-1])} has no {key!r} to take away{_meant(key, known)}")
        if was_there:
            del here[key]


def _forget(places: dict[Keys, str], keys: Keys) -> None:
    """Drops the places of a part that was replaced whole."""
    for replaced in [old for old in places if old[: len(keys)] == keys]:
        del places[replaced]


# What pydantic wanted where it complains of a wrong `<name>_type`.
_WANTED = {"bool": "true or false", "int": "a whole number", "float": "a number", "string": "text", "path": "text"}
_WANTED |= dict.fromkeys(("dict", "model", "model_attributes"), "a mapping")
_WANTED |= dict.fromkeys(("list", "tuple", "set", "frozen_set"), "a list")


def _mistakes(error: ValidationError) -> list[Mistake]:
    return list(map(dict, error.errors(include_url=False)))


def _before_each(model: type[Config], raw: dict[str, Any], overrides: Sequence[str]) -> list[tuple[str, list[Mistake]]]:
    """Each override, and what was wrong before it was laid over what the files say."""
    before: list[tuple[str, list[Mistake]]] = []
    for override in overrides:
        try:
            model.model_validate(raw)
            before.append((override, []))
        except ValidationError as error:
            before.append((override, _mistakes(error)))
        _override(model, raw, override, {})
    return before


def _blamed(mistake: Mistake, before: Sequence[tuple[str, list[Mistake]]]) -> str | None:
    """The override that brought a mistake, which may be a misfit with what a file says; None if none did."""
    loc = mistake["loc"]
    for override, others in reversed(before):
        there = any((other["loc"], other["msg"]) == (loc, mistake["msg"]) for other in others)
        # What is wrong inside a part keeps pydantic from asking whether the part is right as a whole.
        unknown = any(other["loc"][: len(loc)] == loc for other in others)
        if not (there or unknown):
            return override
    return None


def _explain(
    model: type[Config],
    error: ValidationError,
    places: dict[Keys, str],
    before: Sequence[tuple[str, list[Mistake]]] = (),
) -> list[str]:
    """One line for each mistake, in the order of `places`; `before` is each override, and what was wrong before it."""
    order = list(places)
    lines = []
    for mistake in _mistakes(error):
        keys, complaint = _complaint(model, mistake, places)
        while keys not in places:  # what is missing, or came from a default, has no place of its own
            keys = keys[:-1]
        number, place = order.index(keys), places[keys]
        if not place.startswith("override ") and (override := _blamed(mistake, before)):
            number, place = len(order), f"override {override!r}"
        lines.append((number, f"{place}: {complaint}"))
    return [line for _, line in sorted(lines, key=lambda line: line[0])]


def _complaint(model: type[Config], mistake: Mistake, places: Container[Keys]) -> tuple[Keys, str]:
    error, value = mistake["type"], mistake["input"]
    keys, types = _locate(model, mistake["loc"])
    choices = [choice for literal in types for choice in get_args(literal)]
    must = re.sub(r"^\w+ should ", "must ", mistake["msg"]).replace(" after validation", "")
    if error.startswith("union_tag"):
        value = value.get("kind")
        if value is None or (*keys, "kind") in places:  # or it is a bare kind
            keys = (*keys, "kind")
        choices = [kind for member in types for kind in _kinds(member)]
        must = f"must be one of {', '.join(map(repr, choices))}"
    name = _dotted(keys)

    match error:
        case "extra_forbidden":
            known = [field for parent in _locate(model, mistake["loc"][:-1])[1] for field in _fields(parent)]
            of_program = len(keys) == 1 and keys not in places  # whose config extends no file
            known += ["extends"] if len(keys) == 1 and not of_program else []
            listed = f"; it has {', '.join(map(str, known))}" if known else ""
            whole = "it" if of_program else _dotted(keys[:-1])
            text = f"{whole} has no field {keys[-1]!r}{_meant(keys[-1], known) or listed}"
        case "missing":
            text = f"{name} is missing"
        case "union_tag_not_found":
            text = f"{name} is missing; {must}"
        case "value_error" | "assertion_error":
            reason = mistake["ctx"]["error"]
            text = f"{name}: {reason}" if keys else str(reason)
            keys = (*keys, *reason.keys) if isinstance(reason, MisfitError) else keys
        case _ if wanted := _WANTED.get(error.removesuffix("_type")):
            text = f"{name} is {_show(value)}, not {wanted}"
        case _:
            text = f"{name} is {_show(value)}{_meant(value, choices) or '; ' + must}"
    return keys, text


def _locate(model: type[Config], loc: Keys) -> tuple[Keys, list[Any]]:
    """The keys that a pydantic `loc` goes through and the types allowed at its end.

    Between the keys, `loc` also names the union member that was tried; only the types tell which is which.
    """
    keys: Keys = ()
    types: list[Any] = [model]
    for part in loc:
        if len(types) > 1:
            types = [member for member in types if part in _kinds(member)]
        elif part != "[key]":  # pydantic's mark behind a mapping's key that is itself wrong
            keys = (*keys, part)
            types = _members([_inside(outer, part) for outer in types])
    return keys, types


def _inner_types(types: list[Any], value: Any, part: str | int) -> list[Any]:
    """The types, as they were annotated, that a part may have of a value that has one of `types`."""
    kind = value.get("kind") if isinstance(value, dict) else None
    outer = _members(types)
    return [_inside(member, part) for member in outer if not _kinds(member) or kind in (None, *_kinds(member))]


def _inside(container: Any, part: str | int) -> Any:
    if fields := _fields(container):
        return fields.get(part)
    container = getattr(container, "__annotations__", {}).get("__pydantic_extra__", container)
    arguments = [argument for argument in get_args(container) if argument is not ...]
    return arguments[-1] if arguments else None  # the values of a mapping, the items of a list


def _members(annotations: Iterable[Any]) -> list[Any]:
    """The types that annotations allow, but for null."""
    members = []
    for annotation in annotations:
        if get_origin(annotation) is Annotated:
            members += _members(get_args(annotation)[:1])
        elif get_origin(annotation) in (Union, UnionType):
            members += _members(get_args(annotation))
        elif annotation not in (None, NoneType):
            members.append(annotation)
    return members


def _is_by_kind(annotation: Any) -> bool:
    """Whether a text is the kind of a model here, and not itself a value."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        return _is_by_kind(inner) and not any(isinstance(part, BeforeValidator) for part in metadata)
    if get_origin(annotation) in (Union, UnionType):
        return any(map(_is_by_kind, get_args(annotation))) and str not in _members([annotation])
    return bool(_kinds(annotation))


def _may_be_null(annotation: Any) -> bool:
    if get_origin(annotation) in (Annotated, Union, UnionType):
        return any(map(_may_be_null, get_args(annotation)))
    return annotation is NoneType


def _fields(model: Any) -> dict[str | int, Any]:
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return {}
    return {
        field.alias or name: Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        for name, field in model.model_fields.items()
    }


def _kinds(model: Any) -> tuple[Any, ...]:
    return get_args(_fields(model).get("kind"))


def _meant(word: Any, known: Iterable[Any]) -> str:
    close = difflib.get_close_matches(str(word), [text for text in known if isinstance(text, str)], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _show(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _dotted(keys: Keys) -> str:
    parts = [f"[{key}]" if isinstance(key, int) else f".{key}" if key.isprintable() else f".{key!r}" for key in keys]
    return "".join(parts).removeprefix(".") or "the top level"


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """The keys whose values differ, with both values; None where there was none."""
    found = []
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append((f"{prefix}{key}", old, new))
    return found
