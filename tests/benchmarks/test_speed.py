"""The speed benchmark: what it counts, claims and prints. No test looks at a time, since times are not ours to promise."""

import csv
import dataclasses
import json
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from compiling import Counting
from transformers import GenerationConfig

from apd import LeftToRight, Threshold
from apd.decoding.acceptance import Coupling, Judgement
from apd.decoding.step import APD
from benchmarks.speed import sampling, targets, versus
from benchmarks.speed.__main__ import keep, main
from benchmarks.speed.batch import Sample, bare, summary
from benchmarks.speed.floor import Rates, Size, floor_seconds, parts, weights_seconds, work
from benchmarks.speed.instruments import Clock, Forward, Meter, Timed
from benchmarks.speed.launch import PARTS, WAYS, launcher
from benchmarks.speed.measure import Plan, measure, spread
from benchmarks.speed.pairs import Loading, causal_twin, compiled, load
from benchmarks.speed.schedule import Schedule, Scheduled, ScheduledThreshold
from benchmarks.speed.settings import Setting, compared, decoder
from benchmarks.speed.table import command, entries

FIELDS = set(
    """pair strategy batch mixture_weight window_size kv_window tokens_per_second tokens_per_forward ms_per_step
    overhead_share floor_ratio drafter_ms verifier_ms mixing_ms other_ms spread peak_memory_mb accuracy
    new_tokens""".split()
)


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    """No test looks at the machine's rates."""
    monkeypatch.setattr("benchmarks.speed.floor.BUDGET", 0.01)


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", Loading())


@pytest.fixture(scope="module")
def included():
    return load("included", Loading())


def rows_at(frontiers, *, seeds=None, width=40):
    """As much of a state and its window as a schedule looks at, `width` masks each."""
    frontier = torch.tensor(frontiers)
    columns = frontier[:, None] + torch.arange(width)
    state = SimpleNamespace(
        seeds=torch.arange(len(frontier)) if seeds is None else torch.tensor(seeds),
        prompt_end=torch.zeros_like(frontier),
        frontier=frontier,
    )
    return state, SimpleNamespace(columns=columns, inside=torch.ones_like(columns, dtype=torch.bool))


def counts(schedule, state, window):
    return schedule.commits(state, window).sum(1)


def counted(pair, strategy, **knobs):
    [inputs] = pair.rows(2, 2).calls
    return pair.sampler.generate(**inputs, strategy=strategy, return_dict_in_generate=True, **pair.generation, **knobs)


def test_the_schedule_has_its_mean_and_is_the_same_again():
    # Keyed noise with fixed seeds: this cannot alarm falsely, it either holds or it does not. The tolerance is four
    # standard errors of 40,000 draws of a geometric number.
    state, window = rows_at([7] * 40_000, width=100)
    for mean in (1.5, 5.75):
        found = counts(Schedule(mean), state, window)
        assert found.min() == 1
        assert abs(found.double().mean() - mean) < 4 * (mean * (mean - 1) / len(found)) ** 0.5
        assert found.equal(counts(Schedule(mean), state, window))
    assert not counts(Schedule(5.75, seed=1), state, window).equal(counts(Schedule(5.75), state, window))


def test_the_schedule_depends_on_row_and_position_and_not_on_the_batch():
    together = counts(Schedule(), *rows_at([3, 9, 3], seeds=[4, 5, 6]))
    for i, (frontier, seed) in enumerate(((3, 4), (9, 5), (3, 6))):
        assert counts(Schedule(), *rows_at([frontier], seeds=[seed])).tolist() == [together[i]]


def test_the_schedule_is_cut_at_the_window():
    state, window = rows_at(list(range(500)), width=3)
    window.inside[:, 2] = False
    assert set(counts(Schedule(50.0), state, window).tolist()) == {1, 2}
    assert set(counts(Schedule(1.0), state, window).tolist()) == {1}
    with pytest.raises(ValueError, match="`mean` must be at least 1"):
        Schedule(0.5)


