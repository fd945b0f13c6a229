"""One of two gloo processes: a sharded head must give the gradient that the two batches have on average.

Run by test_sharded_head.py as `python two_processes.py RANK FILE`.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from tokenpo.statistics import LinearHead, dense_token_stats, linear_token_stats

N, D, V = 6, 4, 10


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.lm_head = nn.Linear(D, D, bias=False), nn.Linear(D, V)

    def forward(self, x):
        return self.body(x)

    def get_output_embeddings(self):
        return self.lm_head


def batch(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(N, D, generator=generator), torch.randint(V, (N,), generator=generator)


def fresh():
    torch.manual_seed(0)
    return Model()


def expected():
    """Mean over both ranks of the dense gradients, computed whole."""
    model = fresh()
    for rank in range(2):
        x, tokens = batch(rank)
        logits = LinearHead.of(model).logits(model(x))[None]
        ones = torch.ones(1, N, dtype=torch.bool)
        (dense_token_stats(logits, tokens[None], ones).logps.sum() / 2).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def check(model, rank, names):
    x, tokens = batch(rank)
    linear_token_stats(model(x), LinearHead.of(model), tokens, outputs=["logps"])["logps"].sum().backward()
    wanted = expected()
    for name in names:
        grad = model.get_parameter(name).grad
        assert type(grad).__name__ == "DTensor" and grad.to_local().shape[0] < len(wanted[name]), name
        torch.testing.assert_close(grad.full_tensor(), wanted[name], msg=lambda text, name=name: f"{name}: {text}")


def main():
    rank, file = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for own_group in (False, True):
        model = fresh()
        if own_group:
            fully_shard(model.lm_head, mesh=mesh)
        check(fully_shard(model, mesh=mesh), rank, ["lm_head.weight", "lm_head.bias", "body.weight"])
    model = fresh()  # sharded, but by nothing that could gather it
    for name, parameter in list(model.lm_head.named_parameters()):
        setattr(model.lm_head, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
    check(model, rank, ["lm_head.weight", "lm_head.bias"])
    dist.destroy_process_group()


main()
