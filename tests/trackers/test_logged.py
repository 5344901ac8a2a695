"""What the package's loggers warn of reaches whoever watches the run, once."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from editkit.targets.search import search_target
from editkit.trackers.logged import WATCHED, warnings_shown
from editkit.trackers.none import Silent
from tests.support.helpers import request, tiny_model
from tests.support.searches import settings


@dataclass(frozen=True)
class Listening(Silent):
    heard: list[str] = field(default_factory=list)

    def warning(self, text: str) -> None:
        self.heard.append(text)


def test_a_model_that_cannot_be_gone_on_with_is_searched_the_plain_way_and_that_is_said_once(
    caplog: Any,
) -> None:
    model, plain = tiny_model("llama", dtype="float64"), tiny_model("llama", dtype="float64")
    tracker = Listening()
    found = []
    with warnings_shown(tracker):
        for index in range(3):
            for each, exact in ((model, False), (plain, True)):
                each.network.config.sliding_window = 4
                chosen = settings(steps=3, exact=exact)
                found.append(
                    search_target(
                        each,
                        request(index),
                        site=each.family.mlp(1),
                        contexts=("{}",),
                        settings=chosen,
                    )
                )
    assert (
        len(tracker.heard) == 1
        and "tiny-llama" in tracker.heard[0]
        and "sliding window" in tracker.heard[0]
    )
    assert not caplog.records
    for ours, wanted in zip(found[::2], found[1::2], strict=True):
        assert (ours.delta_O == wanted.delta_O).all() and ours.loss == wanted.loss


def test_each_run_hears_it_and_the_loggers_are_left_as_they_were(caplog: Any) -> None:
    logger, trackers = logging.getLogger(WATCHED), (Listening(), Listening())
    for tracker in trackers:
        with warnings_shown(tracker):
            logging.getLogger(f"{WATCHED}.search").warning("slow: %s", "this")
            logging.getLogger(f"{WATCHED}.search").info("nothing to show")
    assert [tracker.heard for tracker in trackers] == [["slow: this"], ["slow: this"]]
    assert not logger.handlers and logger.propagate
    logger.warning("as ever")
    assert [record.getMessage() for record in caplog.records] == ["as ever"]
