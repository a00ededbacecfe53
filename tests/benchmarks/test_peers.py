"""The comparison with other servers, as far as it goes without them."""

from __future__ import annotations

from benchmarks.peers.peer import PEERS, RunningPeer
from tests.benchmarks.test_bench import needs_h2load


@needs_h2load
def test_peer_of_the_open_inference_protocol_is_called_and_its_answers_are_checked(server):
    """This server speaks it as well, so it can stand in for the peer."""
    peer = RunningPeer(PEERS["mlserver"], int(server.address.rpartition(":")[2]))
    peer.check_answers()
    assert peer.calls_per_s(images=64, in_flight=8, calls=40) > 0
