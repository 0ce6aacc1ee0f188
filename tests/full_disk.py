"""A disk that takes no more, for as long as a block lasts."""

import contextlib
import resource

MESSAGE = "cannot be written: .*(File too large|No space left)"


@contextlib.contextmanager
def full_disk(most: int = 1000):
    """Lets no file grow beyond `most` bytes.

    Writes then fail as on a full disk, with another number of the error. Unlike a small file
    system it needs no rights.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
