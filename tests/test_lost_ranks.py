"""Errors about another rank, in one line."""

import os
import re
import subprocess
import sys

import pytest
import torch.distributed as dist

from eve_ds.lost_ranks import RankLostError, rank_losses

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            RuntimeError(f"{GLOO}/unbound_buffer.cc:78] Timed out waiting 600000ms for recv operation to complete"),
            "another rank did not answer within 600 s (train.timeout_seconds; waited in",
        ),
        (dist.DistStoreError("Timed out after 4 seconds waiting for clients. 1/2 clients joined."), "within 4 s"),
        (
            dist.DistNetworkError("The client socket has timed out after 3000ms while trying to connect to (a, 1)."),
            "within 3 s",
        ),
        (dist.DistStoreError("wait timeout after 300000ms, keys: /default_pg/0//cpu//0/1"), "within 300 s"),
        (RuntimeError(f"{GLOO}/pair.cc:537] Read error [::1]:1: Connection reset by peer."), "another rank has ended"),
        (RuntimeError(f"{GLOO}/pair.cc:547] Connection closed by peer [127.0.0.1]:1"), "another rank has ended"),
        (RuntimeError("Application timeout caused pair closure"), "another rank has ended"),
    ],
)
def test_errors_about_another_rank_become_one_line(error, text):
    with pytest.raises(RankLostError) as caught, rank_losses("train.timeout_seconds"):
        raise error
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes"), RuntimeError("Timed out after 5 seconds"), ValueError("gloo")]
)
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, rank_losses():
        raise error
    assert caught.value is error


def test_a_rank_whose_peers_never_start_names_the_setting_and_the_place(free_port):
    code = (
        "from datetime import timedelta; from eve_ds.lost_ranks import *; from eve_ds.process_group import *\n"
        "with rank_losses('x.timeout'): initialize_process_group('gloo', timedelta(seconds=1))"
    )
    world = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | world, capture_output=True, text=True, check=False
    )
    assert re.search(r"RankLostError: another rank did not answer within \d s \(x\.timeout; waited in ", done.stderr)
