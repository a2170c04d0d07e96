"""What the demonstration runs: five unequal sites, their data and the settings files of every process.

Everything is written below one folder, so that a reader can look at it, and start the same processes by hand.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from cli.local_federation import Files
from common.errors import ConfigError
from simulation import digits

MARKER = "made-by-raflora-demo"  # only a folder that holds this file is ever cleared
MIXTURE = 1.0  # Dirichlet's alpha: each site sees some digits often and others hardly ever


@dataclass(frozen=True)
class Site:
    """One worker: what it is called and the largest rank that it can train."""

    name: str
    rank: int


FIVE_SITES = (Site("site-a", 2), Site("site-b", 4), Site("site-c", 8), Site("site-d", 16), Site("site-e", 32))


@dataclass(frozen=True)
class Setting:
    """One demonstration."""

    folder: Path
    rounds: int
    seed: int
    sites: tuple[Site, ...] = FIVE_SITES

    @property
    def global_rank(self) -> int:
        """Of the global adapter: the largest rank that anybody trains."""
        return max(site.rank for site in self.sites)

    @property
    def base_model(self) -> Path:
        """The frozen model's folder."""
        return self.folder / "base-model"

    @property
    def test_data(self) -> Path:
        """What every worker evaluates on."""
        return self.folder / "data" / "test.jsonl"

    @property
    def adapter(self) -> Path:
        """Where the trained adapter goes."""
        return self.folder / "adapter"

    @property
    def results(self) -> Path:
        """Where what was measured goes."""
        return self.folder / "results.json"

    def train_data(self, site: Site) -> Path:
        """What one worker alone sees."""
        return self.folder / "data" / f"{site.name}.jsonl"


def prepare(setting: Setting) -> None:
    """Makes the folder, or clears one that an earlier demonstration made; writes base model and data.

    Raises ConfigError if the folder holds something else, or if scikit-learn, whose digits these are, is missing.
    """
    folder = setting.folder
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder}: is a file, a folder is expected")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise ConfigError(f"--out {folder}: holds files of something else; name a new folder")
        shutil.rmtree(folder)
    try:
        parts = digits.sites_for([site.name for site in setting.sites], alpha=MIXTURE, seed=setting.seed)
        test = digits.digits_task().test
    except ModuleNotFoundError as error:
        raise ConfigError(f"raflora demo needs {error.name}: pip install 'raflora[demo]'") from None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    shutil.copytree(digits.BASE_FOLDER, setting.base_model)
    for site in setting.sites:
        digits.write_jsonl(parts[site.name], setting.train_data(site))
    digits.write_jsonl(test, setting.test_data)


def write_settings(setting: Setting, method: str) -> Files:
    """The settings files of one federation; two methods' files differ in the method alone."""
    folder = setting.folder.absolute() / method
    folder.mkdir()
    coordinator = folder / "coordinator.toml"
    coordinator.write_text(_coordinator_settings(setting, method, folder), encoding="utf-8")
    workers = {site.name: folder / f"{site.name}.toml" for site in setting.sites}
    for site in setting.sites:
        workers[site.name].write_text(_worker_settings(setting, site, folder), encoding="utf-8")
    return Files(folder, coordinator, workers)


def forget_state(files: Files) -> None:
    """Deletes journals, blobs and part files; settings and logs stay."""
    for state in files.folder.glob("*-state"):
        shutil.rmtree(state)


def _coordinator_settings(setting: Setting, method: str, folder: Path) -> str:
    return f"""\
# The coordinator: opens rounds, hands out rank slices, merges what comes back.
name = {_quoted(f"demo-{method}")}
state_dir = {_quoted(folder / "coordinator-state")}
log_format = "json" # the demonstration finds the port in it

[server]
listen = "127.0.0.1:0" # any free port

[model]
base_model = "digits-vit"
task = "image-classification"
labels = {json.dumps(digits.LABELS)}

[adapter]
target_modules = ["all-linear"]
global_rank = {setting.global_rank}

[rounds]
num_rounds = {setting.rounds}
min_clients = {len(setting.sites)}
round_deadline_seconds = 300
lease_ttl_seconds = 30
seed = {setting.seed}

[aggregation]
method = {_quoted(method)}

[training]
learning_rate = 4e-3
final_fraction = 0.2
local_steps = 15
batch_size = 32
"""


def _worker_settings(setting: Setting, site: Site, folder: Path) -> str:
    return f"""\
# The worker of one site: trains its own data at its own rank.
name = {_quoted(site.name)}
rank = {site.rank}
state_dir = {_quoted(folder / f"{site.name}-state")}
threads = 1 # {len(setting.sites)} of them share this machine

# The coordinator's address is given on the command line: its port is known only once it listens.

[model]
path = {_quoted(setting.base_model.absolute())}
device = "cpu"
offline = true

[data]
train = {_quoted(setting.train_data(site).absolute())}
test = {_quoted(setting.test_data.absolute())}
"""


def _quoted(text: str | Path) -> str:
    """A TOML string; JSON's escapes are TOML's."""
    return json.dumps(str(text), ensure_ascii=False)