def test_a_scheduled_rule_asks_the_real_one_and_commits_the_schedule(tiny):
    asked = []

    def rule(evidence) -> Judgement:
        asked.append(evidence.draft.shape)
        return Coupling()(evidence)

    output = counted(tiny, APD(0.5, Scheduled(rule, Schedule())))
    assert len(asked) == max(output.drafter_forwards)
    assert output.verifier_forwards.equal(output.drafter_forwards)
    for seed, committed in enumerate(output.committed_per_step):
        frontier = 0
        for count in committed:
            assert count == counts(Schedule(), *rows_at([frontier], seeds=[seed], width=tiny.new_tokens - frontier))
            frontier += count
        assert frontier == tiny.new_tokens
    by_threshold = counted(tiny, ScheduledThreshold(0.9, schedule=Schedule()))
    assert by_threshold.committed_per_step == output.committed_per_step


@pytest.mark.parametrize("strategy", [APD(0.5, Coupling()), LeftToRight(1), Threshold(0.9)])
def test_a_timed_strategy_gives_the_same_tokens_and_the_meter_counts_its_forwards(included, strategy):
    meter = Meter(included.models, Clock("cpu"))
    plain = counted(included, strategy)
    with meter.attached(), meter.call():
        timed = counted(included, Timed(strategy, meter))
    assert timed.sequences.equal(plain.sequences)
    assert timed.committed_per_step == plain.committed_per_step
    for role, counts in (("drafter", plain.drafter_forwards), ("verifier", plain.verifier_forwards)):
        assert sum(forward.role == role for forward in meter.forwards) == max(counts)
    assert meter.count("propose") == max(plain.drafter_forwards)
    # Detached, it sees nothing.
    before = len(meter.forwards)
    counted(included, strategy)
    assert len(meter.forwards) == before


def test_the_meter_sees_what_a_step_computes(tiny):
    [inputs] = tiny.rows(2, 2).calls
    meter = Meter(tiny.models, Clock("cpu"))
    decode = decoder(Setting("apd", 0.5, 4, None), tiny, Schedule(), lambda inputs: 0).decode
    with meter.attached():
        decode(inputs)
    first = meter.forwards[0]
    prompt = inputs["input_ids"].shape[1]
    # The drafter recomputes prompt and masks, and projects the masks alone.
    assert first == Forward("drafter", rows=2, tokens=prompt + 4, keys=prompt + 4, projected=4)
    assert {forward.projected for forward in meter.forwards} <= {1, 2, 3, 4}


def compiled_tiny(tiny):
    torch._dynamo.reset()
    backend = Counting()
    return compiled(tiny, backend=backend, fullgraph=True), backend


@pytest.mark.slow
def test_the_meter_sees_compiled_passes_and_nothing_is_compiled_for_it(tiny):
    pair, backend = compiled_tiny(tiny)
    decode = decoder(Setting("apd", 0.5, 4, 2), pair, Schedule(), lambda inputs: 0).decode
    [inputs] = pair.rows(2, 2).calls
    runs = {role: passes.forward_slots for role, passes in pair.compiled.items()}
    meter = Meter(pair.models, Clock("cpu"), pair.compiled)
    # In the first call, attached, graphs are made, and an instrument in one of them would break it.
    with meter.attached(), meter.call():
        first = decode(inputs, meter)
    made, steps = backend.count, meter.count("propose")
    assert made > 0 and meter.unseen == 0
    assert {role: passes.forward_slots for role, passes in pair.compiled.items()} == runs
    for role in ("drafter", "verifier"):
        whole, *others = [forward for forward in meter.forwards if forward.role == role]
        assert whole.tokens < 64 and len(others) == steps - 1
        assert {(forward.rows, forward.tokens, forward.keys) for forward in others} == {(2, 64, 256)}
        assert all(1 <= forward.projected <= 4 for forward in others)
    assert meter.seconds("drafter") > 0 and meter.seconds("verifier") > 0
    assert meter.count("followed") == steps - 1
    assert 0 < meter.seconds("followed forwards") < meter.seconds("followed") < meter.seconds("call")
    with torch.compiler.set_stance("fail_on_recompile"):
        assert decode(inputs).equal(first)
        with Meter(pair.models, Clock("cpu"), pair.compiled).attached():
            assert decode(inputs).equal(first)
    assert backend.count == made
    # Where it knows nothing of the compiled passes, it says so.
    blind = Meter(pair.models, Clock("cpu"))
    with blind.attached():
        decode(inputs, blind)
    assert blind.unseen == steps - 1


