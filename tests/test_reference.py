"""The user's API reference: its code blocks, in its order and as written, on the torch engine.

Only the model's name (`Qwen/Qwen3-8B`, here weaver-nano) and the path of saved weights are
replaced, and names are given that the reference leaves to the reader.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest

from weaver import SamplingClient, ServiceClient, TrainingClient, types

if TYPE_CHECKING:
    from collections.abc import Iterator

CREATE_CLIENTS = """
from weaver import ServiceClient

# Create with API key from environment
service_client = ServiceClient()

# Or specify API key directly
service_client = ServiceClient(api_key="your-api-key")

# Connect to custom endpoint
service_client = ServiceClient()
"""

CREATE_MODEL = """
training_client = service_client.create_model(
    base_model="Qwen/Qwen3-8B",
    lora_config={"rank": 32}
)
"""

TOKENIZER = """
tokenizer = training_client.get_tokenizer()

# Use the tokenizer
tokens = tokenizer.encode("Hello, world!", add_special_tokens=True)
text = tokenizer.decode(tokens)
"""

DATUM = """
from weaver import types
import torch

# Create a datum
datum = types.Datum(
    model_input=types.ModelInput.from_ints(input_tokens),
    loss_fn_inputs={
        "target_tokens": torch.tensor(target_tokens, dtype=torch.int64),
        "weights": torch.tensor(weights, dtype=torch.float32),
    }
)
"""

PROCESS = """
def process_example(prompt, completion, tokenizer):
    # Encode prompt and completion
    prompt_tokens = tokenizer.encode(prompt, add_special_tokens=True)
    completion_tokens = tokenizer.encode(completion, add_special_tokens=False)

    # Combine tokens
    tokens = prompt_tokens + completion_tokens

    # Create weights (0 for prompt, 1 for completion)
    weights = [0.0] * len(prompt_tokens) + [1.0] * len(completion_tokens)

    # Shift for next-token prediction
    input_tokens = tokens[:-1]
    target_tokens = tokens[1:]
    weights = weights[1:]

    return types.Datum(
        model_input=types.ModelInput.from_ints(input_tokens),
        loss_fn_inputs={
            "target_tokens": torch.tensor(target_tokens, dtype=torch.int64),
            "weights": torch.tensor(weights, dtype=torch.float32),
        },
    )

# Process multiple examples
examples = [
    {"prompt": "Q: What is AI?", "completion": " A: Artificial Intelligence"},
    {"prompt": "Q: What is ML?", "completion": " A: Machine Learning"},
]

datums = [process_example(ex["prompt"], ex["completion"], tokenizer) for ex in examples]
"""

WEIGHTS = """
# Example: Weight completion tokens more heavily
weights = [0.0] * len(prompt_tokens) + [2.0] * len(completion_tokens)
"""

FORWARD_BACKWARD = """
result = training_client.forward_backward(
    datums,
    loss_fn="cross_entropy",
    wait=True,
)
"""

OPTIM_STEP = """
training_client.optim_step(
    types.AdamParams(learning_rate=1e-4),
    wait=True,
)
"""

ADAM_PARAMS = """
adam_params = types.AdamParams(
    learning_rate=1e-4,  # Learning rate
    beta1=0.9,           # First moment decay
    beta2=0.999,         # Second moment decay
    eps=1e-8,            # Epsilon for numerical stability
)
"""

LOOP = """
from weaver import ServiceClient, types
import torch

# Setup
service_client = ServiceClient()
training_client = service_client.create_model(
    base_model="Qwen/Qwen3-8B",
    lora_config={"rank": 32}
)
tokenizer = training_client.get_tokenizer()

# Prepare data
examples = [
    {"input": "hello world", "output": "ello-hay orld-way"},
    {"input": "banana split", "output": "anana-bay plit-say"},
]

def process_example(example):
    prompt = f"English: {example['input']}\\nPig Latin:"
    prompt_tokens = tokenizer.encode(prompt, add_special_tokens=True)
    completion_tokens = tokenizer.encode(f" {example['output']}\\n\\n", add_special_tokens=False)

    tokens = prompt_tokens + completion_tokens
    weights = [0.0] * len(prompt_tokens) + [1.0] * len(completion_tokens)

    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": torch.tensor(tokens[1:], dtype=torch.int64),
            "weights": torch.tensor(weights[1:], dtype=torch.float32),
        },
    )

datums = [process_example(ex) for ex in examples]

# Training loop
adam_params = types.AdamParams(learning_rate=1e-4)
for step in range(100):
    # Forward and backward
    result = training_client.forward_backward(
        datums,
        "cross_entropy",
        wait=True,
    )

    # Optimizer step
    training_client.optim_step(adam_params, wait=True)

    # Log progress
    if step % 10 == 0:
        metrics = result.get("result", {}).get("metrics", {})
        loss = metrics.get("loss", 0.0)
        print(f"Step {step}: loss={loss:.4f}")
"""

SAMPLING_CLIENT = """
sampling_client = training_client.save_weights_and_get_sampling_client(
    name="my-model"
)
"""

FROM_SAVED = """
sampling_client = service_client.create_sampling_client(
    model_path="/path/to/weights",
    base_model="Qwen/Qwen3-8B",
)
"""

SAMPLE = """
from weaver import types

