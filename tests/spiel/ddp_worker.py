"""One rank of test_distributed: trains a small Llama and writes its deltas. Run by torchrun."""

import sys
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import spiel

STEPS, SIZE = 12, 8


def deltas_after_training(growth, rank, world_size):
    """The deltas after `STEPS` steps on this rank's share of every batch."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.1,
    )
    base = LlamaForCausalLM(config)
    torch.manual_seed(rank)  # ranks draw different supports, and must agree all the same
    adapter = spiel.SpielConfig(
        growth=growth,
        num_tunable_weights=1000,
        reselection_steps=5,
        selection_accumulation_steps=3,
    )
    model = peft.get_peft_model(base, adapter).train()
    forward = model
    if world_size > 1:
        forward = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = {"ag": spiel.SpielAdamW, "ma": spiel.SpielSM3}[growth](model, lr=0.01)
    reselector = spiel.Reselector(forward, optimizer, STEPS)
    batches = torch.randint(40, (STEPS, SIZE, 8), generator=torch.Generator().manual_seed(1))
    for batch in batches:
        input_ids = batch.chunk(world_size)[rank]
        forward(input_ids=input_ids, labels=input_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        reselector.step()
    return spiel.get_deltas(model)


class Experts(nn.Module):
    """Two layers and an expert, between or after them, that only some batches are sent to."""

    def __init__(self, comes_last):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(12, 12) for _ in range(3))
        self.expert = "third" if comes_last else "second"

    def forward(self, x, use_expert):
        for name in ("first", "second", "third"):
            if name != self.expert or use_expert:
                x = torch.tanh(getattr(self, name)(x))
        return x


def deltas_of_experts(use, rank, comes_last=False):
    """The deltas after as many steps as `use` has, the expert being used where it says so.

    Each module is in a bucket of its own. One that comes last is first in backward: ranks that do
    not use it have its bucket reduced before others do.
    """
    torch.manual_seed(0)
    config = spiel.SpielConfig(
        num_tunable_weights=90, reselection_steps=5, selection_accumulation_steps=3
    )
    model = peft.get_peft_model(Experts(comes_last), config)
    parallel = torch.nn.parallel.DistributedDataParallel(
        model, find_unused_parameters=True, bucket_cap_mb=1e-4
    )
    optimizer = spiel.SpielAdamW(model, lr=0.01)
    reselector = spiel.Reselector(parallel, optimizer, 14)
    torch.manual_seed(rank)
    for use_expert in use:
        parallel(torch.randn(5, 12), use_expert).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        reselector.step()
    return spiel.get_deltas(model)


def refusal_of_shards(shard):
    """What a Reselector says of a model that `shard` has spread over the ranks."""
    config = spiel.SpielConfig(num_tunable_weights=90)
    model = shard(peft.get_peft_model(Experts(False), config))
    try:
        spiel.Reselector(model, spiel.SpielAdamW(model), 100)
    except ValueError as error:
        return str(error)


def fully_sharded(model):
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def wrapped(model):
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def main():
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    deltas = {
        growth: deltas_after_training(growth, rank, dist.get_world_size())
        for growth in ("ag", "ma")
    }
    in_turn = [(step + rank) % 2 == 0 for step in range(STEPS)]
    for case, use in {"never at once": in_turn, "at once": [True, *in_turn]}.items():
        deltas[case] = deltas_of_experts(use, rank)
        deltas[f"{case}, last"] = deltas_of_experts(use, rank, comes_last=True)
    deltas["refusals"] = [refusal_of_shards(shard) for shard in (fully_sharded, wrapped)]
    torch.save(deltas, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
