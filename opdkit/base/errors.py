"""Errors that a person can act on."""


class UserError(Exception):
    """Bad input: the message says what is wrong, why it matters and what to do.

    The command line prints it and exits with 2.
    """


def nearest(name: str, known: list[str]) -> str:
    """A hint `; did you mean 'x'?` for a misspelt name, or the known names where none is near."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"