def test_a_pass_that_is_not_compiled_after_all_is_counted_once(tiny):
    """It calls the modules, which are timed too."""
    pair, backend = compiled_tiny(tiny)
    [inputs] = pair.rows(2, 2).calls
    meter = Meter(pair.models, Clock("cpu"), pair.compiled)
    with torch.compiler.set_stance("force_eager"), meter.attached(), meter.call():
        decoder(Setting("apd", 0.5, 4, 2), pair, Schedule(), lambda inputs: 0).decode(inputs, meter)
    assert backend.count == 0
    assert sum(forward.role == "drafter" for forward in meter.forwards) == meter.count("propose")
    assert meter.seconds("drafter") + meter.seconds("verifier") < meter.seconds("propose") < meter.seconds("call")


def test_followed_steps_reach_from_proposal_to_proposal():
    times = iter(range(100))
    meter = Meter({"drafter": None}, SimpleNamespace(mark=lambda: next(times), seconds=lambda start, end: end - start))
    forward = meter.timed("drafter", lambda: None)
    propose = meter.timed("propose", lambda count: [forward() for _ in range(count)])
    for counts in ((1,), (3, 2, 1)):  # a call begins and ends with a mark, so do its steps and their forwards
        with meter.call():
            for count in counts:
                propose(count)
    assert meter.count("followed") == 2 and meter.seconds("followed") == (2 + 2 * 3) + (2 + 2 * 2)
    assert meter.seconds("followed forwards") == 3 + 2 and meter.seconds("drafter") == 7


def test_the_meter_keeps_no_tensor_and_leaves_the_modules_as_they_were(tiny):
    [inputs] = tiny.rows(2, 2).calls
    model = tiny.models["drafter"]
    before = [dict(vars(module)) for module in (model.base_model, model.get_output_embeddings())]
    meter = Meter(tiny.models, Clock("cpu"))
    with meter.attached():
        decoder(Setting("apd", 0.5, 4, 2), tiny, Schedule(), lambda inputs: 0).decode(inputs, meter)
    assert [vars(module) for module in (model.base_model, model.get_output_embeddings())] == before
    found = set()
    left = [meter._log]
    while left:
        each = left.pop()
        found.add(type(each))
        left += each if isinstance(each, list | tuple) else []
    assert found <= {list, tuple, torch.Size, str, float, int, type(None)}


@pytest.mark.slow
def test_compiled_settings_have_parts_and_a_floor(tiny, untraced):
    pair, _ = compiled_tiny(tiny)
    settings = [Setting("left-to-right", None, 4, 2), Setting("apd", 0.5, 4, 2), Setting("apd", 0.5, 4, None)]
    rates = Rates(1e9, 1e9, {})
    results = measure(pair, settings, Plan(count=2, repetitions=2), rates)
    for entry in entries(pair, results, batch=1, schedule=Schedule(), baseline=results[0]):
        assert entry["drafter_ms"] > 0 and entry["mixing_ms"] > 0 and entry["floor_ms"] > 0
        assert 0 < entry["step_overhead_share"] < 1 and 0 < entry["overhead_share"] < 1
        assert entry["later_ms_per_step"] > 0
    assert {role for result in results for role in (forward.role for forward in result.forwards)} == {
        "drafter",
        "verifier",
    }