# Prepare prompt
prompt_tokens = tokenizer.encode("Hello, ", add_special_tokens=True)
prompt = types.ModelInput.from_ints(prompt_tokens)

# Sampling parameters
sampling_params = types.SamplingParams(
    max_tokens=50,
    temperature=0.8,
    top_p=0.95,
    stop=["\\n"],
)

# Sample
result = sampling_client.sample(
    prompt=prompt,
    sampling_params=sampling_params,
    num_samples=1,
)

# Get response
sequence = result["sequences"][0]
response_tokens = sequence["tokens"]
response = tokenizer.decode(response_tokens)
print(f"Response: {response}")
"""

SAMPLING_PARAMS = """
sampling_params = types.SamplingParams(
    max_tokens=100,        # Maximum tokens to generate
    temperature=1.0,       # Sampling temperature (higher = more random)
    top_p=1.0,            # Nucleus sampling parameter
    top_k=0,              # Top-k sampling (0 = disabled)
    stop=["\\n", "END"],   # Stop sequences
    repetition_penalty=1.0, # Penalty for repeated tokens
)
"""

LOGPROBS = """
# Prepare sequence
tokens = tokenizer.encode("Hello, world!", add_special_tokens=True)
model_input = types.ModelInput.from_ints(tokens)

# Compute logprobs
logprobs = sampling_client.compute_logprobs(prompt=model_input)

# logprobs is a list: [None, -0.5, -0.3, ...]
# First element is None (no logprob for first token)
print(f"Token logprobs: {logprobs}")
"""


class Reader:
    """Runs blocks one after another in one namespace, as somebody would who reads along."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}

    def run(self, block: str, **replaced: str) -> None:
        for old, new in {"Qwen/Qwen3-8B": "weaver-nano", **replaced}.items():
            block = block.replace(old, new)
        exec(compile(block, "<reference>", "exec"), self.names)

    def __getitem__(self, name: str) -> Any:
        return self.names[name]


@pytest.fixture
def reader(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    monkeypatch.setenv("WEAVER_HOME", str(tmp_path))
    monkeypatch.delenv("WEAVER_BASE_URL", raising=False)
    reader = Reader()
    yield reader
    reader["service_client"].close()


def test_the_reference_runs_as_written(reader: Reader, capsys: pytest.CaptureFixture[str]) -> None:
    reader.run(CREATE_CLIENTS)
    assert isinstance(reader["service_client"], ServiceClient)
    reader.run(CREATE_MODEL)
    assert isinstance(reader["training_client"], TrainingClient)
    reader.run(TOKENIZER)
    assert "Hello, world!" in reader["text"]

    reader.names |= {"input_tokens": [1, 2, 3], "target_tokens": [2, 3, 4], "weights": [0, 1, 1]}
    reader.run(DATUM)
    assert reader["datum"].loss_fn_inputs["target_tokens"].tolist() == [2, 3, 4]
    reader.run(PROCESS)
    assert len(reader["datums"]) == 2
    reader.names |= {"prompt_tokens": [1, 2], "completion_tokens": [3]}
    reader.run(WEIGHTS)
    assert reader["weights"] == [0.0, 0.0, 2.0]

    reader.run(FORWARD_BACKWARD)
    result = reader["result"]
    assert result["result"]["metrics"]["loss"] > 0
    outputs = result["result"]["loss_fn_outputs"]
    assert [len(output["logprobs"]) for output in outputs] == [
        datum.model_input.length for datum in reader["datums"]
    ]
    reader.run(OPTIM_STEP)
    reader.run(ADAM_PARAMS)
    assert reader["adam_params"] == types.AdamParams()

    reader.run(LOOP)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == [f"Step {i}" for i in range(0, 100, 10)]
    losses = [float(line.split("=")[1]) for line in printed]
    assert losses[-1] < losses[0]

    reader.run(SAMPLING_CLIENT)
    assert isinstance(reader["sampling_client"], SamplingClient)
    trained = reader["sampling_client"].compute_logprobs(prompt="hello world")
    saved = reader["training_client"].list_checkpoints()[-1]
    assert saved.name == "my-model" and saved.folder is not None
    for path in (saved.path, saved.folder):
        reader.run(FROM_SAVED, **{"/path/to/weights": path})
        again = reader["sampling_client"].compute_logprobs(prompt="hello world")
        assert again[1:] == pytest.approx(trained[1:], abs=1e-4)

    reader.run(SAMPLE)
    _check_sample(reader)
    assert f"Response: {reader['response']}" in capsys.readouterr().out
    reader.run(SAMPLING_PARAMS)
    assert reader["sampling_params"].stop == ("\n", "END")
    reader.run(LOGPROBS)
    logprobs = reader["logprobs"]
    assert isinstance(logprobs, list) and logprobs[0] is None
    assert len(logprobs) == len(reader["tokens"])
    assert all(isinstance(value, float) and value <= 0 for value in logprobs[1:])


def _check_sample(reader: Reader) -> None:
    (sequence,) = reader["result"]["sequences"]
    assert 1 <= len(sequence["tokens"]) == len(sequence["logprobs"]) <= 50
    assert all(isinstance(token, int) for token in sequence["tokens"])
    assert all(math.isfinite(value) and value <= 0 for value in sequence["logprobs"])
    assert isinstance(sequence["text"], str) and "\n" not in sequence["text"]
    assert sequence["stop_reason"] in ("stop", "length")
