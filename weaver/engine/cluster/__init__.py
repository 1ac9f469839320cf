"""Beyond one process: samplers of vLLM in environments of their own, behind `Sampler`."""
