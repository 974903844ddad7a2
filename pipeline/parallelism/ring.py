"""Lightning's strategy for Horovod, which Lightning itself has none for any more.

Weights at the start and gradients go through Horovod. What is left, a few bytes a step, goes through torch's own
process group, which is there already: metrics, counts, statistics of batch norms. Over that group the ranks tell each
other, too, where Horovod's meeting point is, so that no launcher of its own is needed.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import horovod.torch as hvd
from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
from horovod.runner.http.http_server import RendezvousServer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

COMPRESSION = {"none": hvd.Compression.none, "float16": hvd.Compression.fp16}


class HorovodStrategy(DDPStrategy):
    """Data parallelism without torch's wrapper: a gradient is sent as soon as the backward pass has summed it.

    `compression`: a key of `COMPRESSION`. While micro batches are accumulated nothing is sent.
    """

    def __init__(self, compression: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.compression = COMPRESSION[compression]
        self._sends = True
        self._sent: list[tuple[nn.Parameter, int, Any]] = []
        self._hooks: list[Any] = []

    def setup_distributed(self) -> None:
        super().setup_distributed()
        server, where = None, ("", 0)
        if self.global_rank == 0:
            server = RendezvousServer()
            port = server.start()
            hosts = ",".join(f"{node}:{self.num_processes}" for node in range(self.num_nodes))
            server.init(get_host_assignments(parse_hosts(hosts), self.world_size))
            where = (os.environ["MASTER_ADDR"], port)
        host, port = self.broadcast(where)
        os.environ.update(self._variables(host, port))
        hvd.init()
        self.barrier()  # until all have met
        if server is not None:
            server.stop()

    def _variables(self, host: str, port: int) -> dict[str, str]:
        """What `horovodrun` would set: this rank's place, and where all meet."""
        variables = {
            "HOROVOD_HOSTNAME": str(self.node_rank),
            "HOROVOD_RANK": str(self.global_rank), "HOROVOD_SIZE": str(self.world_size),
            "HOROVOD_LOCAL_RANK": str(self.local_rank), "HOROVOD_LOCAL_SIZE": str(self.num_processes),
            "HOROVOD_CROSS_RANK": str(self.node_rank), "HOROVOD_CROSS_SIZE": str(self.num_nodes),
            "HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo",
            "HOROVOD_GLOO_RENDEZVOUS_ADDR": socket.gethostbyname(host), "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        }  # fmt: skip
        if self.num_nodes == 1:
            interfaces = [name for _, name in socket.if_nameindex()]
            variables["HOROVOD_GLOO_IFACE"] = next(name for name in ("lo", "lo0") if name in interfaces)
        return variables

    def configure_ddp(self) -> None:
        assert self.model is not None
        trained = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        hvd.broadcast_parameters(trained, root_rank=0)
        for name, weight in trained:
            hook = weight.register_post_accumulate_grad_hook(partial(self._send, name))  # type: ignore[no-untyped-call]
            self._hooks.append(hook)

    def _send(self, name: str, parameter: nn.Parameter) -> None:
        if self._sends:
            assert parameter.grad is not None
            small, context = self.compression.compress(parameter.grad)
            self._sent.append((parameter, hvd.allreduce_async_(small, name=name, op=hvd.Average), context))

    def post_backward(self, closure_loss: Tensor) -> None:
        for parameter, handle, context in self._sent:
            parameter.grad = self.compression.decompress(hvd.synchronize(handle), context)
        self._sent.clear()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        self._sends = False
        try:
            yield
        finally:
            self._sends = True

    def teardown(self) -> None:
        for hook in self._hooks:
            hook.remove()
        hvd.shutdown()
        super().teardown()
