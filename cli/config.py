"""`raflora config coordinator` and `raflora config worker`: every setting of a role, as Markdown."""

from cyclopts import App

from cli.config_reference import reference

app = App(name="config", help="Prints every setting of a role: key, type, default, meaning.")


@app.command
def coordinator() -> None:
    """Prints the settings of `raflora coordinator`."""
    from coordinator.config import CoordinatorConfig  # noqa: PLC0415 - the coordinator's reference needs no worker

    print(reference(CoordinatorConfig), end="")


@app.command
def worker() -> None:
    """Prints the settings of `raflora worker`."""
    from worker.config import WorkerConfig  # noqa: PLC0415 - and the other way round

    print(reference(WorkerConfig), end="")
