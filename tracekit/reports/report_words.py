"""What a report says in words: sentences written from the numbers, for a reader who has never heard of tracekit."""

from __future__ import annotations

from collections.abc import Sequence

from tracekit.reports.report_parts import Key, Method, Row, Subject, figure, said, span
from tracekit.reports.text import count, fixed, number
from tracekit.schema import TraceMeta

SMALL = 1e-12
"""What is smaller comes from rounding in the arithmetic."""


def called(subject: Subject) -> str:
    """Return what to call the model of a trace in a sentence."""
    return subject.info.meta.model or f"the model of trace “{subject.info.name}”"


LEAD = (
    (
        "A Mixture-of-Experts model splits each of its MoE layers into N experts and runs only k of them for a token. "
        "That makes a single token cheap. But speculative decoding verifies several tokens at once, and then the "
        "experts of all of them have to be read from memory: the more the tokens' experts overlap, the less there is "
        "to read."
    ),
    (
        "This report measures that overlap in recorded routing, and says how far it lies below what independent tokens "
        "would need, why, and what follows for batches and caches. A result is always beside the baseline it is "
        "compared with, and, where there are enough requests, its 95 % interval."
    ),
)


def headline(subject: Subject, row: Row, causes: Sequence[Row], batches: Sequence[Row]) -> list[str]:
    """Return the answer in a few sentences.

    Parameters
    ----------
    row
        Of the query ``chart_windows``, at the window length that the report is about.
    causes
        Rows of the query ``chart_attribution``; none where there are none.
    batches
        Rows of the query ``chart_batch``; none where there are none.
    """
    T, N, k = row["window"], subject.info.meta.num_experts, subject.info.meta.top_k
    first = (
        f"Verifying {T} consecutive tokens at once, {called(subject)} reads {said(row, 'observed')} of the {N} experts "
        f"of a layer on average, {figure(row, 'per_top_k')} times the {k} that a single token needs."
    )
    return [f"{first} {against_uniform(row)}", *filter(None, [made_of(causes), in_batches(batches)])]


def against_uniform(row: Row) -> str:
    """Say how far a window lies below the uniform baseline, and below the request's own tokens."""
    expected = figure(row, "expected_uniform")
    reduction, low, high = (row[f"reduction_uniform{end}"] for end in ("", "_lo", "_hi"))
    chance = (
        f"Were every set of experts equally likely for every token (the baseline “uniform”), it would read {expected}"
    )
    if reduction is None:
        return f"{chance}."
    if low is not None and low <= 0 <= high:
        return f"{chance}: with so few requests the two cannot be told apart."
    if reduction < 0:
        return f"{chance}: the routing reads {said(_flipped(row), 'reduction_uniform', 100)} more than that."
    text = f"{chance}: the routing reads {said(row, 'reduction_uniform', 100)} fewer."
    if row["reduction_request"] is not None:
        text += (
            f" Against the same requests' tokens in random order it reads {said(row, 'reduction_request', 100)} fewer"
            if row["reduction_request"] > SMALL
            else " Against the same requests' tokens in random order it reads none fewer"
        )
        text += ": that much is temporal correlation in the strict sense."
    return text


def _flipped(row: Row) -> Row:
    ends = {"reduction_uniform": "", "reduction_uniform_lo": "_hi", "reduction_uniform_hi": "_lo"}
    values = {name: row[f"reduction_uniform{end}"] for name, end in ends.items()}
    return {name: None if value is None else -value for name, value in values.items()}


_CAUSES = {
    "popularity": "some experts being popular everywhere",
    "label": "the labels, that is the domain",
    "request": "each request keeping to its topic",
    "token_order": "neighbouring tokens being alike",
}


def made_of(causes: Sequence[Row]) -> str:
    """Say what the reduction against uniform is made of."""
    shares = [row for row in causes if row["share"] is not None]
    if not shares:
        return ""
    largest = max(shares, key=lambda row: row["share"])
    listed = [f"{figure(row, 'share', 100)} is owed to {_CAUSES[row['cause']]}" for row in shares]
    text = f"Of what it reads less than uniform, {_joined(listed)}."
    if len(shares) > 1:
        text += f" The largest part is {_CAUSES[largest['cause']]}."
    unsure = [_CAUSES[row["cause"]] for row in shares if not row["resolved"]]
    if unsure:
        text += f" There are too few data to be sure of the part of {_joined(unsure)}."
    return text


