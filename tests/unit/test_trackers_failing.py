"""A library that fails in the midst of a run: told once, never asked again, and the others go on."""

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
