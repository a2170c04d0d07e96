"""Writes the pages of docs/ that are made from the code: python docs/generate.py [--check].

With --check nothing is written; a page that is out of date is named and the exit status is 1.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from cli.config_reference import reference
from coordinator.config import CoordinatorConfig
from simulation.experiment import ExperimentConfig
from worker.config import WorkerConfig

DOCS = Path(__file__).resolve().parent

_CONFIGURATION = """\
# Configuration

<!-- Made by `make docs` from coordinator/config.py, worker/config.py and
simulation/experiment.py; change those, not this page. -->

One TOML file a role, read once at start. A key can be overridden by an environment variable and, above that, by
`--set`. An unknown key or a value out of range ends the process with exit status 2 and a sentence that names the
source, the key and what was expected. **A relative path begins at the working directory of the process**, not at the
settings file; a sentence about a missing file names the absolute path that was tried. `raflora config coordinator` and
`raflora config worker` print the same tables.

## The coordinator: `raflora coordinator --config federation.toml`

{coordinator}
## The worker: `raflora worker --config worker.toml`

{worker}
## An experiment: `raflora simulate experiment.toml`

{experiment}"""


def pages() -> Mapping[str, str]:
    """The generated pages by file name."""
    text = _CONFIGURATION.format(
        coordinator=reference(CoordinatorConfig),
        worker=reference(WorkerConfig),
        experiment=reference(ExperimentConfig),
    )
    return {"configuration.md": text}


def main(arguments: list[str]) -> int:
    """Writes or checks the pages; the exit status."""
    stale = {
        name: text
        for name, text in pages().items()
        if not (DOCS / name).exists() or (DOCS / name).read_text(encoding="utf-8") != text
    }
    for name, text in stale.items():
        if "--check" in arguments:
            print(f"docs/{name} is out of date; `make docs` writes it", file=sys.stderr)
        else:
            (DOCS / name).write_text(text, encoding="utf-8")
            print(f"wrote docs/{name}")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