def test_prefill_apart_from_decode_is_not_taken_for_unseen(tiny):
    """Rows that are refreshed have a forward of their own, so that there are more forwards than steps."""
    meter = Meter(tiny.models, Clock("cpu"))
    settings = {"max_new_tokens": 24, "eos_token_id": [], "window_size": 4, "kv_window": 4, "kv_refresh": 9}
    strategy = Timed(APD(0.5, Scheduled(Coupling(), Schedule(2.0))), meter)
    with meter.attached(), meter.call():
        ids = torch.ones(4, 400, dtype=torch.int64)
        tiny.sampler.generate(ids, attention_mask=ids, seed=[0, 1, 2, 3], strategy=strategy, **settings)
    assert sum(forward.role == "drafter" for forward in meter.forwards) > meter.count("propose")
    assert meter.unseen == 0


def test_the_floor_of_a_toy_by_hand():
    size = Size(body=100, head=20, hidden=4, layers=2, query_width=4, kv_width=2, item=2, causal=False)
    forward = Forward("drafter", rows=3, tokens=5, keys=7, projected=2)
    read = 2 * (120 + 3 * 5 * 4 + 2 * 3 * 2 * 2 * 2)  # weights, embedding rows, keys and values of two columns
    operations = 2 * 100 * 15 + 2 * 20 * 6 + 4 * (5 * 2 + 5 * 5) * 3 * 2 * 4
    assert work(size, forward) == (read, operations)
    sizes = {"drafter": size}
    assert floor_seconds(sizes, [forward], Rates(1.0, 1e9, {})) == read  # bound by reading
    assert floor_seconds(sizes, [forward], Rates(1e9, 2.0, {})) == operations / 2  # bound by arithmetic
    assert list(parts(sizes, [forward] * 2, Rates(1.0, 2.0, {}))) == [(read, operations / 2)] * 2
    assert weights_seconds(sizes | {"verifier": size}, Rates(2.0, 1.0, {"drafter": 4.0})) == 240 / 4 + 240 / 2
    assert floor_seconds(sizes, [forward] * 2, Rates(1.0, 1e9, {"drafter": 4.0})) == 2 * read / 4  # fits the cache
    causal = Size(**{**size.__dict__, "causal": True})
    assert work(causal, forward)[1] == operations - 4 * (25 - 15) * 3 * 2 * 4


def test_sizes_count_each_weight_once(tiny):
    for model in tiny.models.values():
        size, table = Size.of(model), model.get_input_embeddings().weight.numel()
        tied = model.config.tie_word_embeddings
        assert size.body + size.head + (0 if tied else table) == model.num_parameters()
    assert not Size.of(tiny.models["drafter"]).causal and Size.of(tiny.models["verifier"]).causal


def test_the_causal_twin_shares_weights_and_looks_back_only(tiny):
    drafter = tiny.models["drafter"]
    twin = causal_twin(drafter)
    assert {p.data_ptr() for p in twin.parameters()} == {p.data_ptr() for p in drafter.parameters()}
    assert twin.config.is_causal and drafter.config.is_causal is False
    assert (twin.config._attn_implementation, drafter.config._attn_implementation) == ("sdpa", "grouped_sdpa")
    assert isinstance(twin.generation_config, GenerationConfig) and twin.generation_config.eos_token_id is None
    ids = torch.tensor([[1, 2, 3], [1, 2, 9]])
    causal, both_ways = (model(ids).logits[:, 0] for model in (twin, drafter))
    assert causal[0].allclose(causal[1]) and not both_ways[0].allclose(both_ways[1])


