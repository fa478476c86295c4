"""What people have measured: their own tables, vLLM's and SGLang's results, and all that is wrong with them."""

from __future__ import annotations

import contextlib
import json
import math
import statistics

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracekit.economics.calibration.benchmarks import read_benchmark
from tracekit.economics.calibration.names import NAMES, UNITS, fault_of, quantity_of
from tracekit.economics.calibration.rows import normal
from tracekit.errors import SourceError, TracekitError, UsageError

HEADER = "batch_size,drafts,tpot_ms,acceptance_length\n"
TABLE = HEADER + "1,0,8.0,\n1,3,4.0,2.5\n8,0,10.0,\n8,3,6.0,2.4\n"


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def only(measured, **options):
    [cell] = read_benchmark(measured, **options).cells
    return cell


def refuse(measured, said, kind=SourceError, **options):
    with pytest.raises(kind, match=said) as caught:
        read_benchmark(measured, **options)
    return str(caught.value)


# Tables that somebody made


def brief(benchmark):
    return [(c.batch_size, c.drafts, c.quantity, round(c.value, 9), c.acceptance_length) for c in benchmark.cells]


FOUR = [
    (1, 0, "token", 0.008, None),
    (1, 3, "token", 0.004, 2.5),
    (8, 0, "token", 0.010, None),
    (8, 3, "token", 0.006, 2.4),
]


def test_a_csv(tmp_path):
    assert brief(read_benchmark(write(tmp_path / "b.csv", TABLE))) == FOUR


@pytest.mark.parametrize(
    "text",
    [
        TABLE.replace(",", "\t"),
        TABLE.replace(",", ";"),
        "﻿" + TABLE.replace("\n", "\r\n"),
        "# made by hand\n\n" + TABLE + "\n",
        TABLE.replace("tpot_ms", "TPOT (ms)").replace("batch_size", '"Batch Size"'),
        TABLE.replace("tpot_ms", "median tpot [ms]").replace("drafts", "num_speculative_tokens"),
    ],
)
def test_the_same_in_other_hands(tmp_path, text):
    assert brief(read_benchmark(write(tmp_path / "b.txt", text))) == FOUR


def test_the_same_in_other_formats(tmp_path):
    frame = pl.read_csv(TABLE.encode())
    frame.write_parquet(tmp_path / "b.parquet")
    frame.write_ndjson(tmp_path / "b.jsonl")
    frame.write_json(tmp_path / "b.json")
    for measured in (frame, frame.rows(named=True), *(tmp_path / f"b.{s}" for s in ("parquet", "jsonl", "json"))):
        assert brief(read_benchmark(measured)) == FOUR


@pytest.mark.parametrize(
    ("column", "value", "quantity", "seconds"),
    [
        ("tpot_s", 0.004, "token", 0.004),
        ("tpot_us", 4000, "token", 0.004),
        ("ms_per_token", 4, "token", 0.004),
        ("mean_time_per_output_token_ms", "4", "token", 0.004),
        ("step_ms", 10, "step", 0.01),
        ("decode_step_time_seconds", 0.01, "step", 0.01),
        ("verify_ms", 9, "verification", 0.009),
        ("output_throughput", 2000, "token", 4 / 2000),
        ("tokens_per_second_per_user", 250, "token", 0.004),
        ("verification_ratio", 1.25, "verification ratio", 1.25),
        ("speedup", 1.9, "speedup", 1.9),
    ],
)
def test_what_a_column_says(column, value, quantity, seconds):
    cell = only({"batch_size": 4, "k": 3, "acceptance_length": 2.5, column: value})
    assert (cell.quantity, cell.value) == (quantity, pytest.approx(seconds))


def test_the_latency_of_a_request_takes_its_length():
    row = {"batch_size": 4, "latency_s": 1.28, "output_len": 128, "input_len": 512}
    cell = only(row)
    assert cell.value == pytest.approx(0.01)
    assert cell.context == 512 + 64
    message = refuse(
        {name: row[name] for name in ("batch_size", "latency_s")}, "latency_s may be of a step, a token or"
    )
    assert "output_len" in message


