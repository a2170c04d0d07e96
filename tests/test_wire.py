"""The .proto files against the rules of tests/wire.py, and each rule against a descriptor that breaks it."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import wire
from google.protobuf import text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from raflora.v1 import admin_pb2, federation_pb2, identity_pb2, status_pb2

PROTO = Path(__file__).resolve().parent.parent / "proto"
RELEASED = PROTO / "raflora/v1/released.binpb"


def _current() -> list[FileDescriptorProto]:
    files = []
    for module in (federation_pb2, status_pb2, admin_pb2, identity_pb2):
        file = FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(file)
        files.append(file)
    return files


def _hold(breaches: Iterable[str]) -> None:
    report = "\n".join(breaches)
    if report:
        pytest.fail(report, pytrace=False)


def _file(text: str) -> FileDescriptorProto:
    return text_format.Merge(text, FileDescriptorProto(name="raflora/v1/x.proto", package="raflora.v1"))


# --- the project


def test_every_proto_file_is_looked_at() -> None:
    found = {path.relative_to(PROTO).as_posix() for path in PROTO.rglob("*.proto")}
    assert found == {file.name for file in _current()}


def test_names_follow_the_rules() -> None:
    _hold(wire.naming_breaches(_current()))


@pytest.mark.parametrize("path", sorted(PROTO.rglob("*.proto")), ids=lambda path: path.name)
def test_every_message_and_rpc_has_a_sentence(path: Path) -> None:
    _hold(wire.comment_breaches(path.relative_to(PROTO).as_posix(), path.read_text(encoding="utf-8")))


def test_nothing_that_was_released_is_changed() -> None:
    assert RELEASED.exists(), f"{RELEASED.name} is missing; `python proto/release.py` writes it"
    _hold(wire.release_breaches(FileDescriptorSet.FromString(RELEASED.read_bytes()), _current()))


# --- the rules themselves: each can fail


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('service { name: "Status" }', "does not end in Service"),
        (
            'service { name: "SService" method { name: "Get" input_type: ".raflora.v1.Other" '
            'output_type: ".raflora.v1.GetResponse" } }',
            "rpc Get uses .raflora.v1.Other",
        ),
        ('enum_type { name: "TaskKind" value { name: "TRAIN" number: 0 } }', "does not begin with TASK_KIND_"),
        (
            'message_type { name: "M" enum_type { name: "Kind" value { name: "KIND_A" number: 0 } } }',
            "KIND_UNSPECIFIED = 0",
        ),
        ('message_type { name: "M" field { name: "loraRank" number: 1 } }', "lower_snake_case"),
        ('message_type { name: "M" nested_type { name: "N" field { name: "A" number: 1 } } }', "M.N.A"),
        ('package: "other"', "does not mirror its folder"),
    ],
)
def test_a_bad_name_is_caught(text: str, expected: str) -> None:
    assert expected in "\n".join(wire.naming_breaches([_file(text)]))


def test_a_message_without_a_comment_is_caught_with_its_line() -> None:
    text = "// Fine.\nmessage A {}\n\nmessage B {}\n"
    assert list(wire.comment_breaches("x.proto", text)) == ["x.proto:4: message B has no comment above it"]


OLD = _file(
    """
    message_type { name: "M"
      field { name: "a" number: 1 type: TYPE_UINT32 label: LABEL_OPTIONAL }
      field { name: "b" number: 2 type: TYPE_STRING label: LABEL_OPTIONAL } }
    enum_type { name: "E" value { name: "E_UNSPECIFIED" number: 0 } value { name: "E_A" number: 1 } }
    service { name: "SService" method { name: "Get" } }
    """
)


def _changed(old: str, new: str) -> list[str]:
    text = text_format.MessageToString(OLD, as_one_line=True)
    assert old in text
    released = FileDescriptorSet(file=[OLD])
    changed = text_format.Parse(text.replace(old, new), FileDescriptorProto())
    return list(wire.release_breaches(released, [changed]))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('name: "a" number: 1', 'name: "z" number: 1', "was optional uint32 a, is now optional uint32 z"),
        ("TYPE_UINT32", "TYPE_UINT64", "is now optional uint64 a"),
        ('name: "b" number: 2', 'name: "b" number: 3', "write `reserved 2;`"),
        ('name: "E_A" number: 1', 'name: "E_A" number: 2', "E 1 was E_A, is now gone"),
        ('name: "E_A" number: 1', 'name: "E_B" number: 1', "E 1 was E_A, is now E_B"),
        ('method { name: "Get" }', 'method { name: "Put" }', "rpc SService.Get was released and is gone"),
        ('method { name: "Get" }', 'method { name: "Get" server_streaming: true }', "streams otherwise"),
        ('name: "M"', 'name: "N"', "message M was released and is gone"),
        ("raflora/v1/x.proto", "raflora/v1/y.proto", "the file was released and is gone"),
    ],
)
def test_a_change_of_what_was_released_is_caught(old: str, new: str, expected: str) -> None:
    assert expected in "\n".join(_changed(old, new))


def test_a_new_field_and_a_reserved_number_are_no_breach() -> None:
    without_b = _file(
        """
        message_type { name: "M" reserved_range { start: 2 end: 3 }
          field { name: "a" number: 1 type: TYPE_UINT32 label: LABEL_OPTIONAL }
          field { name: "c" number: 3 type: TYPE_BYTES label: LABEL_REPEATED } }
        enum_type { name: "E" value { name: "E_UNSPECIFIED" number: 0 } value { name: "E_A" number: 1 } }
        service { name: "SService" method { name: "Get" } method { name: "Put" } }
        """
    )
    assert not list(wire.release_breaches(FileDescriptorSet(file=[OLD]), [without_b]))