def test_the_slow_reference_answers_as_the_library_does(included):
    [inputs] = included.rows(4, 4).calls
    answers = [
        decoder(Setting(name, 0.5), included, Schedule(), lambda inputs: 0).answers(inputs)
        for name in ("apd", "reference")
    ]
    assert answers[0].tokens == answers[1].tokens and list(answers[0].forwards) == list(answers[1].forwards)


def test_bare_forwards_have_the_shapes_that_were_seen(tiny):
    forwards = [Forward("drafter", 2, 5, 5, 3), Forward("verifier", 1, 4, 9, 6), Forward("drafter", 2, 5, 5, 3)]
    passes = bare(tiny.models, forwards)
    assert passes[0] is passes[2]
    assert [tuple(each().shape[:2]) for each in passes] == [(2, 3), (1, 6), (2, 3)]


def test_gains_are_ratios_within_a_repetition():
    # The machine is half as fast in the second repetition, which no ratio may see.
    found = [
        Sample("p", size, repetition, 8, 4, slow * seconds, slow * bare_seconds, slow * seconds, slow * bare_seconds)
        for repetition, slow in enumerate((1, 2))
        for size, seconds, bare_seconds in ((1, 8.0, 6.0), (4, 4.0, 2.0))
    ]
    one, four = summary(found)
    assert (one.gain, one.bare_gain, one.ratio, one.cpu_ratio) == (1, 1, 1, 1)
    assert (four.gain, four.bare_gain) == (2, 3)
    assert four.ratio == pytest.approx(2 / 3) and four.cpu_ratio == pytest.approx(2 / 3)


def test_settings_are_compared_on_the_same_prompts(tiny):
    rates = Rates(1e9, 1e9, {})
    settings = [Setting("left-to-right"), Setting("apd", 0.5, 4, 2), Setting("autoregressive")]
    results = measure(tiny, settings, Plan(count=3, batch=2, repetitions=2), rates)
    assert [result.tokens for result in results] == [3 * tiny.new_tokens] * 3
    assert [len(result.samples) for result in results] == [2, 2, 2]
    assert all(result.missed == 0 and result.floor > 0 and result.calls == 2 for result in results)
    sequential, apd, autoregressive = results
    assert sequential.row_forwards == autoregressive.row_forwards == 3 * tiny.new_tokens
    assert apd.row_forwards < sequential.row_forwards
    assert autoregressive.samples[0].propose is None and apd.samples[0].propose is not None
    with pytest.raises(ValueError, match="`repetitions` must be at least 1"):
        Plan(count=1, repetitions=0)


def test_the_spread_is_the_distance_of_the_quartiles():
    assert spread([4.0]) == 0
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)


@pytest.mark.slow
def test_the_last_line_is_the_report(tmp_path, capsys):
    arguments = ["--pair", "tiny", "--count", "2", "--batch", "1", "2", "--repetitions", "1", "--out", str(tmp_path)]
    assert main([*arguments, "--quick"]) == 0
    *table, last = capsys.readouterr().out.rstrip("\n").split("\n")
    assert max(map(len, table)) <= 120
    assert any("ACCEPTED COUNTS ARE NOT THE MODELS'" in line for line in table)
    report = json.loads(last)
    assert json.loads((tmp_path / "speed.json").read_text()) == report
    assert {"device", "cpu", "threads", "torch", "transformers", "python", "command", "date"} <= report.keys()
    assert report["bandwidth_gb_s"] > 0 and report["matmul_gflop_s"] > 0
    assert len(report["settings"]) == 2 * len(compared())
    for entry in report["settings"]:
        assert entry.keys() >= FIELDS
        assert entry["tokens_per_second"] > 0 and entry["floor_ratio"] > 0 and entry["accuracy"] is None
        assert entry["new_tokens"] == 24
        assert ("schedule" in entry["accepted"]) == (entry["strategy"] in ("apd", "threshold"))
        # The parts of a step are all of it.
        parts = sum(entry[f"{part}_ms"] or 0 for part in ("drafter", "verifier", "mixing", "other"))
        assert parts == pytest.approx(entry["metered_ms_per_step"], rel=1e-3)
        forwards = entry["drafter_ms"] + entry["verifier_ms"]
        assert 1 - entry["overhead_share"] == pytest.approx(forwards / entry["metered_ms_per_step"], abs=1e-3)