def test_the_step_of_a_verification_without_drafts_is_a_step():
    assert only({"batch_size": 1, "drafts": 0, "verify_ms": 5}).quantity == "step"


def test_a_window_counts_the_token_before_the_drafts():
    assert only({"batch_size": 1, "window": 4, "step_ms": 5}).drafts == 3
    assert only({"batch_size": 1, "window": 4, "drafts": 3, "step_ms": 5}).drafts == 3
    refuse({"batch_size": 1, "window": 4, "drafts": 4, "step_ms": 5}, "drafts is 4 and window is 4")


def test_rows_without_drafts_are_without_speculation():
    found = read_benchmark([{"batch_size": 1, "step_ms": 5}])
    assert found.cells[0].drafts == 0
    assert any("without speculation" in note for note in found.notes)


def test_what_is_said_beside_a_file(tmp_path):
    path = write(tmp_path / "b.csv", "tpot_ms\n4\n")
    cell = only(f"{path}:batch_size=8,drafts=3,acceptance_length=2.5")
    assert (cell.batch_size, cell.drafts, cell.acceptance_length) == (8, 3, 2.5)
    refuse(f"{path}:batch_size=8,colour=3", "'colour' is given beside the file")
    refuse(f"{path}:batch_size=8,batch_size=9", "says one thing twice", UsageError)
    path = write(tmp_path / "c.csv", TABLE)
    refuse(f"{path}:drafts=3", "drafts is 0 and drafts is 3")


def test_a_name_that_looks_like_it_is_a_file_first(tmp_path):
    path = write(tmp_path / "b.csv:drafts=3", TABLE)
    assert brief(read_benchmark(str(path))) == FOUR


def test_contexts_that_differ_by_little_are_one():
    rows = [{"batch_size": 1, "step_ms": 5, "drafts": k, "context": c} for k, c in ((0, 1000), (1, 1040), (2, 4000))]
    assert [cell.context for cell in read_benchmark(rows).cells] == [1000, 1000, 4000]


# Repetitions


def test_repetitions_are_averaged_with_their_spread():
    times = [4.0, 5.0, 4.5]
    rows = [{"batch_size": 1, "step_ms": t} for t in times]
    message = refuse(rows, "batch size 1, 0 drafts has 0.004 s a step in row 0 and 0.005 s a step in row 1")
    assert "--repeats" in message
    for cell in (
        only(rows, repeats=True),
        only([row | {"seed": i} for i, row in enumerate(rows)]),
        only([row | {"Run": f"{i}"} for i, row in enumerate(rows)]),
    ):
        assert cell.value == pytest.approx(4.5e-3)
        assert cell.repeats == 3
        assert cell.spread == pytest.approx(statistics.stdev(times) / 4.5)


def test_the_same_twice_is_no_contradiction():
    assert only([{"batch_size": 1, "step_ms": 4.0}] * 2).value == pytest.approx(4e-3)


def test_different_columns_of_one_meaning_have_to_agree():
    assert only({"batch_size": 8, "max_concurrency": 8, "step_ms": 5}).batch_size == 8
    message = refuse(
        {"batch_size": 8, "max_concurrency": 16, "step_ms": 5}, "batch_size is 8 and max_concurrency is 16"
    )
    assert "both are the batch size" in message


