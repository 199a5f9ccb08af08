import random
import threading
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from megabyte_jax import peers


class Store:
    """The calls of the coordinator's store that a promise to stop needs."""

    def __init__(self):
        self.values = {}
        self.lock = threading.Lock()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.lock:
            assert allow_overwrite or key not in self.values
            self.values[key] = value

    def key_value_dir_get(self, directory):
        with self.lock:
            return [(k, v) for k, v in self.values.items() if k.startswith(directory)]


def stops(wishes, seed):
    """At which update each process stops, that waits in each for all others as devices do."""
    store, hosts, collective = Store(), ["h"] * len(wishes), threading.Barrier(len(wishes))
    stopped: list[int | None] = [None] * len(wishes)

    def train(process):
        draw = random.Random(f"{seed} {process}")
        peer = peers.Peers(store, "", process, hosts, 0)
        thread = threading.Thread(target=peer._exchange)
        thread.start()
        for update in range(60):
            time.sleep(draw.random() * 1e-3)
            if peer.stop_together(update >= wishes[process]):
                stopped[process] = update
                break
            collective.wait(10)
        peer._over = True
        thread.join()

    threads = [threading.Thread(target=train, args=(i,)) for i in range(len(wishes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return stopped


@settings(max_examples=30, deadline=None)
@given(
    wishes=st.lists(st.integers(0, 40) | st.just(1000), min_size=2, max_size=5),
    seed=st.integers(0, 99),
)
def test_all_stop_at_the_same_update_after_the_first_wish(wishes, seed):
    tick, peers.TICK = peers.TICK, 0.01
    try:
        stopped = stops(wishes, seed)
    finally:
        peers.TICK = tick
    assert len(set(stopped)) == 1, stopped
    if min(wishes) < 1000:
        assert stopped[0] is not None and 0 <= stopped[0] - min(wishes) <= 1
    else:
        assert stopped[0] is None