def test_a_terminal_is_spared_the_json(tmp_path, capsys, monkeypatch):
    keep({"settings": []}, tmp_path)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    keep({"settings": []}, None)
    line, hint = capsys.readouterr().out.splitlines()
    assert json.loads(line) == json.loads((tmp_path / "speed.json").read_text()) and "--out DIR" in hint


def test_answers_of_the_included_pair_are_judged(included):
    plan = Plan(count=2, repetitions=1, quality_count=11)
    [result] = measure(included, [Setting("left-to-right")], plan, Rates(1e9, 1e9, {}))
    assert result.judged == 11 and result.accuracy > 0.8


@pytest.mark.slow
def test_the_other_commands_leave_a_table_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = ["--out", str(tmp_path)]
    assert main(["length", "--pair", "tiny", "--lengths", "8", "40", "--steps", "2", *out]) == 0
    assert main(["batch", "--pair", "tiny", "--batch", "1", "2", "--repetitions", "1", *out]) == 0
    assert main(["window", "--pair", "tiny", "--count", "2", "--repetitions", "1", *out]) == 0
    assert json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])["settings"]
    tables = {name: list(csv.DictReader((tmp_path / f"{name}.csv").open())) for name in ("length", "batch", "window")}
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in tables)
    # With a KV window a step recomputes as much at any length, without one it recomputes the prompt.
    tokens = {(row["kv_window"], row["prompt_length"]): int(row["tokens"]) for row in tables["length"]}
    assert tokens["16", "40"] <= tokens["16", "8"] + 8 < tokens["", "40"]
    assert {row["tokens"] for row in tables["batch"]} == {"24"}
    assert [row["window_size"] for row in tables["window"]][:5] == ["4", "8", "16", "32", "all"]


