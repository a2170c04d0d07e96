"""What a coordinator can say at all, whatever the site allows: closed forms and named bounds, as pure checks.

Everything that it sends is looked at here before it reaches a file name, the trainer or PEFT.
"""

import math
import re
from collections.abc import Sequence

from common.codec import WireDtype
from common.errors import InvalidRequest, ProtocolTooOld
from common.transfer import check_digest
from common.version import PROTOCOL, PROTOCOL_OLDEST
from worker.config import KNOWN_TASKS, LAYER_NAME, LAYER_PATTERN
from worker.messages import ModelRequest, Place, Task, TaskKind, Welcome, printable
from worker.trainer_protocol import GENERATION, MATCHES, METHODS, EvaluationPlan, Plan

MAX_NAME_CHARACTERS = 100  # of a federation
MAX_LABELS = 32_768  # ImageNet has 21,841
MAX_LABEL_CHARACTERS = 200
MAX_LABELS_CHARACTERS = 1 << 20  # of all labels: they must fit into one line to the trainer
MAX_RANK_LEVELS = 64
MAX_RANK = 4096
MAX_LAYERS = 1024
MAX_LAYER_CHARACTERS = 200
MAX_LAYER_PATTERNS = 64  # each is tried on every layer of the model
MAX_SCALING = 1e4  # lora_alpha / rank of any published recipe is below 1e3
MAX_BATCH_SIZE = 1 << 16
MAX_WARMUP_STEPS = 1_000_000
MAX_HEARTBEAT_SECONDS = 3600.0
MAX_NEW_TOKENS = 32_768  # of one generated answer
MAX_EVALUATED_EXAMPLES = 1 << 32  # as many as one client may have
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_LAYER = re.compile(LAYER_NAME)
_PATTERN = re.compile(LAYER_PATTERN)
_SHOWN = 80  # characters of what was found, in a message


def check_welcome(welcome: Welcome) -> None:
    """Raises InvalidRequest, or ProtocolTooOld, unless the answer to the handshake can be meant."""
    if not PROTOCOL_OLDEST <= welcome.protocol <= PROTOCOL:
        raise ProtocolTooOld(
            f"handshake: protocol {welcome.protocol}, but this worker speaks {PROTOCOL_OLDEST} to {PROTOCOL}"
        )
    if not _NAME.fullmatch(welcome.federation) or len(welcome.federation) > MAX_NAME_CHARACTERS:
        raise _invalid("handshake: federation", welcome.federation, "a short name of letters, digits, . _ -")
    if not 0 <= welcome.batch_size <= MAX_BATCH_SIZE:
        raise _invalid("handshake: batch_size", welcome.batch_size, f"up to {MAX_BATCH_SIZE}")
    if not 0 <= welcome.lora_dropout < 1:
        raise _invalid("handshake: lora_dropout", welcome.lora_dropout, "at least 0 and below 1")
    if len(welcome.rank_levels) > MAX_RANK_LEVELS:
        raise InvalidRequest(f"handshake: {len(welcome.rank_levels)} rank levels; at most {MAX_RANK_LEVELS} are taken")
    for level in welcome.rank_levels:
        if not 1 <= level <= MAX_RANK:
            raise _invalid("handshake: rank level", level, f"1 to {MAX_RANK}")
    if not 0 <= welcome.memory_share <= 1:
        raise _invalid("handshake: memory_share", welcome.memory_share, "above 0 and up to 1, or 0: not told")
    _check_model(welcome.model)


def check_place(place: Place) -> None:
    """Raises InvalidRequest unless the answer to a join can be meant."""
    check_digest(place.manifest_digest, "join: manifest")
    if not 0 < place.heartbeat_seconds <= MAX_HEARTBEAT_SECONDS:  # NaN is not in there either
        raise _invalid("join: heartbeat_seconds", place.heartbeat_seconds, f"up to {MAX_HEARTBEAT_SECONDS:g}, above 0")
    if place.wire_dtype not in list(WireDtype):
        raise _invalid("join: wire dtype", place.wire_dtype, ", ".join(WireDtype))


