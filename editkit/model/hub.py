"""What is asked of the Hugging Face hub, without its own words, and without its waits where it
cannot be there.

huggingface_hub tries again five times, 23 seconds in all, also where the machine has no network,
and has no setting for it; nothing is changed about that while the hub might answer.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator

TALKERS = ("huggingface_hub.utils._http",)
TOLD_ANYWAY = (
    "thrown while requesting",
    "Retrying in",
)  # in the error that follows, or of no interest once it went well


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Inside, failed requests and new attempts are not logged; whatever else the hub has to say, as
    that it limits a rate, is.
    """
    loggers = [logging.getLogger(name) for name in TALKERS]
    for logger in loggers:
        logger.addFilter(_is_news)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_news)


def is_out_of_reach() -> bool:
    """Whether the hub's name is known to have no address here: no attempt can succeed. A name
    server that does not answer says nothing.
    """
    from huggingface_hub.constants import ENDPOINT

    if urllib.request.getproxies():  # the proxy looks it up
        return False
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(ENDPOINT).hostname, 443)
    except socket.gaierror as error:
        return error.errno == socket.EAI_NONAME
    except OSError:
        return False
    return False


def _is_news(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in TOLD_ANYWAY)