def _joined(items: Sequence[str]) -> str:
    """Return items as a list in a sentence."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def in_batches(batches: Sequence[Row]) -> str:
    """Say what remains of the reduction in the largest batch."""
    known = [row for row in batches if row["batch_size"] > 1 and row["reduction_uniform"] is not None]
    if not known:
        return ""
    row, alone = max(known, key=lambda row: row["batch_size"]), batches[0]
    text = f"for {row['batch_size']} requests verified together, a layer reads {figure(row, 'observed')} experts, "
    low = row["reduction_uniform_lo"]
    if (row["reduction_uniform"] if low is None else low) <= 0:
        text += "no fewer than by uniform routing, as far as can be told."
    else:
        text += f"{said(row, 'reduction_uniform', 100)} fewer than by uniform routing."
    uses_up = alone["reduction_uniform"] is not None and row["reduction_uniform"] < alone["reduction_uniform"] / 2
    return f"Batching uses the difference up: {text}" if uses_up else text[0].upper() + text[1:]


def keys(subject: Subject, row: Row, causes: Sequence[Row], lag: Row | None) -> list[Key]:
    """Return the numbers worth remembering."""
    T, meta = row["window"], subject.info.meta
    found = [
        Key(figure(row, "observed"), f"of {meta.num_experts} experts read by {T} tokens", span(row, "observed")),
        Key(figure(row, "per_top_k") + " ×", f"the {meta.top_k} experts of one token"),
    ]
    if row["reduction_uniform"] is not None:
        interval = span(row, "reduction_uniform", 100)
        found.append(Key(figure(row, "reduction_uniform", 100), "fewer than by uniform routing", interval))
    order = next((c for c in causes if c["cause"] == "token_order" and c["share"] is not None), None)
    if order is not None:
        found.append(Key(figure(order, "share", 100), "of that from the order of tokens", span(order, "share", 100)))
    if lag is not None:
        what = "of a token's experts shared with the next"
        found.append(Key(figure(lag, "overlap", 100), what, span(lag, "overlap", 100)))
    return found


def of_counts(subject: Subject) -> list[str]:
    """Say what a trace of counts can answer."""
    name = subject.info.meta.model or f"trace “{subject.info.name}”"
    return [
        (
            f"Of {name} there are only counts per expert, without tokens or their order: how evenly its experts are "
            "used can be said, and nothing about verification windows."
        )
    ]


def windows(row: Row) -> list[str]:
    """Say what the chart of windows shows."""
    return [
        (
            "With K drafted tokens a verification holds T = K + 1. The line “observed” is what windows of T "
            "consecutive tokens read; the others are what independent tokens would read, from uniform, where nothing "
            "is known, down to request, the request's own tokens in random order."
        ),
        f"At T = {row['window']}: {said(row, 'observed')} experts observed, {figure(row, 'expected_uniform')} by "
        "uniform"
        + (f", {figure(row, 'expected_popularity')} by popularity" if row["expected_popularity"] is not None else "")
        + (f", {figure(row, 'expected_request')} by request" if row["expected_request"] is not None else "")
        + ".",
    ]


def batches(rows: Sequence[Row]) -> list[str]:
    """Say what the chart of batches shows."""
    known = [row for row in rows if row["reduction_uniform"] is not None]
    text = (
        "A batch reads the union of the experts of all its requests. The more of them there are, the nearer any "
        "routing comes to reading every expert, and the less correlation can save."
    )
    listed = [f"{figure(row, 'reduction_uniform', 100)} at B = {row['batch_size']}" for row in known]
    return [text, f"Fewer than uniform at T = {known[0]['window']}: {', '.join(listed)}."] if known else [text]


def autocorr(rows: Sequence[Row]) -> list[str]:
    """Say how the overlap decays."""
    by_lag = {row["lag"]: row for row in rows if row["overlap"] is not None}
    if 1 not in by_lag:
        return []
    one, last = by_lag[1], by_lag[max(by_lag)]
    text = (
        f"A token shares {said(one, 'overlap', 100)} of its experts with the next one; by popularity alone it would be "
        f"{figure(one, 'expected_popularity', 100)}"
    )
    if one["expected_request"] is not None:
        text += f", and {figure(one, 'expected_request', 100)} with a random token of the same request"
    text += "."
    if last["lag"] > 1:
        text += f" At a distance of {last['lag']} tokens {figure(last, 'overlap', 100)} remains."
    return [text]


def layers(rows: Sequence[Row]) -> list[str]:
    """Say in which layers there is most and least to gain."""
    known = [row for row in rows if row["reduction_uniform"] is not None]
    if len(known) < 2:
        return []
    low, high = (pick(known, key=lambda row: row["reduction_uniform"]) for pick in (min, max))
    return [
        (
            f"Layers differ: windows of {high['window']} tokens read {figure(high, 'reduction_uniform', 100)} fewer "
            f"experts than uniform in layer {high['layer']}, and {figure(low, 'reduction_uniform', 100)} fewer in "
            f"layer {low['layer']}."
        )
    ]


def load(rows: Sequence[Row], meta: TraceMeta) -> list[str]:
    """Say how evenly the experts are used."""
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in ("max_over_mean", "effective_experts")}
    busiest = max(rows, key=lambda row: row["max_over_mean"])
    dead = sum(row["dead_experts"] for row in rows)
    unused = "none is unused" if not dead else f"{count(dead)} of {count(meta.num_experts * len(rows))} are never used"
    return [
        (
            f"The busiest expert of a layer takes {fixed(mean['max_over_mean'], 2)} times the mean load on average, "
            f"{fixed(busiest['max_over_mean'], 2)} times in layer {busiest['layer']}. The load is as uneven as if "
            f"{fixed(mean['effective_experts'], 1)} of {meta.num_experts} experts shared it evenly; {unused}."
        )
    ]


def ratio(rows: Sequence[Row]) -> list[str]:
    """Say what verification adds to the traffic of expert weights."""
    one, most = rows[0], rows[-1]
    text = (
        f"A verification of T = {one['window']} tokens reads {said(one, 'ratio')} times the expert weights of a step "
        f"without drafts at B = {one['batch_size']}"
    )
    if most is not one:
        text += f", and {said(most, 'ratio')} times at B = {most['batch_size']}"
    return [
        (
            f"{text}. It pays where the tokens that a step emits outweigh that, the rest of the step and the drafts: "
            "S = AL / (V + D)."
        )
    ]


def accepted(rows: Sequence[Row]) -> list[str]:
    """Say what real steps load and emit."""
    every = next(row for row in rows if row["window"] is None)
    text = (
        f"The trace has {count(every['n_steps'])} verification steps. One drafts {figure(every, 'drafted')} tokens on "
        f"average, emits {said(every, 'acceptance_length')} and reads {said(every, 'unique')} experts of a layer."
    )
    if every["rejected_share"] is not None:
        text += f" Of these {figure(every, 'rejected_share', 100)} are read for rejected drafts alone."
    return [text]


def gain(rows: Sequence[Row]) -> list[str]:
    """Say where speculation gains most and where it loses."""
    known = [row for row in rows if row["speedup"] is not None]
    if not known:
        return [
            (
                "Nothing is known of the acceptance of drafts, so there is a cost and no gain: the acceptance rate has "
                "to be given (--acceptance-rate)."
            )
        ]
    best, worst = (pick(known, key=lambda row: row["speedup"]) for pick in (max, min))
    text = (
        f"On {best['hardware']} {best['model']} gains most with {_drafts(best)} at a batch size of "
        f"{best['batch_size']}: {said(best, 'speedup')} times as fast as without drafts."
    )
    return [
        f"{text} The least is {said(worst, 'speedup')} times, with {_drafts(worst)} at a batch size of "
        f"{worst['batch_size']}" + (": there speculation loses." if worst["speedup"] < 1 else ".")
    ]


NO_MACHINE = (
    "What this is in time depends on the machine, and none was named: with --hardware (or --bandwidth and --flops), "
    "and --model where the trace does not name it, the report says what speculation gains."
)


NO_TIMES = (
    "the time that a token takes depends on the machine, and none was named: with --hardware (or --bandwidth and "
    "--flops), --link, and --model where the trace does not name it, the report says how many tokens per second remain "
    "if only some experts fit"
)


def budget(rows: Sequence[Row], meta: TraceMeta) -> list[str]:
    """Say what is kept of a window where only some of its experts are loaded."""
    text = (
        "If at most M experts of a layer may be loaded for a verification window, those that its tokens weigh most "
        "together, the others' part of the output is lost."
    )
    known = [row for row in rows if row["weight_kept"] is not None]
    if not known:
        return [text]
    one = min(known, key=lambda row: abs(row["budget"] - 2 * meta.top_k))
    return [
        text,
        (
            f"Windows of {one['window']} tokens use {figure(one, 'unique')} experts, of which "
            f"{figure(one, 'experts_for_share')} carry {100 * one['share']:.4g} % of the router's weight. A budget of "
            f"{one['budget']} keeps {said(one, 'weight_kept', 100)} of the weight, and all experts of "
            f"{figure(one, 'tokens_intact', 100)} of the tokens."
        ),
    ]


def reuse(rows: Sequence[Row]) -> list[str]:
    """Say how large an LRU cache has to be for half and for nine tenths of the accesses."""
    known = [row for row in rows if row["hit_rate"] is not None]
    text = (
        "An expert is worth keeping only until its next use. The curve says how often an LRU cache of each size still "
        "holds an expert when it is needed again."
    )
    if not known:
        return [text]
    enough = {share: next((row for row in known if row["hit_rate"] >= share), None) for share in (0.5, 0.9)}
    sizes = [f"{row['capacity']} experts per layer for {100 * share:.0f} %" for share, row in enough.items() if row]
    first = 1 - known[-1]["hit_rate"]
    takes = f"It takes {_joined(sizes)} of the accesses." if sizes else "No size hits half of the accesses."
    return [text, f"{takes} First touches, which no size hits, are {100 * max(0.0, first):.1f} %."]


def working_set(rows: Sequence[Row]) -> list[str]:
    """Say how many experts a stretch of tokens uses, and how many more the next token does."""
    if len(rows) < 2:
        return []
    last, before = rows[-1], rows[-2]
    share = 100 * last["observed"] / last["num_experts"]
    return [
        (
            f"The last {last['window']} tokens use {said(last, 'observed')} experts of a layer, {share:.1f} % of "
            f"them; the last of them adds {fixed(last['observed'] - before['observed'], 2)} of its "
            f"{last['top_k']} to what those before it used."
        )
    ]


_PUBLISHED = "Published at 16 tokens: 37.9 % for DeepSeek-V2-Lite, 49.4 % for Mixtral, 54.1 % for Qwen3-30B-A3B."
"""Liang et al., arXiv 2505.16056."""


def locality(rows: Sequence[Row]) -> list[str]:
    """Say how well one choice of experts serves a segment of tokens."""
    text = (
        "If nearby tokens need the same experts, one choice of experts can serve a whole segment of tokens. Both "
        "measures see the segment beforehand: they say what locality there is, not what a policy gets."
    )
    known = [row for row in rows if row["srp"] is not None]
    if not known:
        return [text]
    one = min(known, key=lambda row: abs(row["cache_ratio"] - 2))
    score = (
        f"A router that keeps an expert for all {one['segment']} tokens of a segment or for none has an F1 score (SRP) "
        f"of at best {said(one, 'srp', 100)}; it keeps {figure(one, 'size_ratio')} × k experts."
    )
    score += f" {_PUBLISHED}" if one["segment"] == 16 else ""
    if one["sch"] is not None:
        score += (
            f" A cache of {one['capacity']} experts that sees a segment ahead (SCH) hits {said(one, 'sch', 100)} of "
            "the accesses."
        )
    return [text, score]


def layer_budgets(rows: Sequence[Row]) -> list[str]:
    """Say what it gains to give layers shares of their own."""
    text = (
        "Layers reuse their experts unequally, so that an expert's place is worth more in one layer than in another. "
        "Each budget is split where it adds the most hits, and judged on requests that it was not learned from."
    )
    known = [row for row in rows if row["gain"] is not None]
    if not known:
        return [text]
    best = max(known, key=lambda row: row["gain"])
    low = best["gain"] if best["gain_lo"] is None else best["gain_lo"]
    if low <= 0:
        return [text, "Here no budget gains by it, as far as can be told: equal parts are as good."]
    return [
        text,
        (
            f"It gains most with {best['capacity']:.4g} experts per layer: {said(best, 'hit_rate', 100)} of the "
            f"accesses hit, {figure(best, 'uniform', 100)} in equal parts."
        ),
    ]


def offloading(rows: Sequence[Row]) -> list[str]:
    """Say how many tokens per second remain, and what helps most."""
    by_mode = {row["mode"]: row for row in rows}
    first = by_mode["on_demand"]
    text = (
        f"Experts that do not fit into the device's memory are copied to it when they are needed. On "
        f"{first['hardware'] or 'this machine'}, over a link of {first['link'] / 1e9:.3g} GB/s and for one request, a "
        f"token that copies all of its experts takes {number(first['tpot_ms'])} ms, {_per_second(first)} tokens per "
        f"second, of which the device computes for {number(first['compute_ms'])} ms."
    )
    if "cache" in by_mode:
        row = by_mode["cache"]
        text += (
            f" With {row['capacity']} experts of each layer in a cache ({row['policy']}) it takes "
            f"{_duration(row)}, {_per_second(row)} tokens per second."
        )
    ahead = by_mode.get("cache+prefetch") or by_mode.get("prefetch")
    if ahead is None:
        return [text]
    cache = "and the cache" if ahead["mode"] == "cache+prefetch" else "alone"
    return [
        text,
        (
            f"With what the predictor “{ahead['predictor']}” foretells copied ahead, {cache}, it takes "
            f"{_duration(ahead)}, {_per_second(ahead)} tokens per second."
        ),
    ]


def _duration(row: Row) -> str:
    low, high = row["tpot_ms_lo"], row["tpot_ms_hi"]
    if low is None or high is None or low == high:
        return f"{number(row['tpot_ms'])} ms"
    value, low, high = (number(end, (row["tpot_ms_hi"] - row["tpot_ms_lo"]) / 2) for end in (row["tpot_ms"], low, high))
    return f"{value} ms (95 % interval {low} to {high})"


def _per_second(row: Row) -> str:
    rate = 1e3 / row["tpot_ms"]
    return number(rate) if rate < 1e3 else count(round(rate))


def cache(rows: Sequence[Row], meta: TraceMeta) -> list[str]:
    """Say what an LRU cache of half the experts hits, beside the best that any policy could."""
    text = (
        "Where the experts do not fit into the fast memory, a cache keeps some of them there. A token's experts of a "
        "layer are looked up together; a first touch is a miss."
    )
    by_policy: dict[str, dict[float, Row]] = {}
    for row in rows:
        if row["hit_rate"] is not None:
            by_policy.setdefault(row["policy"], {})[row["capacity"]] = row
    both = sorted(by_policy.get("lru", {}).keys() & by_policy.get("belady", {}).keys())
    if not both:
        return [text]
    size = min(both, key=lambda capacity: abs(capacity - meta.num_experts / 2))
    lru, best = by_policy["lru"][size], by_policy["belady"][size]
    return [
        text,
        (
            f"With room for {size:g} of the {meta.num_experts} experts of a layer, evicting the least recently "
            f"used hits {said(lru, 'hit_rate', 100)} of the accesses; the best possible policy, which knows the "
            f"future, {figure(best, 'hit_rate', 100)}."
        ),
    ]


def prefetch(rows: Sequence[Row], meta: TraceMeta) -> list[str]:
    """Say which predictor foretells most of the experts."""
    text = (
        "Experts can be loaded before they are needed, if something foretells them. Predictors that learn from the "
        "trace are judged on each request by what all other requests taught them."
    )
    known = [row for row in rows if row["m"] == meta.top_k and row["recall"] is not None]
    if not known:
        return [text]
    best = max(known, key=lambda row: row["recall"])
    return [
        text,
        (
            f"If as many experts are fetched as a token needs, {meta.top_k}, the predictor "
            f"“{best['predictor']}” is "
            f"best: {said(best, 'recall', 100)} of the experts that are needed are among them."
        ),
    ]


def _drafts(row: Row) -> str:
    return f"{row['drafts']} drafted token" + ("s" if row["drafts"] > 1 else "")


METHODS = (
    Method("Verification window", "U(T) = mean |E(t) ∪ … ∪ E(t+T−1)|",
           "E(t) are the k experts of token t in one layer. Windows slide over consecutive tokens of one request and "
           "phase; every window weighs the same, and layers are averaged with equal weight."),
    Method("uniform", "N · (1 − (1 − k/N)^T)",
           "Every set of k experts is equally likely for every token, independently. The formula that is usually meant "
           "by “independent”."),
    Method("popularity", "Σ_e 1 − (1 − p_e)^T",
           "Independent tokens that choose expert e with the share p_e of tokens that the trace shows."),
    Method("label", "the same within each label", "The popularity of the request's own label, such as a domain."),
    Method("request", "Σ_e 1 − C(n − c_e, T) / C(n, T)",
           "The request's own n tokens in random order, c_e of which use expert e: the classical rarefaction curve."),
    Method("Reduction", "1 − observed / expected", "Against the baseline that is named beside it."),
    Method("What it is made of", "uniform → popularity → label → request → observed",
           "Each step's drop over the whole drop is that cause's share. Only the last, the order of tokens, is "
           "temporal correlation in the strict sense. A cause is not resolved where its interval leaves out the "
           "estimate, a label also where the data cannot tell it from none."),
    Method("Batches", "U(T, B) = Σ_e 1 − (1 − q_e)^B",
           "q_e is the share of windows that contain expert e: the exact union of B windows drawn independently."),
    Method("Expert ratio", "U(T, B) / U(1, B)",
           "The extra weight traffic of a verification, against a step of one token per request."),
    Method("Overlap", "mean |E(t) ∩ E(t+d)| / k",
           "The temporal autocorrelation of routing at lag d; ρ = (overlap − expected) / (1 − expected)."),
    Method("Load", "max / mean, exp(H)",
           "Of the tokens per expert in a layer; exp of the entropy H counts how many experts would share it evenly."),
    Method("Speedup", "S = AL / (V + D)",
           "AL tokens emitted per step, V the time of a verification and D that of the drafts, in steps without "
           "speculation; V is a roofline over the parts of the model, max(bytes / bandwidth, FLOPs / peak) each."),
    Method("Budget of experts", "Σ w of the loaded experts / Σ w",
           "The M experts of a layer with the most router weight in a window are loaded; the others' weight is lost."),
    Method("Reuse distance", "experts used since the last use, itself included",
           "The smallest LRU cache that still holds the expert (Mattson's stack distance). The working set is what the "
           "last tokens used (Denning)."),
    Method("Locality", "SRP = max over θ of 2 Σ_{c≥θ} c / (m · #{c≥θ} + Σ c)",
           "c are an expert's uses in a segment of m tokens, pooled over experts and layers: the best F1 score of "
           "keeping experts for whole segments. SCH is the hit rate of a cache that evicts what the next m tokens "
           "need least."),
    Method("Cache", "hit rate = hits / accesses",
           "All experts that a token needs in a layer are looked up together, then updated together; none of them "
           "evicts another. Belady evicts what is needed again last: the optimum for experts of one size."),
    Method("Layers' shares of a cache", "the next expert to the layer that gains most hits",
           "By the layers' LRU curves, no layer with fewer than k; hit rates are of requests that the split was not "
           "learned from."),
    Method("Prefetch", "recall = |predicted ∩ routed| / k",
           "Of the m experts that a predictor names before the layer, averaged over tokens and layers."),
    Method("Time per token", "Σ_layers compute and copies, on two engines",
           "One engine computes layer after layer, one copies experts over the link in the order in which they are "
           "asked for; what was foretold is copied while earlier layers compute."),
    Method("Intervals", "θ ± t · se, delete-a-group jackknife",
           "Tokens of a request depend on each other, so whole requests are left out in turn, and the observed value "
           "and every baseline are computed anew. None with fewer than 5 requests, rough with fewer than 30."),
)  # fmt: skip

REFERENCES = (
    ("Cohere, Why MoE models get more from speculative decoding (2026): expert overlap, verification ratio", ""),
    ("MoESD: Unveil Speculative Decoding's Potential for Accelerating Sparse MoE (2025): target efficiency",
     "https://arxiv.org/abs/2505.19645"),
    ("Hurlbert, The Nonconcept of Species Diversity, Ecology 52 (1971): rarefaction, the baseline “request”", ""),
    (("Quenouille, Notes on bias in estimation, Biometrika 43 (1956); Busing et al., Delete-m jackknife, Statistics "
     "and Computing 9 (1999): intervals"), ""),
    ("Liang et al., Not All Models Suit Expert Offloading (2025): local routing consistency, SRP and SCH",
     "https://arxiv.org/abs/2505.16056"),
    ("Mattson et al., Evaluation techniques for storage hierarchies, IBM Systems Journal 9 (1970): stack distance", ""),
    ("Denning, The working set model for program behavior, Communications of the ACM 11 (1968)", ""),
    ("Madan et al., Speculating Experts (2026): prefetch from the hidden state, time per token",
     "https://arxiv.org/abs/2603.19289"),
    ("Leviathan et al., Fast Inference from Transformers via Speculative Decoding (2023): acceptance",
     "https://arxiv.org/abs/2211.17192"),
)  # fmt: skip
