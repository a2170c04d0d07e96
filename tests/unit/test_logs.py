"""Logs: one line an event, with its context, for people or for machines."""

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from common.logs import LogFormat, set_up_logs


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()  # so that set_up_logs does not close pytest's own
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def fail() -> None:
    enrol_key = "secret" + "-value"
    raise ValueError(f"bad key-of-{len(enrol_key)} letters")


def test_json_lines_carry_context_fields_and_level(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("json", "info", federation="digits", role="worker")
    structlog.get_logger().info("joined", lora_rank=4, client="Zoë")
    line = json.loads(capsys.readouterr().err)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "joined", "level": "info", "federation": "digits", "role": "worker", "lora_rank": 4, "client": "Zoë",
    }  # fmt: skip


def test_other_libraries_speak_the_same_language(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("json", "info", federation="digits")
    logging.getLogger("grpc").warning("lost %s", "connection")
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["level"], line["federation"]) == ("lost connection", "warning", "digits")


def test_text_is_one_readable_line(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("text", "info", federation="digits")
    structlog.get_logger().info("joined", lora_rank=4)
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert "joined" in line
    assert "federation=digits" in line
    assert "lora_rank=4" in line


def test_what_is_below_the_level_is_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("text", "warning")
    structlog.get_logger().info("quiet")
    logging.getLogger("grpc").info("quiet")
    structlog.get_logger().error("loud")
    (line,) = capsys.readouterr().err.splitlines()
    assert "loud" in line


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("library", ["ours", "other"])
def test_a_traceback_is_there_but_local_variables_are_not(
    log_format: LogFormat, library: str, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logs(log_format, "info")
    log = structlog.get_logger() if library == "ours" else logging.getLogger("grpc")
    try:
        fail()
    except ValueError:
        log.exception("task failed")
    written = capsys.readouterr().err
    assert "bad key-of-12 letters" in written
    assert "in fail" in written
    assert "secret-value" not in written
    if log_format == "json":
        assert "Traceback" in json.loads(written)["exception"]


def test_setting_up_again_replaces_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("json", "info", client="ada")
    set_up_logs("json", "info", client="bob")
    structlog.get_logger().info("joined")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["client"] == "bob"