# What is wrong with them


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"tpot": 4}, "tpot has no unit"),
        ({"tpot_cycles": 4}, "tpot_cycles is in 'cycles', which is none of the units s, ms, us, ns"),
        ({"throughput": 4}, "throughput may be of a step, a token, a request or all requests"),
        ({"tokens_per_second": 4}, "tokens_per_second may be of"),
        ({"note": "fast"}, "the columns are batch_size, note"),
        ({"p99_tpot_ms": 4}, "no column says how long"),
        ({"tpot_ms": 4, "step_s": 4}, "tpot_ms and step_s each say"),
        ({"tpot_ms": math.nan}, "tpot_ms is nan"),
        ({"tpot_ms": math.inf}, "tpot_ms is inf"),
        ({"tpot_ms": 0}, "tpot_ms is 0; expected a positive number"),
        ({"tpot_ms": -1.5}, "tpot_ms is -1.5"),
        ({"tpot_ms": "fast"}, "tpot_ms is fast"),
        ({"tpot_ms": None}, "tpot_ms is empty"),
        ({"tpot_ms": True}, "tpot_ms is True"),
        ({"tpot_ms": 4, "batch_size": 0}, "batch_size is 0"),
        ({"tpot_ms": 4, "batch_size": 2.5}, "batch_size is 2.5; expected a whole number"),
        ({"tpot_ms": 4, "batch_size": None}, "does not say its batch size"),
        ({"tpot_ms": 4, "drafts": -1}, "drafts is -1"),
        ({"tpot_ms": 4, "drafts": 1e9}, "drafts is 1000000000.0"),
        ({"tpot_ms": 4, "drafts": 3, "acceptance_length": 5}, "acceptance length 5 with 3 drafts"),
        ({"tpot_ms": 4, "drafts": 0, "acceptance_length": 2}, "acceptance length 2 with 0 drafts"),
        ({"tpot_ms": 4, "drafts": 3, "acceptance_length": 0.5}, "acceptance_length is 0.5"),
        ({"tpot_ms": 4, "acceptance_length": 2.5}, "with speculation, but not the draft length"),
        ({"speedup": 1.5}, "a speedup but not the draft length"),
        ({"verification_ratio": 1.5, "drafts": 0}, "a verification ratio without drafts"),
        ({"latency_s": 1, "output_len": 0}, "a latency of 1 s for 0 tokens"),
    ],
)
def test_rows_that_say_too_little_or_too_much(row, said):
    refuse({"batch_size": 1} | row, said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        (HEADER, "holds no rows"),
        ("\n\n# nothing\n", "holds no rows"),
        (TABLE + "1,2\n", "b.csv:6: has 2 values"),
        (TABLE.replace("drafts", "Batch Size"), "a name twice"),
        (HEADER + '1,0,"8\n', "does not parse"),
        (b"\xff\xfe\x00b\x00a", "is not text"),
        ("[]", "holds no rows"),
        ("[1, 2]", "is int, not an object"),
        ('{"batch_size": 1,', "is not JSON"),
        ('{"Batch Size": 1, "batch_size": 2, "step_ms": 3}', "two columns 'batch_size'"),
        (b"PAR1 and no more", "cannot be read"),
    ],
)
def test_files_that_are_none(tmp_path, content, said):
    refuse(write(tmp_path / "b.csv", content), said)


def test_nothing_at_all(tmp_path):
    refuse([], "no measurements", UsageError)
    refuse([3], "measurements in a int", UsageError)
    refuse(tmp_path / "none.csv", "cannot be read")
    refuse(tmp_path, "cannot be read")
    refuse(pl.DataFrame({"batch_size": []}), "holds no rows")


def test_too_many_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("tracekit.economics.calibration.rows.MAX_ROWS", 3)
    refuse(write(tmp_path / "b.csv", TABLE), "more than 3 rows")
    monkeypatch.setattr("tracekit.economics.calibration.rows.MAX_BYTES", 10)
    refuse(tmp_path / "b.csv", "bytes")


def test_the_column_that_counts_can_be_named():
    row = {"batch_size": 4, "TPOT (ms)": 4, "step_s": 0.5}
    assert only(row, metric="TPOT (ms)").value == pytest.approx(0.004)
    assert only(row, metric="step_s").quantity == "step"
    assert "tpot_ms, step_s" in refuse(row, "the column itl_ms is not there", metric="itl_ms")
    refuse(row, "the column batch_size does not say how long", metric="batch_size")


def test_names_say_one_thing():
    """No name is both a field and a time, or of two fields."""
    aliases = [alias for names in NAMES.values() for alias in names.split()]
    assert len(aliases) == len(set(aliases))
    assert all(quantity_of(alias) is None and normal(alias) == alias for alias in aliases)
    assert all(quantity_of(f"tpot_{unit}") == ("token", seconds) for unit, seconds in UNITS.items())
    assert fault_of("tpot_ms") is None


# vLLM


