"""The answer to a handshake: what a worker must load, and what rounds will ask of it.

From settings and a digest alone, so that whoever has only the settings (`raflora probe --federation`) reads the same.
"""

import time

from raflora.v1 import federation_pb2 as pb

from common.version import PROTOCOL, software_version
from coordinator.config import CoordinatorConfig


def greeting(config: CoordinatorConfig, base_model_digest: str, protocol: int = PROTOCOL) -> pb.HandshakeResponse:
    """The whole answer; the digest is empty until the operator or the first worker has fixed it."""
    ranks = config.ranks
    return pb.HandshakeResponse(
        protocol=protocol,
        software_version=software_version(),
        federation=config.name,
        wall_time_seconds=time.time(),
        batch_size=config.training.batch_size,
        lora_dropout=config.training.lora_dropout,
        rank_levels=sorted(set(ranks.levels)),  # only the policies cycle and hardware have some
        memory_share=ranks.memory_share,
        model=pb.ModelRequest(
            base_model=config.model.base_model,
            base_model_digest=base_model_digest,
            task=config.model.task,
            labels=config.model.labels,
            target_modules=config.adapter.target_modules,
            modules_to_save=config.adapter.modules_to_save,
            global_rank=config.adapter.global_rank,
            seed=config.rounds.seed,
        ),
    )
