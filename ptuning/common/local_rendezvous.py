"""torchrun's rendezvous for one machine: there is nobody to meet, so no port that others could reach is opened.

torchrun's own, `--standalone` included, keeps its state in a store on all network interfaces and unpickles it from
there.
"""

import os

from torch.distributed import HashStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from common.environment import before_round
from common.processes import LOOPBACK, listen_on_loopback

NAME = "ptuning-local"


class LocalRendezvous(RendezvousHandler):
    """This machine is all of them. `folder` is private; the file of main.py's processes will be in it.

    A program that knows nothing of that file, and asks torch for its process group in the usual way, finds a store
    at MASTER_ADDR and MASTER_PORT, on this machine only.
    """

    use_agent_store = True

    def __init__(self, folder, run_id):
        self.folder, self.run_id, self.round = folder, run_id, 0

    def next_rendezvous(self):
        self.round += 1  # more than one with --max-restarts
        before_round(os.path.join(self.folder, f"store-{self.round}"))
        self.store = listen_on_loopback(0)
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(LOOPBACK, self.store.port))

    def get_backend(self):
        return NAME

    def get_run_id(self):
        return self.run_id

    def is_closed(self):
        return False

    def set_closed(self):
        pass

    def num_nodes_waiting(self):
        return 0

    def shutdown(self):
        return True


def use_local_rendezvous(arguments, folder):
    """Have torchrun's parsed words take the local rendezvous, whatever they say of another."""
    rendezvous_handler_registry.register(NAME, lambda parameters: LocalRendezvous(folder, parameters.run_id))
    arguments.standalone, arguments.rdzv_backend, arguments.rdzv_endpoint, arguments.rdzv_conf = False, NAME, "", ""