def vllm_latency(latencies):
    """What ``vllm bench latency --output-json`` writes."""
    ordered = sorted(latencies)
    return {
        "avg_latency": statistics.fmean(latencies),
        "std_latency": statistics.pstdev(latencies),
        "latencies": latencies,
        "percentiles": {"10": ordered[0], "50": statistics.median(latencies), "99": ordered[-1]},
    }


def vllm_serve(concurrency=8, tpot=9.0, drafts=0, accepted=1.5, **more):
    """What ``vllm bench serve --save-result`` writes, with its speculation fields where the server speculates."""
    completed, output, steps = 200, 200 * 128, 10_000
    result = {
        "date": "20261101-120000",
        "endpoint_type": "openai",
        "backend": "openai",
        "label": None,
        "model_id": "some/model",
        "tokenizer_id": "some/model",
        "num_prompts": completed,
        "request_rate": "inf",
        "burstiness": 1.0,
        "max_concurrency": concurrency,
        "duration": completed / (concurrency or 8) * (0.1 + tpot * 1e-3 * 127),
        "completed": completed,
        "failed": 0,
        "total_input_tokens": completed * 512,
        "total_output_tokens": output,
        "request_throughput": 2.0,
        "request_goodput": None,
        "output_throughput": 800.0,
        "total_token_throughput": 4000.0,
        "max_output_tokens_per_s": 900.0,
        "max_concurrent_requests": 9,
        "mean_ttft_ms": 100.0,
        "median_ttft_ms": 90.0,
        "mean_tpot_ms": tpot,
        "median_tpot_ms": tpot * 0.98,
        "std_tpot_ms": 0.3,
        "p99_tpot_ms": tpot * 1.4,
        "mean_itl_ms": tpot * 2,
        "median_itl_ms": tpot * 2,
    }
    if drafts:
        result |= {
            "spec_decode_acceptance_rate": 100 * accepted / drafts,
            "spec_decode_acceptance_length": 1 + accepted,
            "spec_decode_num_drafts": steps,
            "spec_decode_draft_tokens": steps * drafts,
            "spec_decode_accepted_tokens": int(steps * accepted),
            "spec_decode_per_position_acceptance_rates": [accepted / drafts] * drafts,
        }
    return result | more


def test_vllm_latency(tmp_path):
    path = write(tmp_path / "latency.json", json.dumps(vllm_latency([1.0, 1.1, 1.2]), indent=4))
    refuse(path, "does not say its batch size")
    refuse(f"{path}:batch_size=8", "avg_latency may be of a step")
    cell = only(f"{path}:batch_size=8,output_len=110")
    assert (cell.batch_size, cell.drafts, cell.value) == (8, 0, pytest.approx(0.01))
    assert (cell.repeats, cell.spread) == (3, pytest.approx(0.1 / 1.1))
    assert any("prefill" in note for note in read_benchmark(f"{path}:batch_size=8,output_len=110").notes)


def test_vllm_latency_with_the_arguments_of_its_run(tmp_path):
    arguments = {
        "batch_size": 8,
        "output_len": 110,
        "input_len": 32,
        "speculative_config": {"num_speculative_tokens": 3},
    }
    record = {
        "benchmark": {"name": "vLLM benchmark", "extra_info": {"args": arguments}},
        "model": {"name": "some/model"},
        "metric": {"name": "latency", "benchmark_values": [1.0, 1.1, 1.2], "extra_info": {"avg_latency": 1.1}},
    }
    cell = only(write(tmp_path / "latency.pytorch.json", json.dumps([record])))
    assert (cell.batch_size, cell.drafts, cell.value, cell.context) == (8, 3, pytest.approx(0.01), 32 + 55)
    record["metric"]["name"] = "mean_tpot_ms"
    refuse(write(tmp_path / "serve.pytorch.json", json.dumps([record])), "one metric of a benchmark of serving")
    record["metric"] |= {"name": "latency", "benchmark_values": [1.0, "x"]}
    refuse(write(tmp_path / "x.pytorch.json", json.dumps([record])), "no list of latencies")


