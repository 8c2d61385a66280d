"""Training after pruning: low-rank adapters, instruction data, a dense teacher."""
