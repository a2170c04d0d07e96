"""`raflora digits`: the built-in example as files, for workers that are to run like real ones."""

import shutil
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import PositiveInt

from common.errors import ConfigError


def digits(
    folder: Path,
    /,
    *,
    sample_for: Annotated[
        str | None, Parameter(help="One worker's data, from its name alone (containers that are scaled).")
    ] = None,
    clients: Annotated[PositiveInt | None, Parameter(help="All the data, divided among so many workers.")] = None,
) -> None:
    """Writes handwritten digits, turned sideways and unequally divided, and the base model that learned upright ones.

    FOLDER gets base-model/, test.jsonl and train.jsonl; with --clients a folder worker-1/, worker-2/ ... for each
    train.jsonl. Needs scikit-learn (the extra `demo`); nothing is downloaded.
    """
    if (sample_for is None) == (clients is None):
        raise ConfigError("raflora digits: give --sample-for NAME or --clients N, one of the two")
    try:
        from simulation import digits as example  # noqa: PLC0415 - needs an extra

        task = example.digits_task()
    except ModuleNotFoundError as error:
        raise ConfigError(f"raflora digits needs {error.name}: pip install 'raflora[demo]'") from None
    if sample_for is not None:
        parts = {folder / "train.jsonl": example.sample_for(sample_for)}
    else:
        names = [f"worker-{number}" for number in range(1, (clients or 0) + 1)]
        parts = {folder / name / "train.jsonl": part for name, part in example.sites_for(names).items()}
    shutil.copytree(example.BASE_FOLDER, folder / "base-model", dirs_exist_ok=True)
    print(f"base model  {folder / 'base-model'}")
    for path, part in {**parts, folder / "test.jsonl": task.test}.items():
        example.write_jsonl(part, path)
        print(f"{len(part.labels):4} digits  {path}")
