"""What happens when memory runs out: the same work with fewer examples at once, or an error that says what to do.

The batch stays the one that the federation asked for; it is accumulated from smaller parts. Nothing here imports torch,
so that the trainer can answer before it is loaded. Messages name no file: they leave the site.
"""

import gc
import sys
from collections.abc import Callable
from typing import TypeVar

import structlog

from common.errors import RafloraError

Result = TypeVar("Result")
_GIB = 1 << 30
# In what torch says where it raises a plain RuntimeError.
_SIGNS = (
    "DefaultCPUAllocator",
    "std::bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)

log = structlog.get_logger()


class OutOfMemory(RafloraError):
    """Not even one example at a time fits, or not even the model; the message says what to change."""

    reason = "out_of_memory"


class MicroBatch:
    """How many examples are worked on at once: as many as are asked for until memory runs out, then half, and so on.

    What did not fit once is not tried again: memory that was too small in one round is too small in the next.
    """

    def __init__(self, at_most: int | None = None) -> None:
        self.at_most = at_most  # None: the whole batch

    def fit(self, work: Callable[[int], Result], *, batch_size: int, doing: str, device: str) -> tuple[Result, int]:
        """What `work(size)` gives, and the size, a divisor of `batch_size`, at which it fitted. Raises OutOfMemory.

        `doing` names the rank too, as in "training at LoRA rank 8". `work` may be begun several times and must start
        from the beginning each time.
        """
        size = largest_divisor(batch_size, at_most=self.at_most or batch_size)
        while True:
            try:
                return work(size), size
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                said = f"{type(error).__name__}: {error}".partition("\n")[0]
            # Only here: the error held the frames, and they what filled the memory.
            free_memory()
            if size == 1:
                raise OutOfMemory(_one_is_too_many(doing, device))
            smaller = largest_divisor(batch_size, at_most=size // 2)
            log.warning(
                "out of memory; again with fewer examples at once",
                doing=doing,
                micro_batch=smaller,
                before=size,
                batch_size=batch_size,
                error=said,
            )
            self.at_most = size = smaller


def loaded(load: Callable[[], Result], *, lora_rank: int, device: str) -> Result:
    """What `load` gives. Raises OutOfMemory if the model with LoRA of that rank is larger than the memory."""
    try:
        return load()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print(f"{type(error).__name__}: {error}".partition("\n")[0], file=sys.stderr)
    free_memory()
    raise OutOfMemory(
        f"the base model with LoRA of rank {lora_rank} does not fit into the memory of {device}{_memory_of(device)}; "
        'set model.quantization = "4bit" or "8bit", model.dtype = "bfloat16", or a smaller rank, '
        "or stop what else uses that memory; `raflora probe` measures what fits"
    )


def largest_divisor(number: int, *, at_most: int) -> int:
    """The largest divisor of `number` that is not above `at_most`; both at least 1."""
    return next(part for part in range(min(number, at_most), 0, -1) if number % part == 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine had no memory left: fewer examples at once or a smaller rank may help."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def free_memory() -> None:
    """Gives back what nobody holds any more; call it where no error with its frames is alive."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _one_is_too_many(doing: str, device: str) -> str:
    return (
        f"{doing}: even one example at a time does not fit into the memory of {device}{_memory_of(device)}; "
        'set a smaller rank, model.quantization = "4bit", model.gradient_checkpointing = true or '
        "a smaller data.max_length; `raflora probe` measures what fits"
    )


def _memory_of(device: str) -> str:
    torch = sys.modules.get("torch")
    if torch is None or device == "cpu" or not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info(None if device == "auto" else device)
    return f" ({free / _GIB:.1f} of {total / _GIB:.1f} GiB free)"
