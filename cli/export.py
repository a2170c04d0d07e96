"""`raflora export`: the published adapter as a stock PEFT folder, at any rank up to the global one. Needs no torch."""

from pathlib import Path

from cyclopts.types import UInt32
from raflora.v1 import status_pb2

from cli.connection import Connection
from cli.download import fetch_adapter, read_adapter
from cli.errors import Failed
from cli.words import human_bytes, plain
from common.errors import AdapterMismatch, ConfigError
from worker.peft_format import write_peft_folder

_AUTO_CLASSES = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}


async def export(
    folder: Path,
    /,
    *,
    rank: UInt32 = 0,
    overwrite: bool = False,
    connection: Connection = Connection(),
) -> None:
    """Writes the published adapter into FOLDER, so that `PeftModel.from_pretrained(base, FOLDER)` loads it.

    --rank cuts it to so many directions (0: all of them). --overwrite writes into a folder that holds files.
    A download that breaks off goes on where it was when the command is run again.
    """
    folder = _free_folder(folder, overwrite=overwrite)
    download = await fetch_adapter(connection, rank, beside=folder)
    header = download.header
    try:
        adapter = read_adapter(download)
        write_peft_folder(
            folder,
            adapter,
            scaling=header.scaling,
            base_model=header.base_model,
            task=header.task,
            modules_to_save=list(header.modules_to_save),
        )
    except AdapterMismatch as error:
        raise Failed(str(error)) from None
    finally:
        download.path.unlink(missing_ok=True)
    print(f"{folder}: round {header.round}, rank {adapter.rank}, {human_bytes(header.size_bytes)}")
    print(f"trained on {plain(header.base_model)}, weights sha256 {plain(header.base_model_digest)}")
    for line in loading_lines(header, folder):
        print(f"  {line}")


def loading_lines(header: status_pb2.AdapterHeader, folder: Path) -> list[str]:
    """The Python lines that load the folder with stock transformers and PEFT."""
    auto_class = _AUTO_CLASSES.get(header.task)
    if auto_class is None:
        return []
    # A head that was trained has the federation's classes; a frozen one has the checkpoint's own.
    labels = f", num_labels={len(header.labels)}" if header.modules_to_save and header.labels else ""
    base = plain(header.base_model)
    return [
        f"base = {auto_class}.from_pretrained({base!r}{labels})",
        f"model = PeftModel.from_pretrained(base, {str(folder)!r})",
        f"labels = {[plain(label) for label in header.labels]!r}",
    ]


def _free_folder(folder: Path, *, overwrite: bool) -> Path:
    """The folder's absolute path. Raises ConfigError if something of somebody else is there."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; name a folder")
    if folder.is_dir() and not overwrite and any(folder.iterdir()):
        raise ConfigError(f"{folder}: holds files already; name another folder or pass --overwrite")
    return folder.absolute()