def test_vllm_serve(tmp_path):
    files = [write(tmp_path / f"{b}-{k}.json", json.dumps(vllm_serve(b, 10.0, k))) for b in (1, 8) for k in (0, 3)]
    found = read_benchmark(files)
    assert [(c.batch_size, c.drafts, c.acceptance_length) for c in found.cells] == [
        (1, 0, None),
        (1, 3, 2.5),
        (8, 0, None),
        (8, 3, 2.5),
    ]
    assert all(c.value == pytest.approx(0.0098) and c.quantity == "token" for c in found.cells)
    assert all(c.context == 512 + 64 for c in found.cells)
    assert not any("always full" in note for note in found.notes)
    assert all(c.value == pytest.approx(0.01) for c in read_benchmark(files, metric="mean_tpot_ms").cells)


def test_vllm_serve_appended_to_one_file(tmp_path):
    lines = "\n".join(json.dumps(vllm_serve(b)) for b in (1, 2, 4))
    assert [c.batch_size for c in read_benchmark(write(tmp_path / "all.json", lines)).cells] == [1, 2, 4]


def test_a_sweep_of_vllm_as_csv(tmp_path):
    rows = [vllm_serve(b, drafts=3) | {"run_number": i} for b in (1, 8) for i in (0, 1)]
    frame = pl.DataFrame([{k: v for k, v in row.items() if not isinstance(v, list)} for row in rows])
    frame.write_csv(tmp_path / "summary.csv")
    cells = read_benchmark(tmp_path / "summary.csv").cells
    assert [(c.batch_size, c.drafts, c.repeats) for c in cells] == [(1, 3, 2), (8, 3, 2)]


def test_vllm_serve_without_what_it_takes():
    message = refuse(vllm_serve(None), "run without max_concurrency")
    assert "FILE:batch_size=8" in message
    refuse(vllm_serve(completed=0), "completed no request")
    refuse(vllm_serve(median_tpot_ms=0.0), "median_tpot_ms is 0.0")
    assert only(vllm_serve(median_tpot_ms=None)).value == pytest.approx(0.009)


def test_vllm_serve_says_what_to_know():
    assert any("3 requests of the benchmark failed" in n for n in read_benchmark(vllm_serve(failed=3)).notes)
    assert any("always full" in n for n in read_benchmark(vllm_serve(duration=200.0)).notes)
    ragged = vllm_serve(drafts=3, spec_decode_draft_tokens=25_000)
    assert any("2.50 drafts on average" in n for n in read_benchmark(ragged).notes)


# SGLang


def sglang_serving(concurrency=8, tpot=9.0, drafts=0, accept_length=None, branches=1, **more):
    """A line of the file that SGLang's ``bench_serving`` appends to."""
    server = {"model_path": "some/model", "internal_states": [{"avg_spec_accept_length": accept_length}]}
    if drafts:
        server |= {"speculative_num_steps": drafts, "speculative_num_draft_tokens": drafts + 1}
        server |= {"speculative_algorithm": "EAGLE", "speculative_eagle_topk": branches}
    return {
        "tag": None,
        "backend": "sglang",
        "dataset_name": "random",
        "request_rate": math.inf,
        "max_concurrency": concurrency,
        "sharegpt_output_len": None,
        "random_input_len": 1024,
        "random_output_len": 128,
        "random_range_ratio": 0.0,
        "server_info": server,
        "duration": 60.0,
        "completed": 200,
        "total_input_tokens": 200 * 512,
        "total_output_tokens": 200 * 64,
        "output_throughput": 800.0,
        "mean_tpot_ms": tpot,
        "median_tpot_ms": tpot * 0.98,
        "p99_tpot_ms": tpot * 1.4,
        "concurrency": (concurrency or 8) * 0.97,
        "accept_length": accept_length,
        "max_concurrent_requests": 9,
    } | more


def test_sglang_serving(tmp_path):
    lines = [sglang_serving(8), sglang_serving(8, 5.0, 3, 2.6)]
    found = read_benchmark(write(tmp_path / "sglang.jsonl", "".join(json.dumps(line) + "\n" for line in lines)))
    assert brief(found) == [(8, 0, "token", 0.00882, None), (8, 3, "token", 0.0049, 2.6)]
    # What was sent counts, not what the random data set was asked for.
    assert found.cells[0].context == 512 + 32
    assert not found.notes[1:]


