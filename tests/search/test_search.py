import torch
from helpers_llama import tiny_llama

from pyprune import discover, score
from pyprune.search import search_plan


def ids(samples=16, length=16, seed=0):
    return torch.randint(0, 97, (samples, length), generator=torch.Generator().manual_seed(seed))


def test_it():
    model = tiny_llama()
    groups = discover(model)
    scores = score(model, groups, ids(8), "wanda", roles=["ffn", "kv_heads"])
    plan = search_plan(model, groups, scores, ids(), 0.2, steps=5)
    import json

    print(json.dumps(plan.details, indent=1))
    assert 0
