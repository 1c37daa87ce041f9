"""Errors of reading, which are no sign of damage: a network disk may fail for a moment."""

import errno
import functools
import re
import time
from collections.abc import Callable


class ReadFailed(OSError):
    """A file could not be read, which is no sign of damage; the text is a sentence."""

    def __str__(self) -> str:
        return self.strerror or ""


def is_read_error(error: BaseException) -> bool:
    """Return whether reading failed (a disk error, no memory, no access): no sign of damage."""
    # EINVAL: a damaged archive points to before its begin
    content = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG, None)
    # torch's own words on Linux, and on Windows, where a page file too small for the mapping ends so
    words = r"Cannot allocate memory|could not (open|create a map on) file <.*error code: <"
    mapping_failed = isinstance(error, RuntimeError) and re.search(words, str(error)) is not None
    return mapping_failed or (isinstance(error, OSError) and error.errno not in content)


def patient[**Arguments, Result](read: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Return `read`, which is called again after a read error: that of a network disk may pass."""

    @functools.wraps(read)
    def again(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        failure = OSError()
        for pause_s in (0.1, 0.5, 0):
            try:
                return read(*args, **options)
            except ReadFailed:
                raise
            except OSError as error:
                if not is_read_error(error):
                    raise
                failure = error
            time.sleep(pause_s)
        reason = "it could not be read, which is no sign of damage; try again, or use another checkpoint"
        text = f"{failure.filename or args[0]}: {failure.strerror}: {reason}"
        raise ReadFailed(failure.errno, text) from failure

    return again
