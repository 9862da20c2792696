"""How much of a teacher's probabilities few bytes keep: ids a token, bytes, and the error of the student's gradient.

    python tests/benchmarks/sampling.py --model SmolLM2-135M-Instruct.Q4_1.gguf --texts a.jsonl.gz b.jsonl.gz

The student is the teacher without some of its layers. The gradient is forward KL's towards the student's last hidden states,
(q - t) W, over all tokens of a text; the error is what a sample adds, relative to the exact gradient, and the angle is that
of the sum over tokens through a random projection of the tokens' hidden states (what a weight's gradient sums up).
Bytes are those of the cache's own records (ids, counts and 2 bytes for the entropy a token; 2 more for each probability that is
kept as it is); the bound is what ids and counts hold of information, log2 C(V, K) + log2 C(n - 1, K - 1) bits for K ids.
"""

import argparse
import gzip
import json
import math

import torch

from cascade.models.architecture.head import head_of, last_hidden, logits_of
from cascade.models.checkpoint.load import load_model, load_tokenizer, resolve_model
from cascade.teacher.targets.bit_packing import rising_size
from cascade.teacher.targets.sampling import shifts, systematic_draws


def independent_draws(p, seed, draws):
    return torch.multinomial(p, draws, replacement=True, generator=torch.Generator().manual_seed(seed))


def shares(ids, draws, vocabulary):
    return torch.zeros(len(ids), vocabulary).scatter_add_(1, ids, torch.full(ids.shape, 1 / draws))


def choose(n, k):
    """log2 of the ways to choose k of n."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def sizes(t, draws, exact):
    """(bytes a token as the cache keeps it, bytes at the information bound without statistics)."""
    kept, vocabulary = (t > 0).sum(1).tolist(), t.shape[1]
    packed = rising_size(sum(kept), len(kept) * vocabulary) + len(kept) * (draws / 8 + 2 * exact + 2) + 4
    bound = sum(choose(vocabulary, k) + (choose(draws - 1, k - exact - 1) if draws and k > exact else 0) for k in kept)
    return packed / len(kept), bound / 8 / len(kept)


def sample(kind, p, seed, draws, head):
    """(t [T, V], ids kept a token, of these with a probability of their own)."""
    tokens, vocabulary = p.shape
    t, exact = torch.zeros_like(p), 0
    rest = p
    if head:
        top = p.topk(head)
        t.scatter_(1, top.indices, top.values)
        rest, exact = p.scatter(1, top.indices, 0.0), head
    if draws:
        mass = rest.sum(1, keepdim=True)
        even = rest / mass.clamp_min(1e-12)
        if kind == "systematic":
            ids = systematic_draws(even, shifts(b"benchmark", seed.to_bytes(4, "little"), tokens), draws)
        else:
            ids = independent_draws(even.clamp_min(1e-30), seed, draws)
        t = t + shares(ids, draws, vocabulary) * mass
    return t, (t > 0).sum(1).float().mean().item(), exact


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:pico-python")
    parser.add_argument("--texts", nargs="+", required=True, help="JSONL.gz files with a field `text`")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--without", type=int, default=4, help="layers that the student lacks")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    source = resolve_model(options.model)
    teacher, student, tokenizer = load_model(source), load_model(source), load_tokenizer(source)
    layers = student.model.layers
    first = len(layers) // 2
    student.model.layers = torch.nn.ModuleList([*layers[:first], *layers[first + options.without :]])
    for place, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = place
    student.config.num_hidden_layers = len(student.model.layers)
    kinds = [("independent", draws, 0) for draws in (12, 25, 50)]
    kinds += [("systematic", draws, 0) for draws in (12, 25, 30, 34, 38, 50)]
    kinds += [(kind, draws, head) for kind in ("independent", "systematic") for head, draws in ((4, 4), (4, 8), (8, 8))]
    kinds += [("top", 0, head) for head in (8, 12, 20)]
    table = {kind: [] for kind in kinds}
    for name in options.texts:
        with gzip.open(name, "rt") as file:
            text = "\n\n".join(json.loads(line)["text"] for line, _ in zip(file, range(40), strict=False))
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"][: options.tokens]])
        p = logits_of(last_hidden(teacher, input_ids=ids)[0], head_of(teacher)).softmax(-1)
        hidden = last_hidden(student, input_ids=ids)[0]
        q = logits_of(hidden, head_of(student)).softmax(-1)
        weight = head_of(student).weight
        exact = (q - p) @ weight
        whole = hidden.T @ exact
        for kind in kinds:
            errors, angles, kept, size = [], [], 0.0, (0.0, 0.0)
            for seed in range(options.seeds if kind[1] else 1):
                t, kept, own = sample(kind[0], p, seed, kind[1], kind[2])
                noise = (p - t) @ weight
                errors.append((noise.norm() / exact.norm()).item())
                found = whole + hidden.T @ noise
                cosine = (found * whole).sum() / (found.norm() * whole.norm())
                angles.append(math.degrees(math.acos(min(1.0, cosine.item()))))
                size = sizes(t, kind[1], own)
            table[kind].append((kept, *size, sum(errors) / len(errors), sum(angles) / len(angles)))
    print(f"{options.model}: {options.tokens} tokens of each of {len(options.texts)} texts, {options.seeds} seeds")
    print(f"{'targets':24} {'ids':>6} {'bytes':>6} {'bound':>6} {'error a token':>14} {'angle of the sum':>17}")
    for (kind, draws, head), rows in table.items():
        label = f"top {head} exact" if kind == "top" else (f"top {head} + " if head else "") + f"{draws} {kind}"
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        print(f"{label:24} {mean[0]:6.1f} {mean[1]:6.1f} {mean[2]:6.1f} {mean[3]:14.3f} {mean[4]:16.2f}°")


if __name__ == "__main__":
    main()
