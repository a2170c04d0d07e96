"""A trainer without torch that speaks the real protocol: its training doubles lora_A and adds one to lora_B.

What it should do wrong stands in the file `mishaps` of its model's folder, one a line, used up from the top: crash,
exit, hang, wait_at_gate, wait_for_stop, babble, out_of_memory, secret, nan, load_fails.
Started as `python tests/tiny_trainer.py`.
"""

import json
import os
import signal
import sys
from pathlib import Path

from common.adapter import Adapter, AdapterSpec, Factors, ModuleShape, TensorShape
from common.codec import Layout, WireDtype, decode, encode
from common.errors import RafloraError
from worker.trainer_protocol import (
    Answer,
    DryRun,
    DryRunDone,
    Evaluate,
    Evaluated,
    Failed,
    Load,
    Loaded,
    ProgressMade,
    Stop,
    Train,
    Trained,
    request_from_line,
    to_line,
)

SPEC = AdapterSpec((ModuleShape("q_proj", 8, 6), ModuleShape("v_proj", 4, 6)), (TensorShape("head", (3, 4)),))
BASE_MODEL_DIGEST = "ba5e" * 16
NUM_EXAMPLES = 40


def main() -> None:
    folder = Path()
    for line in sys.stdin.buffer:
        request = request_from_line(line)
        if isinstance(request, Stop):
            continue  # too late: its task was answered already
        if isinstance(request, Load):
            folder = Path(json.loads(request.config_json)["model"]["path"])
            (folder / "pid").write_text(str(os.getpid()))
            _say(_load(folder))
            continue
        if isinstance(request, DryRun):
            folder = Path(json.loads(request.config_json)["model"]["path"])
        mishap = _next_of(folder / "mishaps")
        try:
            _say(_misbehave(mishap, folder) or _work(request, poison=mishap == "nan"))
        except RafloraError as error:
            _say(Failed(error.reason, str(error)))


def _load(folder: Path) -> Answer:
    mishaps = folder / "mishaps"
    if mishaps.exists() and mishaps.read_text().startswith("load_fails"):
        _next_of(mishaps)
        return Failed("data_error", "data.train: there is no such file")
    return _loaded()


def dry_run(request: DryRun) -> DryRunDone:
    """A MiB a rank, ten an example, a hundred for the rest."""
    peak_bytes = (100 + 10 * request.micro_batch + request.lora_rank) << 20
    return DryRunDone(peak_bytes, 0.5, BASE_MODEL_DIGEST, SPEC.largest_rank, "cpu", 1 << 30)


def _work(request: Train | Evaluate | DryRun, *, poison: bool) -> Answer:
    if isinstance(request, DryRun):
        return dry_run(request)
    layout = Layout(SPEC, request.lora_rank, WireDtype(request.wire_dtype))
    adapter = decode(Path(request.slice_path).read_bytes(), layout, "slice")
    if isinstance(request, Evaluate):
        return Evaluated(num_examples=10, metrics={"accuracy": 0.5})
    _say(ProgressMade("training", 1, 1, 0.25))
    content = encode(trained(adapter, keeps_lora_A=request.plan.freezes_lora_A), layout.dtype)
    if poison:
        content = content[: len(layout.header)] + b"\xff" * 4 + content[len(layout.header) + 4 :]
    Path(request.update_path).write_bytes(content)
    return Trained(num_examples=NUM_EXAMPLES, seconds=1.5, metrics={"train_loss": 0.25})


def trained(adapter: Adapter, *, keeps_lora_A: bool = False) -> Adapter:
    growth = 1 if keeps_lora_A else 2
    modules = {name: Factors(growth * f.lora_A, f.lora_B + 1) for name, f in adapter.modules.items()}
    return Adapter(modules, adapter.tensors)


def _misbehave(mishap: str, folder: Path) -> Failed | None:
    match mishap:
        case "crash":
            print("the last words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            print("no kernel image is available", file=sys.stderr, flush=True)
            sys.exit(7)
        case "hang":
            _say(ProgressMade("training", 1, 100, 0.5))
            signal.pause()
        case "wait_at_gate":
            _say(ProgressMade("training", 1, 100, 0.5))
            (folder / "gate").read_bytes()  # a FIFO of the test's: opens when the test does
        case "wait_for_stop":
            _say(ProgressMade("training", 1, 100, 0.5))
            assert isinstance(request_from_line(sys.stdin.buffer.readline()), Stop)
            return Failed("stopped", "at step 1 of 100")
        case "secret":
            return Failed("a_new_word", "/data/patients.csv, line 7: column 'name' holds 'Jane'")
        case "babble":
            sys.stdout.write("this is no message\n")
            sys.stdout.flush()
        case "out_of_memory":
            return Failed("out_of_memory", "rank 4 does not fit")
    return None


def _next_of(mishaps: Path) -> str:
    if not mishaps.exists():
        return ""
    first, _, rest = mishaps.read_text().partition("\n")
    mishaps.write_text(rest)
    return first


def _loaded() -> Loaded:
    return Loaded(
        base_model_digest=BASE_MODEL_DIGEST,
        modules=tuple((m.name, m.out_features, m.in_features) for m in SPEC.modules),
        tensors=tuple((t.name, t.shape) for t in SPEC.tensors),
        num_examples=NUM_EXAMPLES,
        device="cpu",
        memory_bytes=1 << 30,
        num_test_examples=NUM_EXAMPLES,
    )


def _say(answer: Answer) -> None:
    sys.stdout.buffer.write(to_line(answer))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