def check_task(task: Task) -> None:
    """Raises InvalidRequest unless the task can be meant; its numbers then survive the way to the trainer."""
    check_digest(task.adapter.digest, f"round {task.round}: slice")
    if not 0 < task.scaling <= MAX_SCALING:
        raise _invalid(f"round {task.round}: scaling", task.scaling, f"up to {MAX_SCALING:g}, above 0")
    if task.kind is TaskKind.TRAIN:
        _check_plan(task.plan, f"round {task.round}:")
    else:
        _check_evaluation(task.evaluation, f"round {task.round}:")


def _check_plan(plan: Plan, whose: str) -> None:
    if not 1 <= plan.batch_size <= MAX_BATCH_SIZE:
        raise _invalid(f"{whose} batch_size", plan.batch_size, f"1 to {MAX_BATCH_SIZE}")
    numbers = {
        "learning_rate": plan.learning_rate,
        "local_epochs": plan.local_epochs,
        "weight_decay": plan.weight_decay,
        "max_grad_norm": plan.max_grad_norm,
    }
    for name, number in numbers.items():
        if not (math.isfinite(number) and number >= 0):
            raise _invalid(f"{whose} {name}", number, "a finite number, not negative")
    if not 0 <= plan.lora_dropout < 1:
        raise _invalid(f"{whose} lora_dropout", plan.lora_dropout, "at least 0 and below 1")
    if not 0 <= plan.warmup_steps <= MAX_WARMUP_STEPS:
        raise _invalid(f"{whose} warmup_steps", plan.warmup_steps, f"0 to {MAX_WARMUP_STEPS}")


def _check_evaluation(plan: EvaluationPlan, whose: str) -> None:
    if plan.method not in METHODS:
        raise _invalid(f"{whose} evaluation method", plan.method, ", ".join(METHODS))
    if plan.match not in MATCHES:
        raise _invalid(f"{whose} evaluation match", plan.match, ", ".join(MATCHES))
    fewest = 1 if plan.method == GENERATION else 0
    if not fewest <= plan.max_new_tokens <= MAX_NEW_TOKENS:
        raise _invalid(f"{whose} max_new_tokens", plan.max_new_tokens, f"{fewest} to {MAX_NEW_TOKENS}")
    if not 0 <= plan.max_examples <= MAX_EVALUATED_EXAMPLES:
        raise _invalid(f"{whose} max_examples", plan.max_examples, f"0 (all) to {MAX_EVALUATED_EXAMPLES}")


def _check_model(model: ModelRequest) -> None:
    if model.base_model_digest:
        check_digest(model.base_model_digest, "handshake: base model")
    if model.task not in KNOWN_TASKS:
        raise _invalid("handshake: task", model.task, ", ".join(KNOWN_TASKS))
    if model.global_rank < 1:
        raise InvalidRequest(f"handshake: global rank {model.global_rank}, expected at least 1")
    if len(model.labels) > MAX_LABELS or sum(map(len, model.labels)) > MAX_LABELS_CHARACTERS:
        raise InvalidRequest(f"handshake: {len(model.labels)} labels; at most {MAX_LABELS} short ones are taken")
    if len(set(model.labels)) != len(model.labels):
        raise InvalidRequest("handshake: a label stands twice")
    for label in model.labels:
        if not label.isprintable() or not 0 < len(label) <= MAX_LABEL_CHARACTERS:
            raise _invalid("handshake: label", label, f"1 to {MAX_LABEL_CHARACTERS} printable characters")
    patterns = [name for name in model.target_modules if not _LAYER.fullmatch(name)]
    if len(patterns) > MAX_LAYER_PATTERNS:
        raise InvalidRequest(f"handshake: {len(patterns)} patterns; at most {MAX_LAYER_PATTERNS} are taken")
    _check_layers("target_modules", model.target_modules, _PATTERN, "a layer's name or its end; * and ? are allowed")
    _check_layers("modules_to_save", model.modules_to_save, _LAYER, "a layer's name, or the end of one; no pattern")


def _check_layers(what: str, names: Sequence[str], form: re.Pattern[str], expected: str) -> None:
    if len(names) > MAX_LAYERS:
        raise InvalidRequest(f"handshake: {len(names)} {what}; at most {MAX_LAYERS} are taken")
    for name in names:
        if len(name) > MAX_LAYER_CHARACTERS or not form.fullmatch(name):
            raise _invalid(f"handshake: {what}", name, expected)


def _invalid(what: str, found: object, expected: str) -> InvalidRequest:
    return InvalidRequest(f"{what} {printable(repr(found), _SHOWN)}; expected: {expected}")
