"""What a failed call means: a status from the wire as a class of common.errors, in plain words."""

import re
from collections.abc import Mapping

from common.channel import COMMITTED_BYTES_KEY, REASON_KEY
from common.errors import ProtocolTooOld, RafloraError, TooBusy, Unavailable, WrongOffset, by_reason
from worker.messages import printable

_OFFSET = re.compile(r"[0-9]{1,19}")
_NOBODY_ANSWERED = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"})
# What proxies and dying connections leave in the details, whatever the code beside it. The last is what gRPC on this
# side says of a call that was reset before it had begun; no coordinator has answered then.
_BROKEN_OFF = ("RST_STREAM", "Stream removed", "Received http2 header", "Internal error from Core")
_PLAIN_WORDS = (
    ("certificate has expired", "the coordinator's certificate has expired, or this machine's clock is wrong"),
    ("certificate is not yet valid", "the coordinator's certificate is not valid yet: one of the two clocks is wrong"),
    ("local issuer", "the coordinator's certificate is of another authority than the one trusted here"),
    ("self signed", "the coordinator's certificate is of another authority than the one trusted here"),
    ("self-signed", "the coordinator's certificate is of another authority than the one trusted here"),
    ("hostname verification", "the coordinator's certificate is for another name than this address"),
    ("wrong_version_number", "what listens there does not speak TLS"),
    ("handshake failed", "TLS handshake failed"),
    ("connection refused", "connection refused"),
    ("no route to host", "no route to host"),
    ("network is unreachable", "network is unreachable"),
    ("resolv", "name not resolved"),
    ("name not found", "name not resolved"),
    ("timed out", "connection timed out"),
    ("timeout", "connection timed out"),
    ("connection reset", "connection reset"),
    ("socket closed", "connection closed"),
    ("goaway", "connection closed"),
)
_LONGEST_QUOTE = 200


def meaning_of(code: str, details: str, trailing: Mapping[str, str], address: str) -> RafloraError:
    """The error behind a gRPC status (its name, "UNAVAILABLE"), its details and its trailing metadata.

    With a reason it is what the coordinator said; without one gRPC, a proxy or a crash made it.
    """
    reason, details = trailing.get(REASON_KEY), printable(details)  # a stranger's words
    if reason is None:
        return _without_reason(code, details, address)
    kind = by_reason(reason)
    if issubclass(kind, WrongOffset):
        committed = trailing.get(COMMITTED_BYTES_KEY, "")
        return kind(details, committed_bytes=int(committed) if _OFFSET.fullmatch(committed) else 0)
    return kind(details)


def _without_reason(code: str, details: str, address: str) -> RafloraError:
    if code in _NOBODY_ANSWERED or any(sign in details for sign in _BROKEN_OFF):
        return Unavailable(f"coordinator {address} cannot be reached: {_in_plain_words(code, details)}")
    if code == "UNIMPLEMENTED":
        return ProtocolTooOld(f"{address} answers, but does not speak raflora.v1 as this version does: {details}")
    if code == "RESOURCE_EXHAUSTED":
        return TooBusy(f"coordinator {address}: {details}")
    return RafloraError(f"coordinator {address} answered {code}: {details}")


def _in_plain_words(code: str, details: str) -> str:
    lowered = details.lower()
    for sign, words in _PLAIN_WORDS:
        if sign in lowered:
            # Certificates fail in many ways, and gRPC's own text is all there is to tell them apart.
            return f"{words} ({details[-_LONGEST_QUOTE:]})" if words.startswith("TLS") else words
    if code == "DEADLINE_EXCEEDED":
        return "no answer in time"
    return details[:_LONGEST_QUOTE]
