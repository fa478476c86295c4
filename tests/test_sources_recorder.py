"""SGLang's expert distribution recorder: passes put back into requests, drafts kept, counts."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchzip import View, Writer, archive, save

from tracekit.errors import SourceError, TracekitError
from tracekit.sources import IngestOptions, open_source

LAYERS, DENSE, K, N = 4, (0,), 3, 12
MOE = [layer for layer in range(LAYERS) if layer not in DENSE]
EXTEND, DECODE, MIXED, IDLE, VERIFY, DRAFT = 1, 2, 3, 4, 5, 6
IDENTITY = np.tile(np.arange(N), (LAYERS, 1))
REPLICAS = np.stack([np.random.default_rng(layer).permutation([*range(N), 3, 5]) for layer in range(LAYERS)])


def routing(tokens, seed):
    """Logical ids [tokens, MoE layers, k]."""
    return np.argsort(np.random.default_rng(seed).random((tokens, len(MOE), N)), axis=2)[..., :K]


class Recorder:
    """Writes forward passes as the engine does: layer-major, eight columns, physical ids, -1 for nothing."""

    def __init__(self, location=IDENTITY):
        self.location = location
        self.records = []
        self.random = np.random.default_rng(0)

    def physical(self, logical):
        """Any replica of each logical expert [rows, MoE layers, k] -> [layers, rows, 8]."""
        table = np.full((LAYERS, len(logical), 8), -1, np.int32)
        for entry, layer in enumerate(MOE):
            for row, experts in enumerate(logical[:, entry]):
                table[layer, row, :K] = [self.random.choice(np.flatnonzero(self.location[layer] == e)) for e in experts]
        return table

    def add(self, mode, rows, lens=None, ids=None):
        """One pass over ``rows`` of (token, position, logical ids [MoE layers, k])."""
        logical = np.array([ids for _, _, ids in rows]).reshape(len(rows), len(MOE), K)
        table = self.physical(logical)
        counts = np.zeros(self.location.shape, np.int32)
        for layer in MOE:
            np.add.at(counts[layer], table[layer, :, :K].reshape(-1), 1)
        self.records.append(
            {
                "forward_pass_id": len(self.records),
                "rank": 0,
                "gatherer_key": "primary",
                "input_ids": [int(token) for token, _, _ in rows],
                "positions": [int(position) for _, position, _ in rows],
                "extend_seq_lens": lens,
                "forward_mode": mode,
                "topk_ids_of_layer": View(table),
                "misc_objects": [],
                "global_physical_count": View(counts),
            }
        )

    def save(self, path):
        return save(path, {"records": self.records, "last_physical_to_logical_map": View(self.location)})


class Request:
    def __init__(self, number, prompt, output, cached=0):
        self.prompt, self.output, self.cached = prompt, output, cached
        self.ids = routing(prompt + output - 1, number)
        self.tokens = 1000 * (number + 1) + np.arange(prompt + output)

    def rows(self, start, end):
        return [(self.tokens[i], i, self.ids[i]) for i in range(start, end)]


def serve(recorder, waves, chunk=1 << 30, mixed=False):
    """Run requests as SGLang does: prefill (in chunks), then decode passes of all that run."""
    running, waiting = [], [list(wave) for wave in waves]
    while waiting or running:
        if waiting:
            queue = waiting.pop(0)
            starts = {id(request): request.cached for request in queue}
            while queue:
                batch, left = [], chunk
                while queue and left:
                    request = queue[0]
                    count = min(left, request.prompt - starts[id(request)])
                    batch.append((request, starts[id(request)], count))
                    starts[id(request)] += count
                    left -= count
                    if starts[id(request)] == request.prompt:
                        queue.pop(0)
                rows = [row for request, start, count in batch for row in request.rows(start, start + count)]
                lens = [count for _, _, count in batch]
                done = [request for request, start, count in batch if start + count == request.prompt]
                for request in done:
                    request.at = request.prompt
                if mixed and running:
                    rows += [row for request in running for row in request.rows(request.at, request.at + 1)]
                    recorder.add(MIXED, rows, lens + [1] * len(running))
                    for request in running:
                        request.at += 1
                    running = done + running
                else:
                    recorder.add(EXTEND, rows, lens)
                    running = running + done
                running = [r for r in running if r.at < r.prompt + r.output - 1]
        if running:
            recorder.add(DECODE, [row for request in running for row in request.rows(request.at, request.at + 1)])
            for request in running:
                request.at += 1
            running = [r for r in running if r.at < r.prompt + r.output - 1]


def read(path, **options):
    source = open_source([path], IngestOptions(**options))
    requests = list(source.requests())
    assert source.done_bytes == source.total_bytes
    return source, requests


def refuse(path, said, **options):
    with pytest.raises(SourceError, match=said):
        read(path, **options)


def expect(requests, wanted):
    assert len(requests) == len(wanted)
    for found, request in zip(requests, wanted, strict=True):
        assert (found.first_pos, found.prompt_len) == (request.cached, request.prompt)
        assert (found.ids == request.ids[request.cached :]).all()
        assert found.token_ids.tolist() == request.tokens[request.cached : -1].tolist()


# per_token


@pytest.mark.parametrize("location", [IDENTITY, REPLICAS])
def test_one_batch(tmp_path, location):
    recorder = Recorder(location)
    wanted = [Request(0, 5, 4), Request(1, 7, 6), Request(2, 3, 2)]
    serve(recorder, [wanted])
    source, requests = read(recorder.save(tmp_path / "expert_distribution_recorder_1.5_0.pt"))
    expect(requests, wanted)
    meta = source.meta
    assert (meta.source_format, meta.engine, meta.id_space) == ("sglang-recorder", "sglang", "logical")
    assert (meta.num_experts, meta.top_k, meta.layers, meta.drafts_included) == (N, K, (1, 2, 3), False)
    assert meta.extra["recorded_id_space"] == "physical"
    assert any("last map" in note for note in source.notes) == (location is REPLICAS)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=5, unique_by=lambda s: s[0]),
    chunk=st.sampled_from([1 << 30, 8, 3]),
    mixed=st.booleans(),
    data=st.data(),
)
def test_what_is_told_is_right(tmp_path_factory, shapes, chunk, mixed, data):
    """Whatever the schedule, each sequence is a piece of one request; without equal positions it is the whole."""
    recorder = Recorder()
    wanted = [Request(i, prompt + 1, output) for i, (prompt, output) in enumerate(shapes)]
    cut = data.draw(st.integers(0, len(wanted)))
    serve(recorder, [wave for wave in (wanted[:cut], wanted[cut:]) if wave], chunk, mixed)
    path = recorder.save(tmp_path_factory.mktemp("r") / "x.pt")
    source, requests = read(path)
    if source.meta.histogram:
        return
    by_token = {int(token): (request, i) for request in wanted for i, token in enumerate(request.tokens)}
    for found in requests:
        request, at = by_token[int(found.token_ids[0])]
        assert at == found.first_pos
        assert (found.ids == request.ids[at : at + len(found.ids)]).all()
        assert found.token_ids.tolist() == request.tokens[at : at + len(found.ids)].tolist()
    if not any("cut where requests" in note for note in source.notes):
        assert sum(len(found.ids) for found in requests) == sum(len(request.ids) for request in wanted)


def test_chunks_and_prefix_hits(tmp_path):
    recorder = Recorder()
    wanted = [Request(0, 20, 3), Request(1, 9, 5, cached=4), Request(2, 15, 2)]
    serve(recorder, [wanted], chunk=8)
    expect(read(recorder.save(tmp_path / "x.pt"))[1], wanted)


def test_mixed_passes(tmp_path):
    recorder = Recorder()
    wanted = [Request(0, 5, 9), Request(1, 8, 9), Request(2, 13, 3), Request(3, 4, 4)]
    serve(recorder, [wanted[:2], wanted[2:]], mixed=True)
    assert any(record["forward_mode"] == MIXED for record in recorder.records)
    expect(read(recorder.save(tmp_path / "x.pt"))[1], wanted)


def test_a_mixed_pass_of_single_rows(tmp_path):
    """The last chunk of a prompt and a decode row, both one row at position 5: the prompt comes first."""
    recorder = Recorder()
    a, b = Request(0, 5, 3), Request(1, 6, 3)
    recorder.add(EXTEND, [*a.rows(0, 5), *b.rows(0, 5)], [5, 5])
    recorder.add(MIXED, [*b.rows(5, 6), *a.rows(5, 6)], [1, 1])
    recorder.add(DECODE, [*b.rows(6, 7), *a.rows(6, 7)])
    recorder.add(DECODE, b.rows(7, 8))
    _, requests = read(recorder.save(tmp_path / "x.pt"))
    for found, request in zip(requests, (a, b), strict=True):
        assert (found.ids == request.ids[: len(found.ids)]).all()
        assert len(found.ids) >= request.prompt + 1


def test_equal_positions_stay_apart_while_all_run(tmp_path):
    recorder = Recorder()
    wanted = [Request(i, 6, 5) for i in range(4)]
    serve(recorder, [wanted])
    expect(read(recorder.save(tmp_path / "x.pt"))[1], wanted)


def test_equal_positions_are_cut_where_one_ends(tmp_path):
    """Positions 8 of two requests, then one row at position 9: whose it is nobody knows."""
    recorder = Recorder()
    wanted = [Request(0, 6, 4), Request(1, 6, 9), Request(2, 20, 9)]
    serve(recorder, [wanted])
    source, requests = read(recorder.save(tmp_path / "x.pt"))
    assert [len(r.ids) for r in requests] == [9, 9, 28]
    for found, request in zip(requests, wanted, strict=True):
        assert (found.ids == request.ids[: len(found.ids)]).all()
    assert any("2 requests were cut" in note for note in source.notes)


def test_rows_that_cannot_be_put_back_become_counts(tmp_path):
    recorder = Recorder()
    wanted = [Request(0, 2, 2), Request(1, 2, 90), Request(2, 2, 90)]
    serve(recorder, [wanted])
    source, (counts,) = read(recorder.save(tmp_path / "x.pt"))
    assert source.meta.histogram
    assert any("cannot be put back into sequences" in note for note in source.notes)
    expected = np.stack(
        [np.bincount(np.concatenate([r.ids[:, e] for r in wanted]).reshape(-1), minlength=N) for e in range(3)]
    )
    assert (counts.counts == expected).all()
    assert source.meta.top_k == K


def test_requests_that_ran_before_the_recording(tmp_path):
    recorder = Recorder()
    early = Request(0, 9, 8)
    recorder.add(DECODE, early.rows(11, 12))
    recorder.add(DECODE, early.rows(12, 13))
    source, (found,) = read(recorder.save(tmp_path / "x.pt"))
    assert (found.first_pos, found.prompt_len, found.decode_start) == (11, None, None)
    assert (found.ids == early.ids[11:13]).all()
    assert any("--phase decode" in note for note in source.notes)
    _, (found,) = read(tmp_path / "x.pt", phase="decode")
    assert found.decode_start == 11


def test_draft_model_and_idle_passes_are_passed_over(tmp_path):
    recorder = Recorder()
    request = Request(0, 4, 3)
    recorder.add(EXTEND, request.rows(0, 4), [4])
    for mode, rows in ((DRAFT, request.rows(0, 4)), (DECODE, request.rows(1, 2)), (IDLE, [])):
        recorder.add(mode, rows, [4] if mode == DRAFT else None)
        recorder.records[-1]["topk_ids_of_layer"] = View(np.full((LAYERS, len(rows), 8), -1, np.int32))
    recorder.add(DECODE, request.rows(4, 5))
    recorder.add(DECODE, request.rows(5, 6))
    expect(read(recorder.save(tmp_path / "x.pt"))[1], [request])


def test_a_row_without_a_layer_is_a_hole(tmp_path):
    recorder = Recorder()
    request = Request(0, 6, 1)
    recorder.add(EXTEND, request.rows(0, 6), [6])
    table = recorder.records[0]["topk_ids_of_layer"].storage.reshape(LAYERS, 6, 8)
    table[2, 3] = -1
    source, (found,) = read(recorder.save(tmp_path / "x.pt"))
    assert found.positions.tolist() == [0, 1, 2, 4, 5]
    assert (found.ids == request.ids[[0, 1, 2, 4, 5]]).all()
    assert any("1 rows without routing" in note for note in source.notes)


# Verification steps


def verify(recorder, running, accepted, drafts=3):
    """One TARGET_VERIFY pass: a committed token and its drafts for each (request, position)."""
    rows, windows = [], []
    for (request, at), kept in zip(running, accepted, strict=True):
        window = routing(drafts + 1, 10_000 + 100 * at + request.tokens[0])
        inside = min(kept + 1, len(request.ids) - at)
        window[:inside] = request.ids[at : at + inside]
        tokens = [*request.tokens[at : at + inside], *range(drafts + 1 - inside)]
        rows += [(tokens[i], at + i, window[i]) for i in range(drafts + 1)]
        windows.append(window)
    recorder.add(VERIFY, rows)
    return windows


def test_verification_steps_keep_their_rejected_drafts(tmp_path):
    recorder = Recorder(REPLICAS)
    a, b = Request(0, 5, 20), Request(1, 9, 20)  # b's first window follows a's: [5..8][9..12]
    recorder.add(EXTEND, [*a.rows(0, 5), *b.rows(0, 9)], [5, 9])
    seen = {0: [], 1: []}
    at = [5, 9]
    for accepted in ([0, 3], [2, 1], [3, 0], [1, 1]):
        for i, window in enumerate(verify(recorder, [(a, at[0]), (b, at[1])], accepted)):
            seen[i].append((at[i], accepted[i], window))
            at[i] += accepted[i] + 1
    source, requests = read(recorder.save(tmp_path / "x.pt"))
    assert source.meta.drafts_included
    for i, (found, request) in enumerate(zip(requests, (a, b), strict=True)):
        told = seen[i][:-1]  # what the last step accepted, no later row tells
        assert found.steps.start_pos.tolist() == [start for start, _, _ in told]
        assert found.steps.n_accepted.tolist() == [kept for _, kept, _ in told]
        assert found.steps.n_rows.tolist() == [4] * 3
        assert (found.steps.ids == np.concatenate([window for *_, window in told])).all()
        assert len(found.ids) == seen[i][-1][0] + 1
        assert (found.ids == request.ids[: len(found.ids)]).all()
        assert found.prompt_len == request.prompt


def test_a_verification_step_then_plain_decoding(tmp_path):
    recorder = Recorder()
    request = Request(0, 5, 6)
    recorder.add(EXTEND, request.rows(0, 5), [5])
    verify(recorder, [(request, 5)], [1])
    recorder.add(DECODE, request.rows(7, 8))
    _, (found,) = read(recorder.save(tmp_path / "x.pt"))
    assert (found.ids == request.ids[:8]).all()
    assert (found.steps.start_pos.tolist(), found.steps.n_accepted.tolist()) == ([5], [1])


TREE = [0, 1, 1, 2, 2]


def grow(recorder, running, accepted, depths=TREE):
    """One TARGET_VERIFY pass over trees, breadth first: of the kept path it takes the last row of each depth."""
    rows, windows = [], []
    for (request, at), kept in zip(running, accepted, strict=True):
        window = routing(len(depths), 10_000 + 100 * at + request.tokens[0])
        for depth in range(kept + 1):
            window[max(i for i, d in enumerate(depths) if d == depth)] = request.ids[at + depth]
        rows += [(1, at + depth, ids) for depth, ids in zip(depths, window, strict=True)]
        windows.append(window)
    recorder.add(VERIFY, rows)
    return windows


@pytest.mark.parametrize("early", [False, True])
def test_draft_trees_keep_every_row_and_say_what_is_not_known(tmp_path, early):
    recorder = Recorder(REPLICAS)
    a, b = Request(0, 5, 20), Request(1, 9, 20)
    if not early:
        recorder.add(EXTEND, [*a.rows(0, 5), *b.rows(0, 9)], [5, 9])
    seen, at = {0: [], 1: []}, [5, 9]
    for accepted in ([0, 2], [2, 1], [1, 0], [0, 0]):
        for i, window in enumerate(grow(recorder, [(a, at[0]), (b, at[1])], accepted)):
            seen[i].append((at[i], accepted[i], window))
            at[i] += accepted[i] + 1
    source, requests = read(recorder.save(tmp_path / "x.pt"))
    assert source.meta.drafts_included
    assert any("drafts form trees" in note for note in source.notes)
    for i, (found, request) in enumerate(zip(requests, (a, b), strict=True)):
        told = seen[i][:-1]
        assert found.steps.start_pos.tolist() == [start for start, _, _ in told]
        assert found.steps.n_accepted.tolist() == [kept for _, kept, _ in told]
        assert found.steps.depths.tolist() == TREE * 3
        # Of two rows at a depth that was accepted either may be the one that was kept; the deeper ones were not.
        kept_rows = {0: [1, 0, 0, 0, 0], 1: [1, -1, -1, 0, 0], 2: [1, -1, -1, -1, -1]}
        assert found.steps.kept_rows.tolist() == [k for _, kept, _ in told for k in kept_rows[kept]]
        assert (found.steps.ids == np.concatenate([window for *_, window in told])).all()
        roots = [start for start, _, _ in seen[i]]
        committed = [*([] if early else range(request.prompt)), *roots]
        positions = found.positions if found.positions is not None else found.first_pos + np.arange(len(found.ids))
        assert positions.tolist() == committed
        assert (found.ids == request.ids[committed]).all()


def test_a_tree_with_one_row_at_a_depth_says_which_was_kept(tmp_path):
    recorder = Recorder()
    request = Request(0, 5, 20)
    recorder.add(EXTEND, request.rows(0, 5), [5])
    grow(recorder, [(request, 5)], [2], [0, 1, 2, 2])
    grow(recorder, [(request, 8)], [0], [0, 1, 2, 2])
    _, (found,) = read(recorder.save(tmp_path / "x.pt"))
    assert found.steps.kept_rows.tolist() == [1, 1, -1, -1]
    assert found.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 8]


def test_trees_of_different_sizes_have_no_order(tmp_path):
    recorder = Recorder()
    request = Request(0, 5, 9)
    recorder.add(EXTEND, request.rows(0, 5), [5])
    for at, depths in ((5, [0, 1, 1]), (6, [0, 1, 1, 2, 2])):
        grow(recorder, [(request, at)], [0], depths)
    source, _ = read(recorder.save(tmp_path / "x.pt"))
    assert source.meta.histogram
    assert any("trees of different sizes" in note for note in source.notes)


# Counts


# Several ranks


def dumped(folder, recorder, rank, time="1731398912.25", **changes):
    """The file of a rank, as its recorder names it."""
    folder.mkdir(exist_ok=True)
    records = [{**record, "rank": rank, **changes} for record in recorder.records]
    content = {"records": records, "last_physical_to_logical_map": View(recorder.location)}
    return save(folder / f"expert_distribution_recorder_{time}_{rank}.pt", content)


def served(requests, rank=0, location=REPLICAS):
    """A rank that served them: which replica of an expert it takes is its own affair."""
    recorder = Recorder(location)
    recorder.random = np.random.default_rng(rank)
    serve(recorder, [requests])
    return recorder


def two():
    return [Request(0, 5, 4), Request(1, 9, 3)]


def test_ranks_of_the_same_tokens_count_once(tmp_path):
    for rank in range(3):
        dumped(tmp_path / "r", served(two(), rank), rank, time=f"17313989{rank}.5")
    tables = [[record["topk_ids_of_layer"].storage for record in served(two(), rank).records] for rank in range(2)]
    assert any((one != other).any() for one, other in zip(*tables, strict=True))  # through other replicas
    source, requests = read(tmp_path / "r")
    expect(requests, two())
    assert [request.request_id for request in requests] == ["r/0", "r/1"]
    assert any("_1.pt, expert_distribution_recorder_173139892.5_2.pt left out" in note for note in source.notes)


def test_ranks_of_a_pipeline_are_put_together(tmp_path):
    stages = [[1], [2, 3]]
    for rank, layers in enumerate(stages):
        recorder = served(two(), rank)
        for record in recorder.records:
            table = record["topk_ids_of_layer"].storage.copy().reshape(LAYERS, -1, 8)
            table[[layer for layer in MOE if layer not in layers]] = -1
            record["topk_ids_of_layer"] = View(table)
        dumped(tmp_path / "r", recorder, rank)
    source, requests = read(tmp_path / "r")
    expect(requests, two())
    assert any("put together from several ranks: expert_distribution_recorder_" in note for note in source.notes)
    _, alone = read(next((tmp_path / "r").glob("*_1.pt")))
    assert alone[0].ids.shape[1] == 2


def test_ranks_of_other_tokens_are_requests_of_their_own(tmp_path):
    others = [Request(2, 6, 4), Request(3, 4, 2)]
    dumped(tmp_path / "r", served(two(), 0), 0)
    dumped(tmp_path / "r", served(others, 1), 1)
    _, requests = read(tmp_path / "r")
    expect(requests, two() + others)
    assert len({request.request_id for request in requests}) == 4


def test_a_rank_that_recorded_the_same_twice_ran_it_twice(tmp_path):
    for time in ("1.5", "2.5"):
        for rank in range(2):
            dumped(tmp_path / "r", served(two(), rank), rank, time=time)
    _, requests = read(tmp_path / "r")
    expect(requests, two() + two())


def test_ranks_that_contradict_each_other_are_refused(tmp_path):
    dumped(tmp_path / "r", served(two(), 0), 0)
    other = served(two(), 1)
    other.records[1]["topk_ids_of_layer"] = served([Request(5, 5, 4), Request(6, 9, 3)]).records[1]["topk_ids_of_layer"]
    dumped(tmp_path / "r", other, 1)
    refuse(tmp_path / "r", "_0.pt and .*_1.pt have the same tokens .* but route the tokens of record 1 differently")
    dumped(tmp_path / "r", served(two(), 1, IDENTITY), 1)
    refuse(tmp_path / "r", "place experts differently.*Ingest the file of one rank")


def test_a_folder_of_one_rank_is_files_like_any_other(tmp_path):
    dumped(tmp_path / "r", served(two()), 0)
    (tmp_path / "r" / "log.txt").write_text("x")
    source, requests = read(tmp_path / "r")
    expect(requests, two())
    assert any("left out: 'log.txt'" in note for note in source.notes)


def test_per_pass_ranks_add_up(tmp_path):
    for rank in range(2):
        recorder = served(two(), rank)
        for record in recorder.records:
            del record["topk_ids_of_layer"]
        dumped(tmp_path / "r", recorder, rank)
    _, records = read(tmp_path / "r")
    routed = sum(len(request.ids) for request in two()) * K
    assert [record.counts.sum(axis=1).tolist() for record in records] == [[routed] * len(MOE)] * 2


def test_per_pass_counts_are_mapped_and_added(tmp_path):
    recorder = Recorder(REPLICAS)
    wanted = [Request(0, 5, 4), Request(1, 7, 6)]
    serve(recorder, [wanted])
    for record in recorder.records:
        for key in ("topk_ids_of_layer", "input_ids", "positions", "extend_seq_lens", "forward_mode", "misc_objects"):
            del record[key]
    source, (counts,) = read(recorder.save(tmp_path / "x.pt"), top_k=K)
    ids = np.concatenate([request.ids for request in wanted])
    expected = np.stack([np.bincount(ids[:, entry].reshape(-1), minlength=N) for entry in range(len(MOE))])
    assert (counts.counts == expected).all()
    assert (source.meta.histogram, source.meta.layers, source.meta.num_experts) == (True, (1, 2, 3), N)


def test_stat_counts_are_added_over_steps(tmp_path):
    steps = np.random.default_rng(0).integers(0, 1 << 30, (5, LAYERS, N)).astype(np.int32)
    steps[3:] = 0  # the ring buffer was not full
    steps[:, 0] = 0
    content = {"rank": 0, "logical_count": View(steps), "average_utilization_rate_over_window": None}
    source, (counts,) = read(save(tmp_path / "x.pt", content))
    assert (counts.counts == steps.sum(axis=0, dtype=np.int64)[1:]).all()
    assert (source.meta.histogram, source.meta.id_space) == (True, "logical")
    assert source.meta.source_format == "sglang-recorder"


# What is wrong


def broken(path, change, location=IDENTITY):
    recorder = Recorder(location)
    serve(recorder, [[Request(0, 5, 4)]])
    content = {"records": recorder.records, "last_physical_to_logical_map": View(location)}
    change(content)
    return save(path, content)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(records=[]), "nothing was recorded"),
        (lambda c: c.update(records="x"), "no list of records"),
        (lambda c: c.update(last_physical_to_logical_map=None), "has nothing as last_physical"),
        (lambda c: c.update(last_physical_to_logical_map=View(IDENTITY[:2])), "has 4 layers"),
        (lambda c: c.update(last_physical_to_logical_map=View(IDENTITY * 2)), "leaves out experts"),
        (lambda c: c.update(last_physical_to_logical_map=View(IDENTITY - 1)), "impossible experts"),
        (lambda c: c["records"][0].update(positions=[0]), "has positions of shape"),
        (lambda c: c["records"][0].update(positions=[-1, 0, 1, 2, 3]), "negative or absurd"),
        (lambda c: c["records"][0].update(input_ids=None), "has input_ids of shape None"),
        (lambda c: c["records"][0].update(extend_seq_lens=5), "has extend_seq_lens int64 of shape"),
        (lambda c: c["records"][0].update(extend_seq_lens=View(np.ones((5, 1)))), "has extend_seq_lens float64"),
        (lambda c: c["records"][0].update(extend_seq_lens=[1] * 6), r"has extend_seq_lens int64 of shape \(6,\) for 5"),
        (lambda c: c.update(logical_count=View(np.zeros((2, 0, 8), np.int32))), "nothing was counted"),
        (lambda c: c["records"][1].update(topk_ids_of_layer="x"), "has nothing as topk_ids_of_layer"),
        (
            lambda c: c["records"][1].update(topk_ids_of_layer=View(np.full((LAYERS, 1, 8), N, np.int32))),
            "physical expert 12",
        ),
        (lambda c: c["records"][1].update(topk_ids_of_layer=View(np.full((LAYERS, 1, 8), -2, np.int32))), "expert -2"),
        (
            lambda c: c["records"][1].update(topk_ids_of_layer=View(np.full((LAYERS, 1, 2), 1, np.int32))),
            "records of 2 and 8 columns",
        ),
        (
            lambda c: [r.update(topk_ids_of_layer=View(np.full((LAYERS, 1, 8), -1, np.int32))) for r in c["records"]],
            "every id",
        ),
    ],
)
def test_dumps_that_contradict_themselves(tmp_path, change, said):
    refuse(broken(tmp_path / "x.pt", change), said)


def test_two_replicas_of_one_expert_in_a_row(tmp_path):
    """The map changed while it was recording: mapped by the last one, a row has an expert twice."""
    location = np.tile([*range(N), 3], (LAYERS, 1))

    def change(content):
        table = content["records"][0]["topk_ids_of_layer"].storage.reshape(LAYERS, 5, 8)
        table[1:, 0, :3] = [3, 12, 5]

    refuse(broken(tmp_path / "x.pt", change, location), "expert 3 twice in one row")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["records"][0].update(extend_seq_lens=[9]), "5 rows, but requests of 9 rows"),
        (lambda c: c["records"][0].update(positions=[0, 1, 2, 2, 3]), "do not follow each other"),
        (lambda c: c["records"][1].update(forward_mode=9), "forward_mode 9 without extend_seq_lens"),
    ],
)
def test_passes_without_order_become_counts(tmp_path, change, said):
    source, _ = read(broken(tmp_path / "x.pt", change))
    assert source.meta.histogram
    assert any(said in note for note in source.notes)


def test_one_pass_told_a_thousand_times(tmp_path):
    recorder = Recorder()
    serve(recorder, [[Request(0, 50, 1)]])
    writer = Writer()
    record, location = writer.one(recorder.records[0]), writer.one(View(IDENTITY))
    opcodes = b"\x80\x02}(" + writer.one("last_physical_to_logical_map") + location + writer.one("records")
    opcodes += b"](" + record + b"q\x05" + b"h\x05" * 1000 + b"eu."
    refuse(archive(tmp_path / "x.pt", opcodes, writer.storages), "told again and again")


@given(data=st.data())
def test_mutations_raise_nothing_else(tmp_path_factory, data):
    recorder = Recorder()
    a = Request(0, 3, 9)
    serve(recorder, [[Request(1, 4, 2)]])
    recorder.add(EXTEND, a.rows(0, 3), [3])
    step = data.draw(st.sampled_from([verify, grow]))
    step(recorder, [(a, 3)], [1])
    step(recorder, [(a, 5)], [1])
    writer = Writer()
    content = {"records": recorder.records, "last_physical_to_logical_map": View(IDENTITY)}
    pickled = bytearray(writer.pickle(content))
    storages = [bytearray(storage) for storage in writer.storages]
    for target in data.draw(st.lists(st.sampled_from([pickled, *storages]), min_size=1, max_size=4)):
        target[data.draw(st.integers(0, len(target) - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("f")
    dumped(folder, recorder, 0)  # the rank beside it is whole
    path = folder / "expert_distribution_recorder_2.5_1.pt"
    archive(path, bytes(pickled), [bytes(storage) for storage in storages])
    for source in (path, folder):
        with contextlib.suppress(TracekitError):
            list(open_source([source], IngestOptions()).requests())
