"""Text that somebody else wrote, made fit for one line of a log, a terminal or a gRPC status. Never an error."""


def plain(text: str, max_chars: int) -> str:
    """The text without what a terminal would obey (escapes, line ends, marks that turn the direction), and cut."""
    cut = text[: max_chars + 1]
    clean = "".join(char if char.isprintable() else " " if char in "\t\r\n" else "?" for char in cut)
    return clean if len(clean) <= max_chars else clean[: max_chars - 3] + "..."
