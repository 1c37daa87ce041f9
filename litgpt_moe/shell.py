"""Commands to paste, quoted for the shell of this system."""

import contextlib
import re
import shlex
import sys
from pathlib import Path


def command_line(*words: object) -> str:
    """Return the words quoted for the shell of this system, ready to paste."""
    texts = [str(word) for word in words]
    return " ".join(map(_quoted_on_windows, texts)) if sys.platform == "win32" else shlex.join(texts)


def _quoted_on_windows(word: str) -> str:
    """Return the word so that both cmd and PowerShell pass it on unchanged.

    `subprocess.list2cmdline` quotes for neither: both end a command at & and |, PowerShell also at ;.
    """
    if re.fullmatch(r"[\w./\\:=+-]+", word):
        return word
    if re.search(r"\$\w|`", word) and "'" not in word:
        return (
            f"'{word}'"  # inside double quotes PowerShell would replace $name; cmd has no way to write this
        )
    # as a program's own parser wants it: a quotation mark is escaped, and so are the backslashes before it
    escaped = re.sub(r'(\\*)("|$)', lambda match: match[1] * 2 + ('\\"' if match[2] else ""), word)
    return f'"{escaped}"'


def with_home(path: str) -> str:
    """Return a path with `~` at its beginning replaced by the home folder, which not every shell does."""
    if path.startswith("~"):
        with contextlib.suppress(RuntimeError):  # no such user: a file may have that name
            return str(Path(path).expanduser())
    return path
