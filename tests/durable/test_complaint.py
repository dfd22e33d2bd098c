"""What is wrong for a while is logged once."""

from __future__ import annotations

import logging

import pytest

from mesh.durable.complaint import Complaint

logger = logging.getLogger("mesh.durable.test")


def test_it_is_logged_again_once_it_is_another_or_has_ended(
    caplog: pytest.LogCaptureFixture,
) -> None:
    complaint = Complaint(logger, logging.ERROR)
    for disk in ("full", "full", "gone", "full"):
        complaint.say("the disk is %s", disk)
    complaint.ended()
    complaint.say("the disk is %s", "full")
    assert [record.getMessage() for record in caplog.records] == [
        f"the disk is {disk}" for disk in ("full", "gone", "full", "full")
    ]
    assert {(record.levelno, record.module) for record in caplog.records} == {
        (logging.ERROR, "test_complaint")
    }


def test_what_differs_in_a_detail_is_no_other_if_its_reason_is_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    complaint = Complaint(logger)
    for offset in (1, 2):
        complaint.say("record %d was lost", offset, reason="full")
    complaint.say("record %d was lost", 3, reason="gone")
    assert [record.getMessage() for record in caplog.records] == [
        "record 1 was lost",
        "record 3 was lost",
    ]


def test_what_has_no_text_is_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    complaint = Complaint(logger)
    for _ in range(2):
        complaint.say("%s", OSError())
    assert [record.getMessage() for record in caplog.records] == [""]
