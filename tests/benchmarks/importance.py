"""All importance statistics against one forward pass of the body without the head: side by side, medians.

    python tests/benchmarks/importance.py [--json] [--rounds 9]

The claim: block influence, heads, neurons, hidden channels and norm energies together cost at most 1.15x that pass.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time

SHAPES = {
    "pico-python": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 12,
                    "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 2048},
    "SmolLM2-135M, 4 layers": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 9,
                               "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152},
}  # fmt: skip


def measure(contender: str, shape: str, rounds: int) -> None:
    """Prints the seconds of each round."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from cascade.data.blocks import TokenBlocks
    from cascade.importance.statistics import collect_statistics

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], tie_word_embeddings=True)).eval()
    ids = torch.randint(0, SHAPES[shape]["vocab_size"], (16, 256))
    blocks = TokenBlocks(ids, ids, 3.0)

    def body() -> None:
        with torch.inference_mode():
            for batch, _ in blocks.batches(8):
                model.model(input_ids=batch, use_cache=False)

    action = body if contender == "body" else lambda: collect_statistics(model, blocks)
    action()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    print(json.dumps(times))


def main() -> None:
    """Alternates the contenders, each in a process of its own, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--contender", nargs=2)
    options = parser.parse_args()
    if options.contender:
        measure(*options.contender, options.rounds)
        return
    rows = []
    for shape in SHAPES:
        times: dict[str, list[float]] = {"body": [], "statistics": []}
        for _ in range(2):
            for contender in times:
                command = [sys.executable, __file__, "--contender", contender, shape, "--rounds", str(options.rounds)]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                times[contender] += json.loads(output.splitlines()[-1])
        medians = {name: statistics.median(values) for name, values in times.items()}
        rows.append({"name": shape, **medians, "ratio": medians["statistics"] / medians["body"]})
    import torch

    conditions = {"device": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
                  "dtype": "float32", "tokens": 4096}  # fmt: skip
    if options.json:
        print(json.dumps({"conditions": conditions, "rows": rows}))
        return
    print(conditions)
    for row in rows:
        print(f"{row['name']:<24} body {row['body']:.3f} s  statistics {row['statistics']:.3f} s  {row['ratio']:.3f}x")


if __name__ == "__main__":
    main()
