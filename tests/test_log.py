"""Log: records of rank 0, warnings of other ranks."""

import io
import logging
import sys

from eve_ds.log import get_logger


def test_rank_zero_logs_everything_and_other_ranks_log_warnings_with_their_rank(monkeypatch, capsys):
    logger = get_logger()
    assert get_logger() is logger
    logger.info("from rank 0")
    logging.getLogger("eve_ds.data").info("from a module")
    monkeypatch.setenv("RANK", "3")
    logger.info("not shown")
    logger.warning("shown")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" INFO ")[2] for line in lines[:2]] == ["from rank 0", "from a module"]
    assert len(lines) == 3
    assert lines[2].startswith("[rank 3]")
    assert lines[2].endswith("WARNING shown")


def test_log_shows_information_after_another_package_reset_the_level(capsys):
    get_logger().setLevel(logging.NOTSET)
    get_logger().info("still shown")
    assert capsys.readouterr().err.endswith("INFO still shown\n")


def test_log_writes_to_the_current_standard_error(monkeypatch):
    for message in ("first", "second"):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        get_logger().info(message)
        assert stream.getvalue().endswith(f"{message}\n")
        stream.close()