def test_sglang_serving_of_trees_and_of_a_batch_that_is_not_full():
    notes = read_benchmark(sglang_serving(8, 5.0, 3, 2.6, branches=4) | {"concurrency": 3.0}).notes
    assert any("drafts were trees" in note for note in notes)
    assert any("3.0 requests were under way" in note for note in notes)


def test_sglang_serving_behind_a_router():
    result = sglang_serving(8, 5.0, 3, 2.6)
    result["server_info"] = {"prefill": [{}], "decode": [result["server_info"]]}
    assert only(result).drafts == 3


def test_sglang_one_batch():
    row = {"run_name": "default", "batch_size": 16, "input_len": 1024, "output_len": 16, "prefill_latency": 0.2}
    row |= {"prefill_throughput": 8e4, "median_decode_latency": 0.011, "median_decode_throughput": 1454.5}
    row |= {"total_latency": 0.4, "overall_throughput": 4e4}
    cell = only(row)
    assert (cell.batch_size, cell.drafts, cell.quantity, cell.value) == (16, 0, "step", 0.011)
    assert cell.context == 1024 + 8


def one_batch_server(**more):
    row = {"run_name": "default", "batch_size": 16, "input_len": 1024, "output_len": 101, "latency": 1.5}
    row |= {"input_throughput": 1e4, "output_throughput": 1616.0, "overall_throughput": 3e3, "last_ttft": 0.5}
    row |= {"last_gen_throughput": 1600.0, "acc_length": -1, "total_output_tokens": 1616, "num_early_stopped": 0}
    return row | {"steady_state_output_throughput": None, "steady_state_window_s": None, "cache_hit_rate": None} | more


def test_sglang_one_batch_server():
    cell = only(one_batch_server())
    assert (cell.batch_size, cell.drafts, cell.value) == (16, 0, pytest.approx(1.0 / 100))
    cell = only(one_batch_server(steady_state_output_throughput=1500.0, acc_length=2.5, drafts=3))
    assert (cell.drafts, cell.acceptance_length, cell.value) == (3, 2.5, pytest.approx(16 / 1500))
    refuse(one_batch_server(acc_length=2.5), "acceptance length 2.5, so it was measured with speculation")
    refuse(one_batch_server(last_ttft=1.6), "the first after 1.6 s")


# Damage

WHOLE = [
    TABLE.encode(),
    json.dumps([vllm_serve(8, drafts=3), vllm_serve(1)]).encode(),
    json.dumps(vllm_latency([1.0, 1.2]) | {"batch_size": 8, "output_len": 100}).encode(),
    (json.dumps(sglang_serving(8, 5.0, 3, 2.6)) + "\n" + json.dumps(one_batch_server())).encode(),
]


@given(data=st.data())
def test_damage_raises_nothing_else(tmp_path_factory, data):
    whole = bytearray(data.draw(st.sampled_from(WHOLE)))
    for _ in range(data.draw(st.integers(0, 5))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = write(tmp_path_factory.mktemp("f") / "x", bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    with contextlib.suppress(TracekitError):
        read_benchmark(path)


values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.lists(st.floats(), max_size=2)
)
FIELDS = """
batch_size drafts window tpot_ms avg_latency latencies output_len duration completed median_tpot_ms repeat speedup
max_concurrency last_gen_throughput output_throughput latency last_ttft server_info benchmark metric accept_length
median_decode_latency spec_decode_num_drafts spec_decode_draft_tokens total_output_tokens mean_ttft_ms mean_tpot_ms
"""
names = st.sampled_from(FIELDS.split())


@given(st.lists(st.dictionaries(names, values, max_size=8), min_size=1, max_size=3))
def test_any_row_is_read_or_refused(rows):
    with contextlib.suppress(TracekitError):
        for cell in read_benchmark(rows).cells:
            assert 0 < cell.value < math.inf
            assert cell.batch_size >= 1
            assert cell.drafts >= 0
