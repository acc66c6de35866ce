"""torchrun's rendezvous for one machine: there is nobody to meet, so no port that others could reach is opened.

torchrun's own, `--standalone` included, keeps its state in a store on all network interfaces and unpickles it from
there.
"""

import os

from torch.distributed import HashStore
from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousStoreInfo, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from common.environment import before_round
from common.processes import LOOPBACK, listen_on_loopback

NAME = "ptuning-local"


class LocalRendezvous(StaticTCPRendezvous):
    """This machine is all of them. `folder` is private; the file of main.py's processes will be in it.

    A program that knows nothing of that file, and asks torch for its process group in the usual way, finds a store
    at MASTER_ADDR and MASTER_PORT, on this machine only.
    """

    def __init__(self, folder, run_id):
        super().__init__(LOOPBACK, 0, rank=0, world_size=1, run_id=run_id, timeout=0)
        self.folder, self.round = folder, 0

    def next_rendezvous(self):
        self.round += 1  # more than one with --max-restarts
        before_round(os.path.join(self.folder, f"store-{self.round}"))
        self.store = listen_on_loopback(0)
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(LOOPBACK, self.store.port))

    def get_backend(self):
        return NAME


def use_local_rendezvous(arguments, folder):
    """Have torchrun's parsed words take the local rendezvous, whatever they say of another."""
    rendezvous_handler_registry.register(NAME, lambda parameters: LocalRendezvous(folder, parameters.run_id))
    arguments.standalone, arguments.rdzv_backend, arguments.rdzv_endpoint, arguments.rdzv_conf = False, NAME, "", ""
