"""What scoring and cutting cost: side by side, each contender in its own process, several rounds, medians.

    python tests/benchmarks/pruning.py [--json] [--rounds 5]

Statistics: block influence, norms and (L2, mean) scores of all axes against one forward pass of the body without its
head (claim: at most 1.15x). Second moments: the same with the stream's covariance, against body + the Gram matrices'
and the rotation's FLOPs at this machine's measured float64 (float32) matrix rate, two passes being two bodies.
Cut: probing + plan + cut, nothing cached between rounds, against torch-pruning's BasePruner on the same Llama (8 layers,
hidden 512; claim: at least 20x), and per layer as depth grows to 64. The proof is a row of its own.
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
    "SmolLM2-135M, 4 layers": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4,
                               "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
                               "vocab_size": 49152},
}  # fmt: skip
CUT = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 2,
       "head_dim": 64, "vocab_size": 2048}  # fmt: skip
DEPTHS = (8, 16, 32, 64)
TOKENS = (16, 256)


def rounds_of(action, count: int) -> list[float]:
    """Seconds of each round, after one that is not counted."""
    action()
    times = []
    for _ in range(count):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return times


def measure(contender: str, subject: str, rounds: int) -> list[float]:
    """Seconds of each round of one contender."""
    return (
        cut_seconds(contender, int(subject), rounds) if subject.isdigit() else pass_seconds(contender, subject, rounds)
    )


def pass_seconds(contender: str, shape: str, rounds: int) -> list[float]:
    """Of forward passes and statistics."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from cascade.data.blocks import TokenBlocks
    from cascade.pruning.importance.statistics import collect_statistics

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], tie_word_embeddings=True)).eval()
    ids = torch.randint(0, SHAPES[shape]["vocab_size"], TOKENS)
    blocks = TokenBlocks(ids, ids, 3.0)

    def body() -> None:
        with torch.inference_mode():
            for batch, _ in blocks.batches(8):
                model.model(input_ids=batch, use_cache=False)

    def grams() -> None:
        hidden, count = SHAPES[shape]["hidden_size"], 2 * SHAPES[shape]["num_hidden_layers"]
        tokens, turn = torch.rand(2048, hidden), torch.rand(hidden, hidden)
        exact = tokens.double()
        for _ in range(TOKENS[0] * TOKENS[1] // 2048):
            for _ in range(count):
                exact.T @ exact
            for _ in range(count + 1):
                tokens @ turn

    actions = {
        "body": body,
        "grams": grams,
        "statistics": lambda: collect_statistics(model, blocks),
        "second moments": lambda: collect_statistics(model, blocks, covariance_blocks=len(blocks)),
    }
    return rounds_of(actions[contender], rounds)


def cut_seconds(contender: str, depth: int, rounds: int) -> list[float]:
    """Of a cut to three quarters of hidden size and neurons and half of the heads."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from cascade.models.architecture import axes
    from cascade.models.architecture.dims import dims_of
    from cascade.pruning.choose import plan_pruning
    from cascade.pruning.cut import prune
    from cascade.pruning.proof import prove_cuts, random_scores

    torch.manual_seed(0)
    config = LlamaConfig(**CUT, num_hidden_layers=depth)

    def cascade(model, scores) -> None:
        axes._probe.cache_clear()
        dims = dims_of(config).replace(hidden_size=384, intermediate_size=1032, num_attention_heads=4)
        prune(model, plan_pruning(scores, config, dims))

    def proof() -> None:
        axes._probe.cache_clear()
        prove_cuts(config)

    def torch_pruning(model, scores) -> None:
        import torch_pruning as tp

        attention = [layer.self_attn for layer in model.model.layers]
        num_heads = {one.q_proj: 8 for one in attention} | {m: 2 for one in attention for m in (one.k_proj, one.v_proj)}
        pruner = tp.pruner.BasePruner(
            model,
            example_inputs=torch.zeros(1, 4, dtype=torch.int64),
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            global_pruning=False,
            pruning_ratio=0.25,
            ignored_layers=[model.lm_head],
            num_heads=num_heads,
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=0.5,
            round_to=4,
            out_channel_groups={},
            in_channel_groups={},
            # With the default cache its graph is never finished.
            forward_fn=lambda m, x: m(x, use_cache=False).logits.sum(),
        )
        pruner.step()

    if contender == "proof":
        return rounds_of(proof, rounds)
    model = LlamaForCausalLM(config).eval()
    scores = random_scores(model)
    if contender == "cascade":
        return rounds_of(lambda: cascade(model, scores), rounds)
    times = []
    for _ in range(rounds):  # it changes its model, so each round has a fresh one, made outside the clock
        model = LlamaForCausalLM(config).eval()
        started = time.perf_counter()
        torch_pruning(model, scores)
        times.append(time.perf_counter() - started)
    return times


def medians_of(subject: str, contenders: tuple[str, ...], rounds: int) -> dict[str, float]:
    """Median seconds by contender; they alternate, each time in a process of its own."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(2):
        for contender in contenders:
            command = [sys.executable, __file__, "--contender", contender, subject, "--rounds", str(rounds)]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            times[contender] += json.loads(output.splitlines()[-1])
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contender", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(measure(*options.contender, options.rounds)))
        return
    rows = []
    for shape in SHAPES:
        found = medians_of(shape, ("body", "statistics", "grams", "second moments"), options.rounds)
        rows.append({"name": f"statistics, {shape}", "seconds": found["statistics"], "against": found["body"]})
        both = 2 * found["body"] + found["grams"]
        rows.append({"name": f"second moments, {shape}", "seconds": found["second moments"], "against": both})
    for depth in DEPTHS:
        contenders = ("cascade", "torch-pruning") if depth == DEPTHS[0] else ("cascade",)
        found = medians_of(str(depth), contenders, options.rounds)
        rows.append(
            {"name": f"cut, {depth} layers", "seconds": found["cascade"], "seconds_per_layer": found["cascade"] / depth}
        )
        if "torch-pruning" in found:
            rows[-1]["against"] = found["torch-pruning"]
    rows.append({"name": "proof", "seconds": medians_of("8", ("proof",), options.rounds)["proof"]})
    for row in rows:
        if "against" in row:
            row["ratio"] = row["seconds"] / row["against"]
    import torch

    conditions = {"device": platform.machine(), "threads": torch.get_num_threads(), "dtype": "float32",
                  "tokens": TOKENS[0] * TOKENS[1]}  # fmt: skip
    if options.json:
        print(json.dumps({"conditions": conditions, "rows": rows}))
        return
    print(conditions)
    for row in rows:
        line = f"{row['name']:<40} {row['seconds']:.3f} s"
        if "against" in row:
            line += f"  against {row['against']:.3f} s: {row['ratio']:.3f}x"
        if "seconds_per_layer" in row:
            line += f"  {1000 * row['seconds_per_layer']:.1f} ms per layer"
        print(line)


if __name__ == "__main__":
    main()
