"""The reference of all settings of a role, made from its pydantic model so that it cannot be out of date.

A pure function from a model to Markdown; docs/configuration.md and `raflora config` print it.
"""

import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from common.settings import ENVIRONMENT_PREFIX, Section

_WORDS_OF_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", Path: "path"}
_FEW_KEYS = 3  # of a table in a list, told in the cell
_SIGNS_OF_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True)
class _Row:
    key: str
    kind: str
    default: str
    description: str


def reference(model: type[Section]) -> str:
    """One Markdown table a section: every key with its type, default and description."""
    parts = list(_tables(model, path=()))
    example = next((key for key, _ in model.model_fields.items()), "key").upper()
    parts.append(
        f"Each key can also be given as `--set section.key=value` or as an environment variable: "
        f"`{ENVIRONMENT_PREFIX}SECTION__KEY`, at the top level `{ENVIRONMENT_PREFIX}{example}`."
    )
    return "\n\n".join(parts) + "\n"


def _tables(model: type[Section], path: tuple[str, ...]) -> Iterator[str]:
    """This section's table, then those of the sections inside it."""
    rows, inner = [], []
    for name, field in model.model_fields.items():
        section = _section_in(field.annotation)
        if section is None:
            rows.append(_Row(name, _kind(field), _default(field), _sentence(field.description)))
        else:
            inner.append((name, section))
        listed = _listed_section_in(field.annotation)
        if listed is not None:
            inner.append((f"[{name}]", listed))
    title = f"### `[{'.'.join(path)}]`" if path else "### Top level"
    yield "\n\n".join(part for part in (title, _sentence(model.__doc__), _table(rows)) if part)
    for name, section in inner:
        yield from _tables(section, (*path, name))


def _table(rows: list[_Row]) -> str:
    if not rows:
        return ""
    lines = ["| Key | Type | Default | Meaning |", "| --- | --- | --- | --- |"]
    lines += [f"| `{r.key}` | {_cell(r.kind)} | {_cell(r.default)} | {_cell(r.description)} |" for r in rows]
    return "\n".join(lines)


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that a field holds, also an optional one."""
    for option in _options(annotation):
        if isinstance(option, type) and issubclass(option, Section):
            return option
    return None


def _listed_section_in(annotation: Any) -> type[Section] | None:
    """The section that a field holds a list of, if it has too many keys to be told in one cell."""
    listed = _section_in(get_args(annotation)[0]) if get_origin(annotation) is tuple else None
    return listed if listed is not None and len(listed.model_fields) > _FEW_KEYS else None


def _options(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def _kind(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(limit, bound):g}"
        for limit in field.metadata
        for bound, sign in _SIGNS_OF_BOUNDS.items()
        if getattr(limit, bound, None) is not None
    ]
    return ", ".join([_type_in_words(field.annotation), *bounds])


def _type_in_words(annotation: Any) -> str:
    options = [option for option in _options(annotation) if option is not type(None)]
    if len(options) > 1:
        return " or ".join(_type_in_words(option) for option in options)
    (only,) = options
    origin, inside = get_origin(only), get_args(only)
    if origin is Annotated:
        return _type_in_words(inside[0])
    if isinstance(only, FieldInfo):
        return _type_in_words(only.annotation)
    if origin is Literal:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in inside)
    if origin in (tuple, list, frozenset):
        return f"list of {_plural(_type_in_words(inside[0]))}"
    if origin is not None and len(inside) == 2:
        return "table" if inside[1] is Any else f"table of {_plural(_type_in_words(inside[1]))}"
    if hasattr(only, "__metadata__"):
        return _type_in_words(only.__origin__)
    if isinstance(only, type) and issubclass(only, Enum):
        return ", ".join(f"`{json.dumps(member.value)}`" for member in only)
    if isinstance(only, type) and issubclass(only, Section):
        few = len(only.model_fields) <= _FEW_KEYS
        return f"table ({', '.join(only.model_fields)})" if few else "table (below)"
    return _WORDS_OF_TYPES.get(only, getattr(only, "__name__", str(only)))


def _plural(words: str) -> str:
    return words.replace("table", "tables", 1) if words.startswith("table") else f"{words}s"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined:
        return "unset"
    if isinstance(value, Path):
        value = str(value)
    return f"`{json.dumps(value, default=str)}`"


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
