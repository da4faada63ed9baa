"""A model of one's own, plain PyTorch with MoE layers in it, over however many processes there are.

    torchrun --nproc-per-node 4 examples/own_model.py ep=2,dp_shard=4
    torchrun --nproc-per-node 2 examples/own_model.py ep=2

The lines that make it parallel are marked with their number; everything else is what it would be on one device.
"""

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

import moe
from moe.parallel import Degrees, ParallelMesh


class Classifier(nn.Module):
    """Residual MoE layers between two linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(20, 32)
        self.layers = nn.ModuleList(moe.MoE(32, 64, num_experts=8, top_k=2) for _ in range(2))
        self.write = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 20)`` to logits ``(B, 2)``."""
        x = self.read(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.write(x)


def main(degrees: str) -> None:
    """Learn whether the sum of twenty numbers is positive."""
    dist.init_process_group("gloo")  # 1; "nccl" for GPUs, with the model on the GPU of LOCAL_RANK
    mesh = ParallelMesh(Degrees.parse(degrees, dist.get_world_size()))  # 2
    torch.manual_seed(0)  # the same model everywhere
    model = Classifier()
    parallel = moe.parallelize(model, mesh)  # 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # after parallelize
    random = torch.Generator().manual_seed(1 + mesh.data_rank)  # 4: other data on each data rank
    for step in range(1, 31):
        x = torch.randn(64, 20, generator=random)
        loss = nn.functional.cross_entropy(model(x), (x.sum(1) > 0).long())
        (loss + moe.balance_loss(model)).backward()
        parallel.clip_grad_norm_(1.0)  # 5: instead of torch.nn.utils.clip_grad_norm_
        optimizer.step()
        optimizer.zero_grad()
        moe.balance_step(model)
        dist.all_reduce(loss.detach_())  # 6: to print the mean, which no rank needs to train
        if dist.get_rank() == 0 and step % 10 == 0:
            print(f"step {step}: loss {loss.item() / dist.get_world_size():.3f}")
    dist.destroy_process_group()  # 7


if __name__ == "__main__":
    main(*sys.argv[1:])