def test_the_sampling_table_compares_every_way_with_greedy_decoding(tmp_path, capsys):
    sizes = ["--vocab", "64", "128", "--new-tokens", "24", "--repetitions", "1"]
    assert main(["sampling", *sizes, "--out", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out.rstrip("\n").split("\n")[-1])["points"]
    assert [(point["vocab_size"], point["way"]) for point in found] == [*product((64, 128), sampling.WAYS)]
    assert {point["ratio"] for point in found if point["way"] == "greedy"} == {1.0}
    assert all(0 < point["ms_outside"] < point["ms_per_step"] for point in found)
    assert len((tmp_path / "sampling.csv").read_text().splitlines()) == 1 + len(found)


def test_targets_are_judged_by_what_was_measured():
    def entry(ms, rate, floor):
        told = {"ms_per_step": ms, "later_ms_per_step": 0.9 * ms, "tokens_per_second": rate, "floor_ms": floor}
        return told | {"spread": 0.02}

    ours, auto = targets.OURS, targets.AUTO
    found = {("compiled", ours, 1): entry(6.0, 900.0, 4.0), ("compiled", ours, 8): entry(9.0, 4500.0, 6.0)}
    found |= {("compiled", auto, 1): entry(5.0, 800.0, 4.0), ("compiled", auto, 8): entry(6.0, 4800.0, 5.0)}
    found |= {("plain", ours, 1): entry(24.0, 200.0, 4.0), ("plain", ours, 8): entry(27.0, 1500.0, 6.0)}
    found["compiled", targets.SEQUENTIAL, 1] = entry(5.0, 200.0, 4.0)
    given = {"path": "compiled", "floor_ms": 4.0, "bound_ms": (4.5, 2.0)}
    given["agreements"] = [targets.Agreement("APD", 8, 8, tokens=100, equal=99, same=7)]
    told = targets.verdicts(found, **given, exact=True, judged=True)
    assert [target.met for target in told] == [True, False, True, False]
    assert [target.value for target in told] == pytest.approx([1.5, 1.2, 5.0, 0.99])
    assert "(a) MET: a step of 6.00 ms" in str(told[0]) and "Bytes bind" in str(told[0])
    assert (
        "5.00 × the 900 of batch 1, wanted ≥ 5; steps of their forwards' least times would gain at most 5.33 ×"
        in str(told[2])
    )
    assert "With M auto: batch 8 makes 4800 tokens/s (± 2%), 6.00 × the 800" in str(told[2])
    assert "would gain at most 6.40 ×" in str(told[2])
    assert "(b) MISSED" in str(told[1]) and "4.00 × (batch 1), 3.00 × (batch 8)" in str(told[3])
    # In other precisions rounding may move a token, and on a CPU nothing is promised.
    told = targets.verdicts(found, **given, exact=False, judged=False)
    assert [target.met for target in told] == [None] * 4 and "(a) not judged" in str(told[0])
    # Where forwards were not seen nothing is known of what they allow.
    found["compiled", auto, 8]["floor_ms"] = None
    told = targets.verdicts(found, **given, exact=False, judged=False)
    assert str(told[2]).count("would gain at most") == 1 and str(told[2]).endswith("of batch 1.")


def test_answers_agree_where_both_have_the_same_token(tiny, untraced):
    pair, _ = compiled_tiny(tiny)
    assert targets.agreement(tiny, pair, targets.OURS, 3, 2) == targets.Agreement("APD", 2, 3, 36, 36, 3)
    shorter = dataclasses.replace(tiny, new_tokens=9)
    assert targets.agreement(tiny, shorter, targets.NARROW, 1, 1) == targets.Agreement("APD M 16", 1, 1, 12, 9, 0)


def test_tokens_count_to_the_first_stop_token(tiny, monkeypatch):
    monkeypatch.setattr(tiny.sampler.drafter.generation_config, "eos_token_id", [3, 5])
    assert tiny.to_stop([1, 3, 0]) == [1, 3, 0]  # random weights have no stop token
    trained = dataclasses.replace(tiny, trained=True)
    assert trained.to_stop([1, 5, 3, 0]) == [1, 5] and trained.to_stop([1, 2]) == [1, 2]


@pytest.mark.parametrize("is_compiled", [pytest.param(False, marks=pytest.mark.slow), True])  # compiled runs both
def test_the_targets_are_one_table_their_verdicts_and_a_line(is_compiled, tmp_path, capsys, monkeypatch, untraced):
    torch._dynamo.reset()
    monkeypatch.setattr(targets, "compiled", lambda pair: compiled(pair, backend=Counting()))
    compiling = "--compile" if is_compiled else "--no-compile"
    arguments = ["--pair", "tiny", "--device", "cpu", "--new-tokens", "6", "--prompt-length", "4", compiling]
    assert main(["targets", *arguments, "--repetitions", "1", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    *text, last = printed.rstrip("\n").split("\n")
    assert max(map(len, text)) <= 120
    assert any("ACCEPTED COUNTS ARE NOT THE MODELS'" in line for line in text)
    assert (tmp_path / "targets.txt").read_text() == printed
    report = json.loads(last)
    assert json.loads((tmp_path / "targets.json").read_text()) == report
    assert {"device", "torch", "command", "dtype", "bandwidth_gb_s"} <= report.keys()
    names = "abcd"
    assert [target["name"] for target in report["targets"]] == list(names)
    assert [target["met"] for target in report["targets"]] == [None, None, None, True if is_compiled else None]
    assert [line[:3] for line in text if line[:1] == "("] == [f"({name})" for name in names]
    fields = ("path", "strategy", "window_size", "batch")
    cases = [tuple(entry[name] for name in fields) for entry in report["settings"]]
    first = "compiled" if is_compiled else "plain"
    expected = [("left-to-right", 100, 1), *(("apd", window, rows) for window in (100, "auto") for rows in (1, 8))]
    others = [("plain", "apd", 100, rows) for rows in (1, 8)] if is_compiled else []
    assert cases == [(first, *case) for case in expected] + others
    for entry in report["settings"]:
        assert entry["drafter_ms"] > 0 and entry["floor_ms"] > 0 and entry["kv_window"] == 16


@pytest.mark.slow
@pytest.mark.parametrize("role", ["drafter", "verifier"])
@pytest.mark.parametrize("way", WAYS)
def test_only_the_first_launch_is_compiled(role, way, tiny):
    """Without guards a pass would be taken for any other that is compiled by the same backend."""
    torch._dynamo.reset()
    launch = launcher(tiny, role, way)
    launch()
    with torch.compiler.set_stance("fail_on_recompile"):
        whole, *parts = launch()
    assert whole > 0 and len(parts) == (0 if way == "plain" else 3)
    assert parts == [] or sum(parts) == pytest.approx(whole)


@pytest.mark.slow
def test_launches_are_one_table_and_a_line(capsys):
    torch._dynamo.reset()
    assert main(["launch", "--layers", "1", "--repetitions", "1"]) == 0
    *table, last = capsys.readouterr().out.rstrip("\n").split("\n")
    assert max(map(len, table)) <= 120
    launches = json.loads(last)["launches"]
    assert [(each["role"], each["way"]) for each in launches] == list(product(("drafter", "verifier"), WAYS))
    for each in launches:
        assert list(each["us"]) == (["whole"] if each["way"] == "plain" else list(PARTS)) and each["layers"] == 1
        assert all(0 < low <= middle <= high for low, middle, high in each["us"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pair", "dream"], "`--pair` must be included, tiny, 100m, dream-7b or DRAFTER_DIR:VERIFIER_DIR"),
        (["--pair", "here:there"], "must name two directories with a config.json each, got 'here'"),
        (["--pair", "dream-7b"], "`--pair dream-7b` needs a GPU"),
        (["--batch", "0"], "`--batch` must be at least 1, got 0"),
        (["--mean", "0.5"], "`mean` must be at least 1, got 0.5"),
        (["targets", "--device", "cpu"], "`--pair dream-7b` needs a GPU"),
        (
            ["targets", "--device", "cpu", "--pair", "tiny", "--count", "4"],
            "`--count` must be at least 8, a batch, got 4",
        ),
        (["length", "--out", "unused", "--pair", "included"], "`--pair` must have random weights here"),
        (["sampling", "--vocab", "32"], "`--vocab` must be at least 64 ids"),
        (["launch", "--layers", "0"], "`--layers` must be at least 1, got 0"),
        (["batch", "--out", "unused", "--count", "2"], "`--count` must be at least the largest batch, 16, got 2"),
    ],
)
def test_bad_arguments_are_refused_with_the_remedy(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_report_names_no_place_of_the_machine():
    for out in (["--out", "/home/me/runs"], ["--out=/home/me/runs"], []):
        assert command("speed", ["--pair", "tiny", *out, "--batch", "1", "8"]) == "speed --pair tiny --batch 1 8"


@pytest.mark.slow
def test_a_checkout_against_itself_decodes_the_same_tokens(capsys):
    root = versus.__file__.rpartition("/benchmarks/")[0]
    settings = ["--pair", "tiny", "--rounds", "1", "--batch", "2", "--ways", "APD M 16 W 16, temperature 1"]
    assert main(["versus", "--base", root, *settings]) == 0
    _, _, decoded, helped = capsys.readouterr().out.splitlines()
    assert decoded.startswith("| tiny, batch 2, APD M 16 W 16, temperature 1 |") and decoded.count("→") == 3
    assert helped.startswith("| `apd --help` |")
