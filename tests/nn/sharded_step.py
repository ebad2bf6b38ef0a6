"""Three training steps of a small converted model, on one process or sharded over several.

`python sharded_step.py RANK WORLD MEETING OUT` runs one of WORLD ranks; rank 0 writes the
final state and the logits to OUT. The test runs it twice and compares with `single_process()`.
"""

import sys

import torch
from torch import Tensor, nn

from attending.nn import sigma_reparam

STEPS = 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.down(torch.relu(self.up(x)))


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), Block(), Block(), nn.Linear(8, 3))
    return sigma_reparam.convert(model, gamma_init="one")


def make_batch(step: int) -> Tensor:
    return torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, rank: int = 0, world: int = 1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(make_batch(step).chunk(world)[rank]).square().mean().backward()
        optimizer.step()


def single_process() -> dict[str, Tensor]:
    model = make_model()
    train(model)
    with torch.no_grad():
        logits = model.eval()(make_batch(99))
    return {**model.state_dict(), "logits": logits}


def sharded(rank: int, world: int, meeting: str, out: str) -> None:
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    model = make_model()
    for block in model[1:3]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, rank, world)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    with torch.no_grad():
        logits = model.eval()(make_batch(99))
    if rank == 0:
        torch.save({**state, "logits": logits}, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    sharded(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
