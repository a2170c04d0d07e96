"""The rules of the wire: names, comments, and that a released field number is never changed or used again.

The checkers take descriptors and texts and return sentences; `test_wire.py` gives them the project's own.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

_DECLARATION = re.compile(r"\s*(message|enum|service|rpc)\s+(\w+)")


def naming_breaches(files: Iterable[FileDescriptorProto]) -> Iterator[str]:
    """Names that are not buf's STANDARD: XService, XRequest and XResponse per RPC, ENUM_NAME_VALUE with a zero."""
    for file in files:
        if file.package.replace(".", "/") != file.name.rpartition("/")[0]:
            yield f"{file.name}: the package {file.package} does not mirror its folder"
        for service in file.service:
            yield from _service_breaches(file, service)
        for enum in _enums_of(file):
            yield from _enum_breaches(file, enum)
        for name, message in _messages_of(file):
            for field in message.field:
                if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", field.name):
                    yield f"{file.name}: {name}.{field.name} is not in lower_snake_case"


def comment_breaches(path: str, text: str) -> Iterator[str]:
    """Messages, enums, services and RPCs without a comment on the line above."""
    previous = ""
    for number, line in enumerate(text.splitlines(), 1):
        found = _DECLARATION.match(line)
        if found and not previous.strip().startswith("//"):
            yield f"{path}:{number}: {found[1]} {found[2]} has no comment above it"
        previous = line


def release_breaches(released: FileDescriptorSet, current: Iterable[FileDescriptorProto]) -> Iterator[str]:
    """What an older peer would misunderstand: a number that has gone unreserved, or means something else now."""
    now = {file.name: file for file in current}
    for file in released.file:
        if file.name not in now:
            yield f"{file.name}: the file was released and is gone"
            continue
        yield from _changed_messages(file, now[file.name])
        yield from _changed_enums(file, now[file.name])
        yield from _changed_services(file, now[file.name])


def _service_breaches(file: FileDescriptorProto, service: ServiceDescriptorProto) -> Iterator[str]:
    if not service.name.endswith("Service"):
        yield f"{file.name}: service {service.name} does not end in Service"
    for method in service.method:
        for found, ending in ((method.input_type, "Request"), (method.output_type, "Response")):
            expected = f".{file.package}.{method.name}{ending}"
            if found != expected:
                yield f"{file.name}: rpc {method.name} uses {found}; {expected} is expected"


def _enum_breaches(file: FileDescriptorProto, enum: EnumDescriptorProto) -> Iterator[str]:
    prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum.name).upper() + "_"
    for value in enum.value:
        if not value.name.startswith(prefix):
            yield f"{file.name}: {enum.name}.{value.name} does not begin with {prefix}"
    if enum.value[0].number != 0 or enum.value[0].name != f"{prefix}UNSPECIFIED":
        yield f"{file.name}: {enum.name} does not begin with {prefix}UNSPECIFIED = 0"


def _messages_of(file: FileDescriptorProto) -> Iterator[tuple[str, DescriptorProto]]:
    waiting = [(message.name, message) for message in file.message_type]
    while waiting:
        name, message = waiting.pop()
        yield name, message
        waiting.extend((f"{name}.{inner.name}", inner) for inner in message.nested_type)


def _enums_of(file: FileDescriptorProto) -> Iterator[EnumDescriptorProto]:
    yield from file.enum_type
    for _, message in _messages_of(file):
        yield from message.enum_type


def _changed_messages(old: FileDescriptorProto, new: FileDescriptorProto) -> Iterator[str]:
    messages: Mapping[str, DescriptorProto] = dict(_messages_of(new))
    for name, message in _messages_of(old):
        if name not in messages:
            yield f"{old.name}: message {name} was released and is gone"
            continue
        fields = {field.number: field for field in messages[name].field}
        reserved = {n for r in messages[name].reserved_range for n in range(r.start, r.end)}
        for field in message.field:
            here = f"{old.name}: {name} = {field.number}"
            if field.number not in fields:
                if field.number not in reserved:
                    yield f"{here}: {field.name} was released and is gone; write `reserved {field.number};`"
            elif _meaning(fields[field.number]) != _meaning(field):
                was, now = _meaning(field), _meaning(fields[field.number])
                yield f"{here}: was {' '.join(was)}, is now {' '.join(now)}; take a new number"


def _meaning(field: FieldDescriptorProto) -> tuple[str, ...]:
    label = FieldDescriptorProto.Label.Name(field.label).removeprefix("LABEL_").lower()
    kind = field.type_name or FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    return label, kind, field.name


def _changed_enums(old: FileDescriptorProto, new: FileDescriptorProto) -> Iterator[str]:
    enums = {enum.name: {value.number: value.name for value in enum.value} for enum in _enums_of(new)}
    for enum in _enums_of(old):
        for value in enum.value:
            found = enums.get(enum.name, {}).get(value.number)
            if found != value.name:
                yield f"{old.name}: {enum.name} {value.number} was {value.name}, is now {found or 'gone'}"


def _changed_services(old: FileDescriptorProto, new: FileDescriptorProto) -> Iterator[str]:
    methods = {(s.name, m.name): m for s in new.service for m in s.method}
    for service in old.service:
        for method in service.method:
            found = methods.get((service.name, method.name))
            if found is None:
                yield f"{old.name}: rpc {service.name}.{method.name} was released and is gone"
            elif (found.client_streaming, found.server_streaming) != (
                method.client_streaming,
                method.server_streaming,
            ):
                yield f"{old.name}: rpc {service.name}.{method.name} streams otherwise than it was released"
