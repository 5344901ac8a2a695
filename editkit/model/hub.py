"""Requests to the Hugging Face hub without its retry messages, and without waiting for an
unreachable hub.

huggingface_hub retries five times, 23 seconds in total, even on a machine without a network, and
has no option to change that. Its retries stay unchanged if the hub might answer.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator

LOGGERS = ("huggingface_hub.utils._http",)
REPORTS = "transformers.modeling_utils"  # the logger of tables of missing and other weights
# Retry messages. The final error repeats them, and after a success they are irrelevant.
RETRY_PHRASES = ("thrown while requesting", "Retrying in")


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Suppresses log messages about failed requests and retries. All other messages of the hub
    remain, such as those about rate limits.
    """
    loggers = [logging.getLogger(name) for name in LOGGERS]
    for logger in loggers:
        logger.addFilter(_is_relevant)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_relevant)


@contextlib.contextmanager
def without_reports() -> Iterator[None]:
    """Suppresses the tables of weights that are missing or have other shapes, which end in one
    message of editkit. A table of weights that are not used remains.
    """

    def is_kept(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "LOAD REPORT" not in text or not ("MISSING" in text or "MISMATCH" in text)

    logger = logging.getLogger(REPORTS)
    logger.addFilter(is_kept)
    try:
        yield
    finally:
        logger.removeFilter(is_kept)


def is_unreachable() -> bool:
    """Whether the hub's host name certainly has no address here, so that every request would fail.

    A name server that does not answer proves nothing; then the result is false.
    """
    from huggingface_hub.constants import ENDPOINT

    if urllib.request.getproxies():  # the proxy resolves the name
        return False
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(ENDPOINT).hostname, 443)
    except socket.gaierror as error:
        return error.errno == socket.EAI_NONAME
    except OSError:
        return False
    return False


def _is_relevant(record: logging.LogRecord) -> bool:
    return not any(phrase in record.getMessage() for phrase in RETRY_PHRASES)
