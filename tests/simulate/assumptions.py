"""What `Costs` assumes, in words, with where each figure comes from. Called by the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.simulate.figures import COMMIT_S, DISK_BYTES_PER_S, FLUSH_S

if TYPE_CHECKING:
    from tests.simulate.costs import Costs


def assumptions(costs: Costs) -> list[tuple[str, str, str]]:
    """What, how much, from where; of Qwen3-8B in bfloat16 with LoRA on all layers."""
    rows, step_s = costs.worker_rows, costs.rows_step_s(costs.worker_rows)
    return [
        (
            "a GPU trains",
            f"{costs.trained_per_s:,.0f} tokens/s",
            "arithmetic: 4 x 8.2e9 operations a token at 400 TFLOP/s",
        ),
        (
            "a call of a group",
            f"{1000 * costs.call_s:g} ms",
            "the bound; 2.5 ms through Ray were measured",
        ),
        ("a lost group is back", f"after {costs.group_start_s:g} s", "assumed: 16 GB are read"),
        (
            "an adapter of rank 32",
            f"{32 * costs.rank_bytes / 1e6:.0f} MB, and twice that of its optimizer",
            "arithmetic, float32",
        ),
        (
            "a sampler",
            f"{rows} rows, {1000 * step_s:.1f} ms a step: {rows / step_s:,.0f} tokens/s",
            "arithmetic: keys and values of 340,000 tokens fit 80 GB, 8,500 a row; "
            "vLLM draws about 10,000 tokens/s at 64 rows",
        ),
        ("and reads prompts", f"at {costs.read_per_s:,.0f} tokens/s", "assumed"),
        (
            "and takes up an adapter that it has read",
            f"in {1000 * costs.add_lora_s:g} ms; it keeps {costs.held_adapters}",
            "11 to 60 ms were measured, of small ones",
        ),
        ("a killed one is back", f"after {costs.worker_start_s:g} s", "assumed"),
        (
            "the shared folder",
            f"{costs.shared_streams} transfers at a time, of "
            f"{costs.stream_bytes_per_s / 1e9:g} GB/s each",
            "assumed: one file server with 25 Gbit/s",
        ),
        (
            "the server's processor",
            f"{1000 * costs.operation_s:g} ms an operation, {1e6 * costs.token_s:.2f} ms a "
            "thousand tokens that are sent",
            "measured on two CPU cores ([benchmarks](benchmarks.md))",
        ),
        (
            "on the wire and in the journal",
            f"{costs.token_bytes:g} bytes for a token that is sent, 4 for a number in an answer",
            "measured; float32",
        ),
        (
            "the database",
            f"{1000 * COMMIT_S:g} ms a commit, {1000 * FLUSH_S:g} ms where it waits for the disk, "
            f"{DISK_BYTES_PER_S / 1e6:.0f} MB/s, all of it twice",
            "assumed: SQLite's WAL on an SSD",
        ),
    ]
