"""Streaming: pruning a model that is larger than memory, layer by layer from its safetensors files."""
