"""The policy that holds for a worker: what its settings say and what the site's own policy file says, the stricter.

The file is read once, at start; nothing overrides it, neither the environment nor the command line.
"""

import hashlib
import os
from pathlib import Path

import structlog

from common.errors import ConfigError
from common.settings import load_settings
from worker.config import SitePolicy, WorkerConfig
from worker.policy import stricter

log = structlog.get_logger()


def with_policy_file(config: WorkerConfig) -> WorkerConfig:
    """The settings with the policy that holds. Raises ConfigError if the file or these settings cannot be used."""
    policy = config.policy if config.policy_file is None else stricter(config.policy, _read(config.policy_file))
    _check_settings(config, policy)
    return config.model_copy(update={"policy": policy})


def _read(path: Path) -> SitePolicy:
    policy = load_settings(SitePolicy, path, environ={})
    log.info(
        "policy file",
        path=str(path),
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        writable_by_this_worker=os.access(path, os.W_OK),
    )
    return policy


def _check_settings(config: WorkerConfig, policy: SitePolicy) -> None:
    if config.rank > policy.max_rank:
        raise ConfigError(f"site policy: rank = {config.rank}, but max_rank is {policy.max_rank}; lower rank")
    if policy.require_offline and not config.model.offline:
        raise ConfigError("site policy: require_offline is set; set model.offline = true and name local folders")
