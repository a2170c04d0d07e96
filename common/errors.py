"""Every error that crosses a boundary, as types with a stable reason.

    RafloraError
      ConfigError                 config_invalid         a settings file, variable or --set is wrong
      InvalidRequest              invalid_request        a field is missing, out of range or malformed
        ProtocolTooOld            protocol_unsupported   no common protocol version
        AdapterMismatch           adapter_mismatch       keys, shapes or dtype differ from the manifest
          NotFinite               not_finite             a tensor holds NaN or infinity
          OutOfBounds             out_of_bounds          a number that no trained factor holds
          WrongSize               wrong_size             an upload is not as long as its rank demands
          NormTooLarge            norm_too_large         a rank partition is larger than the operator allows
          InspectionFailed        inspection_failed      the process that looked at these bytes did not survive it
        TooManyExamples           too_many_examples      more num_examples than the operator allows this site
        WrongRank                 wrong_rank             a rank that the client was not granted
      BaseModelMismatch           base_model_mismatch    another base model than the federation's
      SpecMismatch                spec_mismatch          other modules or shapes than the manifest's
      UnknownClient               unknown_client         the client never joined, or has left
      Evicted                     evicted                an operator shut the client out
      NotAuthenticated            not_authenticated      the caller showed no certificate that says who it is
      NotAllowed                  not_allowed            the caller's role may not do this, or not for this client
      Revoked                     revoked                the operator took the caller's identity back
      BadJoinToken                bad_join_token         a join token that is used up, too old or unknown
      IdentityConflict            identity_conflict      another worker already goes by this name
      UnknownTask                 unknown_task           no such task or lease in the open round
        LeaseSuperseded           lease_superseded       a newer lease was given for this task
      StaleSlice                  stale_slice            trained from another slice than was handed out
      StaleRound                  stale_round            names a round that is not the open one
      UpdateConflict              update_conflict        a second, different update for the same task
      UnknownBlob                 unknown_blob           these bytes were never uploaded or are gone
      WrongOffset                 wrong_offset           an upload continues at the wrong byte
      CorruptTransfer             corrupt_transfer       bytes arrived, but not those that were announced
      UploadTakenOver             upload_taken_over      a newer stream of this client carries the upload on
      TooBusy                     too_busy               a limit is reached; try again later
        QuotaExceeded             quota_exceeded         an organisation has used up what it was given for now
      NothingPublished            nothing_published      there is no adapter yet
        NoBestAdapter             no_best_adapter        no evaluation was counted yet, so no adapter is the best
      Unavailable                 unavailable            the other side cannot be reached
      CorruptStore                corrupt_store          a journal or blob is not what it was when written
      StorageFailed               storage_failed         the disk did not keep what it was given
      JournalConflict             journal_conflict       another coordinator wrote to the same journal
      StateInUse                  state_in_use           another coordinator holds the same state folder

`code` is the name of the gRPC status; one interceptor turns the pair into a status, the client turns it back.
A message says what was found, what was expected and whose it is.
"""

from typing import ClassVar


class RafloraError(Exception):
    """Something that has a name; catch the leaf, not this."""

    code: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "internal"


class ConfigError(RafloraError):
    """Settings are wrong; the process ends with exit status 2."""

    code = "FAILED_PRECONDITION"
    reason = "config_invalid"


class InvalidRequest(RafloraError):
    """A field is missing, out of range or malformed."""

    code = "INVALID_ARGUMENT"
    reason = "invalid_request"


class ProtocolTooOld(InvalidRequest):
    """The two sides speak no common protocol version."""

    code = "FAILED_PRECONDITION"
    reason = "protocol_unsupported"


class AdapterMismatch(InvalidRequest):
    """Tensor names, shapes or dtypes differ from the manifest."""

    reason = "adapter_mismatch"


class NotFinite(AdapterMismatch):
    """A tensor holds NaN or infinity."""

    reason = "not_finite"


class OutOfBounds(AdapterMismatch):
    """A number so large that it could only spoil the aggregation."""

    reason = "out_of_bounds"


class WrongSize(AdapterMismatch):
    """An upload is not exactly as long as its rank demands."""

    reason = "wrong_size"


class NormTooLarge(AdapterMismatch):
    """An update's norm in one rank partition is above the operator's bound."""

    reason = "norm_too_large"


class InspectionFailed(AdapterMismatch):
    """The process that inspected the bytes died or ran out of its limits; the coordinator itself did not."""

    reason = "inspection_failed"


class TooManyExamples(InvalidRequest):
    """More num_examples than the operator lets this site claim."""

    reason = "too_many_examples"


class WrongRank(InvalidRequest):
    """A rank that the client was not granted or cannot have."""

    reason = "wrong_rank"


class BaseModelMismatch(RafloraError):
    """The worker holds another base model than the federation's."""

    code = "FAILED_PRECONDITION"
    reason = "base_model_mismatch"


