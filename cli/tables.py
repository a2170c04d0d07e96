"""How tables look on the screens of this command: open, without a frame. Knows nothing of what stands in them."""

from rich.table import Table

GAP = 2  # columns of the terminal between two of a table


def open_table(*, shows_header: bool = True, below: int = 0) -> Table:
    """An empty table with a dim heading and no lines; `below` is the number of blank lines after each row."""
    padding = (0, GAP, below, 0)
    return Table(box=None, pad_edge=False, header_style="dim", show_header=shows_header, padding=padding)
