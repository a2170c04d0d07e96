"""A library that fails or hangs in the midst of a run: told once, never asked again, and the others go on."""

import threading
from collections.abc import Mapping

from structlog.testing import capture_logs

from common.trackers import Trackers


class _Noting:
    """Fails from the step that is given on."""

    def __init__(self, fails_from: float = float("inf")) -> None:
        self.fails_from = fails_from
        self.asked: list[int] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        assert values
        self.asked.append(step)
        if step >= self.fails_from:
            raise ConnectionError("nobody answers")

    def close(self) -> None:
        self.asked.append(-1)


def test_a_library_that_fails_is_told_of_once_and_not_asked_again() -> None:
    failing, sound = _Noting(fails_from=2), _Noting()
    with capture_logs() as logged:
        trackers = Trackers([("failing", lambda: failing), ("sound", lambda: sound)])
        for step in range(1, 7):
            trackers.note(step, {"loss": 1.0})
        trackers.close()
    assert [(line["event"], line["library"]) for line in logged] == [("tracking has ended", "failing")]
    assert failing.asked == [1, 2]
    assert sound.asked == [1, 2, 3, 4, 5, 6, -1]


def test_a_library_that_is_slow_to_open_holds_up_none_of_the_others() -> None:
    may_open, has_all = threading.Event(), threading.Event()
    sound = _Noting()

    def open_slowly() -> _Noting:
        assert may_open.wait(30)
        return _Noting()

    class _Telling:
        def log(self, step: int, values: Mapping[str, float]) -> None:
            sound.log(step, values)
            if step == 3:
                has_all.set()

        def close(self) -> None:
            sound.close()

    trackers = Trackers([("slow", open_slowly), ("sound", _Telling)])
    for step in range(1, 4):
        trackers.note(step, {"loss": 1.0})
    assert has_all.wait(30), "while the first is still not open"
    with capture_logs() as logged:
        trackers.close(0.5)
    assert [(line["event"], line["still_waiting"]) for line in logged] == [("tracking is incomplete", 3)]
    assert sound.asked == [1, 2, 3, -1]
    may_open.set()
