"""What vLLM takes of an adapter, and the commands that serve it there. Starts nothing and knows nothing of vLLM's code.

The rules are those read in vLLM's source: `max_lora_rank` of its LoRAConfig, and what its loader of PEFT folders
refuses.
"""

import json
import re
from dataclasses import dataclass
from shlex import quote

import numpy as np

from cli.errors import Failed
from cli.export_origin import Origin
from common.adapter import Adapter, Factors
from common.errors import ConfigError

ACCEPTED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank; newer versions know 1 as well
_TASK = "causal-lm"
# Layers of Llama, Qwen, Mistral, Gemma, Phi and their like, by the last part of their names.
_USUAL_LAYERS = frozenset(
    {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj"}
)
_NOT_OF_A_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_PROMPT = "Once upon a time"
_SHOWN = 3  # names in a warning


def pad_adapter(adapter: Adapter, rank: int) -> Adapter:
    """The same update at a larger rank: rows of zeros under lora_A, columns of zeros beside lora_B.

    Its scaling must stay what it was. Raises ConfigError if the adapter has more directions.
    """
    more = rank - adapter.rank
    if more < 0:
        raise ConfigError(f"--pad-to {rank}: the adapter has rank {adapter.rank}; cut it with --rank {rank} instead")
    modules = {
        name: Factors(np.pad(factors.lora_A, ((0, more), (0, 0))), np.pad(factors.lora_B, ((0, 0), (0, more))))
        for name, factors in adapter.modules.items()
    }
    return Adapter(modules, adapter.tensors)


def accepted_rank(rank: int) -> int:
    """The smallest rank of vLLM's that holds this one. Raises Failed if it is too large for vLLM."""
    for accepted in ACCEPTED_RANKS:
        if rank <= accepted:
            return accepted
    raise Failed(
        f"rank {rank}: vLLM takes at most {ACCEPTED_RANKS[-1]}; cut it with --rank {ACCEPTED_RANKS[-1]} or use --merged"
    )


def check_served(origin: Origin) -> None:
    """Raises Failed, with the reason, if vLLM would refuse an adapter of this federation."""
    if origin.task != _TASK:
        raise Failed(
            f"--for vllm: the federation's task is {origin.task!r}, and only the adapters of language models "
            f"({_TASK!r}) are served so; leave it out and load the folder with PEFT, or use --merged"
        )
    if origin.modules_to_save:
        raise Failed(
            f"--for vllm: the federation trained {list(origin.modules_to_save)} whole, and vLLM takes no adapter with "
            "modules_to_save; export with --merged --model BASE and serve the merged model"
        )


def unusual_layers(origin: Origin) -> list[str]:
    """The adapted layers, by the last part of their names, that vLLM may not take, depending on the model."""
    return sorted({name.rpartition(".")[2] for name in origin.modules} - _USUAL_LAYERS)


def warnings_for(origin: Origin) -> list[str]:
    """What may go wrong when vLLM loads the folder."""
    unusual = unusual_layers(origin)
    if not unusual:
        return []
    return [
        f"warning: the layers {', '.join(unusual[:_SHOWN])} are adapted, which vLLM does not take for every model; "
        "it names those it takes when it starts. If these are not among them, use --merged"
    ]


@dataclass(frozen=True)
class Server:
    """What vLLM must know besides the adapter."""

    base_model: str  # a folder or a hub id
    rank: int  # of the adapter's tensors
    answer_ends: tuple[int, ...] = ()  # tokens; of a merged model vLLM reads them itself


def serve_lines(name: str, folder: str, server: Server) -> list[str]:
    """The command that serves base model and adapter, and a request to it."""
    model = served_name(name)
    # Without them vLLM goes by the base model's own settings, which know nothing of how this adapter ends an answer.
    stops = {"stop_token_ids": list(server.answer_ends)} if server.answer_ends else {}
    request = json.dumps({"model": model, "prompt": _PROMPT, "max_tokens": 32, **stops})
    return [
        f"vllm serve {quote(server.base_model)} --enable-lora --max-lora-rank {server.rank} "
        f"--lora-modules {quote(f'{model}={folder}')}",
        f"curl http://localhost:8000/v1/completions -H 'Content-Type: application/json' -d {quote(request)}",
    ]


def serve_merged_lines(folder: str) -> list[str]:
    """The command that serves a merged language model."""
    return [f"vllm serve {quote(folder)}"]


def served_name(name: str) -> str:
    """A name that needs no quoting anywhere: letters, digits, dots, dashes."""
    return _NOT_OF_A_NAME.sub("-", name).strip("-.") or "adapter"