class SpecMismatch(RafloraError):
    """The worker would adapt other modules or shapes than the manifest's."""

    code = "FAILED_PRECONDITION"
    reason = "spec_mismatch"


class UnknownClient(RafloraError):
    """The client never joined or has left; join (again)."""

    code = "NOT_FOUND"
    reason = "unknown_client"


class Evicted(RafloraError):
    """An operator shut the client out; joining again is refused too."""

    code = "PERMISSION_DENIED"
    reason = "evicted"


class NotAuthenticated(RafloraError):
    """The caller showed no certificate that says who it is."""

    code = "UNAUTHENTICATED"
    reason = "not_authenticated"


class NotAllowed(RafloraError):
    """The caller is known, but its role may not do this, or it speaks for another client."""

    code = "PERMISSION_DENIED"
    reason = "not_allowed"


class Revoked(RafloraError):
    """The operator took this identity back; it needs a new join token."""

    code = "PERMISSION_DENIED"
    reason = "revoked"


class BadJoinToken(RafloraError):
    """A join token that is used up, too old or not of this federation; the operator can make a new one."""

    code = "PERMISSION_DENIED"
    reason = "bad_join_token"


class IdentityConflict(RafloraError):
    """Another worker already goes by this name."""

    code = "ALREADY_EXISTS"
    reason = "identity_conflict"


class UnknownTask(RafloraError):
    """There is no such task or lease in the open round."""

    code = "FAILED_PRECONDITION"
    reason = "unknown_task"


class LeaseSuperseded(UnknownTask):
    """A newer lease was given for this task; who holds the older one owes nothing any more."""

    reason = "lease_superseded"


class StaleSlice(RafloraError):
    """The update was trained from another slice than the one handed out."""

    code = "FAILED_PRECONDITION"
    reason = "stale_slice"


class StaleRound(RafloraError):
    """A request names a round that is not the open one."""

    code = "FAILED_PRECONDITION"
    reason = "stale_round"


class UpdateConflict(RafloraError):
    """A second, different update for a task that already has one; the first stays."""

    code = "ALREADY_EXISTS"
    reason = "update_conflict"


class UnknownBlob(RafloraError):
    """These bytes were never uploaded by this client, or are gone."""

    code = "NOT_FOUND"
    reason = "unknown_blob"


class WrongOffset(RafloraError):
    """A transfer continues at the wrong byte; `committed_bytes` is the right one."""

    code = "OUT_OF_RANGE"
    reason = "wrong_offset"

    def __init__(self, message: str, committed_bytes: int = 0) -> None:
        super().__init__(message)
        self.committed_bytes = committed_bytes


class CorruptTransfer(RafloraError):
    """Bytes arrived, but not those that were announced; start the transfer again."""

    code = "DATA_LOSS"
    reason = "corrupt_transfer"


class UploadTakenOver(RafloraError):
    """A newer stream of the same client carries this upload on; this one must stop."""

    code = "ABORTED"
    reason = "upload_taken_over"


class TooBusy(RafloraError):
    """A limit is reached; try again later."""

    code = "RESOURCE_EXHAUSTED"
    reason = "too_busy"


class QuotaExceeded(TooBusy):
    """An organisation has used up its share of uploads, bytes or disk for now."""

    reason = "quota_exceeded"


class NothingPublished(RafloraError):
    """There is no adapter yet."""

    code = "FAILED_PRECONDITION"
    reason = "nothing_published"


class NoBestAdapter(NothingPublished):
    """Adapters are published, but no evaluation was counted yet, so none is the best; the newest can be had."""

    code = "NOT_FOUND"
    reason = "no_best_adapter"


class Unavailable(RafloraError):
    """The other side cannot be reached; a retry may help."""

    code = "UNAVAILABLE"
    reason = "unavailable"


class CorruptStore(RafloraError):
    """A journal row or a blob is not what it was when it was written; an operator must look."""

    code = "DATA_LOSS"
    reason = "corrupt_store"


class StorageFailed(RafloraError):
    """The disk failed to keep bytes, so what it holds is unknown: the process must end, and nothing be tried again."""

    reason = "storage_failed"


class JournalConflict(RafloraError):
    """The journal does not continue where this coordinator left it: another one writes to it; this one must end."""

    code = "ABORTED"
    reason = "journal_conflict"


class StateInUse(RafloraError):
    """Another coordinator holds the same state folder."""

    code = "FAILED_PRECONDITION"
    reason = "state_in_use"


def by_reason(reason: str) -> type[RafloraError]:
    """The class for a reason from the wire; RafloraError for a word this version does not know."""
    found: dict[str, type[RafloraError]] = {}
    pending: list[type[RafloraError]] = [RafloraError]
    while pending:
        kind = pending.pop()
        found[kind.reason] = kind
        pending.extend(kind.__subclasses__())
    return found.get(reason, RafloraError)
