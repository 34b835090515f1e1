"""Strategies by short names, wherever one may be given."""

import pytest
from pairs import left_padded, trace_prompts, trace_sampler

from apd import APDConfig, APDSampler, Blocks, Confidence, LeftToRight, Threshold
from apd.config import KNOBS
from apd.decoding.acceptance import Coupling, Rejection
from apd.decoding.step import APD
from apd.strategies.registry import GRAMMAR, KINDS, apd_of, parse, settle


@pytest.mark.parametrize(
    ("short", "spec", "family", "value"),
    [
        ("apd", "apd:R=0.5", "apd", 0.5),
        ("apd:R=0,correction", "apd:R=0,correction", "apd:correction", 0.0),
        ("apd:tau=.5,R=.5", "apd:R=0.5,tau=0.5", "apd:tau=0.5", 0.5),
        ("apd:R=0,M=auto", "apd:R=0,M=auto", "apd:M=auto", 0.0),
        ("apd:refresh=8,W=2", "apd:R=0.5,W=2,refresh=8", "apd:W=2,refresh=8", 0.5),
        ("apd:tau=0,R=0.3", "apd:R=0.3", "apd", 0.3),
        ("klass:0.9,h=2", "klass:0.9", "klass", 0.9),
        ("apd:rejection", "apd:R=0.5,rejection", "apd:rejection", 0.5),
        ("apd:0,first=judge,correction", "apd:R=0,correction,first=judge", "apd:correction,first=judge", 0.0),
        ("apd:first=draft", "apd:R=0.5", "apd", 0.5),
        ("confidence:2", "confidence:2", "confidence", 2.0),
        ("threshold:.90", "threshold:0.9", "threshold", 0.9),
        ("klass:0.9,h=3", "klass:0.9,h=3", "klass:h=3", 0.9),
        ("blocks:8/threshold:0.9", "blocks:8/threshold:0.9", "blocks:8/threshold", 0.9),
        ("wino:.6,length=8,revoke=.5", "wino:0.6,length=8,revoke=0.5", "wino:length=8,revoke=0.5", 0.6),
        ("wino:0.6,revoke=.9,length=128", "wino:0.6", "wino", 0.6),
        ("one-step", "one-step", "one-step", 0.0),
        ("confidence", "confidence:1", "confidence", 1.0),
        ("left-to-right", "left-to-right:1", "left-to-right", 1.0),
        ("wino", "wino:0.6", "wino", 0.6),
        ("klass:h=3;kl=.1", "klass:0.9,h=3,kl=0.1", "klass:h=3,kl=0.1", 0.9),
        ("apd:step,M=none", "apd:R=0.5,step", "apd:step", 0.5),
        ("blocks:8/confidence", "blocks:8/confidence:1", "blocks:8/confidence", 1.0),
        ("threshold:.9,least=1", "threshold:0.9", "threshold", 0.9),
        ("threshold:least=2;.5", "threshold:0.5,least=2", "threshold:least=2", 0.5),
        ("prefix", "prefix:0.9", "prefix", 0.9),
        ("prefix:.98", "prefix:0.98", "prefix", 0.98),
        ("entropy-threshold", "entropy-threshold:0.4", "entropy-threshold", 0.4),
        ("entropy-threshold:1,penalty=0", "entropy-threshold:1,penalty=0", "entropy-threshold:penalty=0", 1.0),
        ("blocks:08,aligned/prefix", "blocks:8,aligned/prefix:0.9", "blocks:8,aligned/prefix", 0.9),
        ("seeded:32/margin:2", "seeded:32/margin:2", "seeded:32/margin", 2.0),
        (
            "seeded:4;verifier; aligned/blocks:2/threshold",
            "seeded:4,aligned,verifier/blocks:2/threshold:0.9",
            "seeded:4,aligned,verifier/blocks:2/threshold",
            0.9,
        ),
    ],
)
def test_equal_settings_have_one_name(short, spec, family, value):
    setting = parse(short)
    assert (setting.spec, setting.family, setting.value) == (spec, family, value)
    again = parse(setting.spec)
    assert (again.spec, again.strategy) == (setting.spec, setting.strategy)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("greedy", "entropy-bound"),  # the error lists what there is
        ("confidance:2", "Did you mean `confidence`"),
        ("confidence:two", "a whole number"),
        ("confidence:0", "at least 1"),
        ("threshold:1.5", r"\[0, 1\]"),
        ("apd:R=2", "mixture_weight"),
        ("apd:Q=1", "no option 'Q'"),
        ("apd:correction=yes", "a bare word"),
        ("apd:tau", "a number"),
        ("apd:R=0,R=1", "twice"),
        ("apd:tau=0.5,rejection", "must be 0 with"),
        ("apd:first", "one of draft, judge"),
        ("apd:first=mine", "first must be one of draft, judge, got 'mine'"),
        ("apd:first=judge", "`correction` must be True with first='judge'"),
        ("apd:judge,correction", "no option 'judge'|must be a number"),
        ("wino:0.6,revoke=2", "revoke_below"),
        ("one-step:3", "no option"),
        ("blocks:8", "LENGTH.*/STRATEGY"),
        ("blocks:0/threshold:0.9", "LENGTH.*/STRATEGY"),
        ("blocks:8/apd", "without memory"),
        ("blocks:8/klass:0.9", "without memory"),
        ("blocks:8/wino:0.9", "without memory"),
        ("blocks:8,verifier/threshold", "blocks:LENGTH\\[,aligned\\]/STRATEGY"),
        ("seeded:8", "seeded:LENGTH.*/STRATEGY"),
        ("seeded:eight/threshold", "seeded:LENGTH.*/STRATEGY"),
        ("seeded:8,by=verifier/threshold", "seeded:LENGTH.*/STRATEGY"),
        ("seeded:8/autoregressive", "without memory"),
        ("seeded:8/seeded:4,verifier/threshold", "without memory that the drafter decides"),
        ("seded:8", "Did you mean `seeded`"),
        ("threshold:0.9,least=0", "`at_least` must be at least 1"),
        ("threshold:0.9,least=half", "least must be a whole number, got 'half'"),
        ("prefix:2", r"\[0, 1\]"),
        ("prefix:0.9,least=2", "no option 'least'"),
        ("entropy-threshold:-1", "at least 0 nats"),
        ("entropy-threshold:0.4,penalty=-1", "`penalty` must be at least 0 nats"),
    ],
)
def test_a_wrong_name_is_refused_with_the_reason(spec, told):
    with pytest.raises(ValueError, match=told):
        parse(spec)


def test_every_kind_is_in_the_grammar_and_can_be_left_without_parameters():
    for name, kind in KINDS.items():
        assert name in GRAMMAR
        assert parse(name).strategy == (None if name == "apd" else kind.make())
    spec = "apd:R=0.3,tau=0,M=7,W=5,refresh=3,first=judge,correction,step"
    wanted = APDConfig(0.3, 0, 7, 5, 3, "coupling", True, "step", "judge")
    assert APDConfig(**parse(spec).knobs) == wanted
    assert APDConfig(**parse(parse(spec).spec).knobs) == wanted
    assert {name for name, _ in [*KINDS["apd"].options.values(), *KINDS["apd"].words.values()]} == set(KNOBS)


def test_a_call_decodes_with_the_strategy_of_a_name():
    calls = {
        "confidence:2": {"strategy": Confidence(2)},
        "blocks:4/threshold:0.5": {"strategy": Blocks(Threshold(0.5), 4)},
        "apd:R=0.2,tau=0.1,M=4,correction": {
            "mixture_weight": 0.2,
            "acceptance_threshold": 0.1,
            "window_size": 4,
            "correction": True,
        },
    }
    rows = left_padded(trace_prompts()[:2]) | {"max_new_tokens": 8}
    sampler = trace_sampler()
    for spec, arguments in calls.items():
        expected = sampler.generate(**rows, **arguments)
        assert sampler.generate(**rows, strategy=spec).tolist() == expected.tolist(), spec
        named = APDSampler(sampler.drafter, sampler.verifier, strategy=spec)
        assert named.generate(**rows).tolist() == expected.tolist(), spec
        model = sampler.drafter.model
        assert model.generate(**rows, custom_generate=sampler, strategy=spec).tolist() == expected.tolist(), spec
        [answer] = sampler.generate_many([trace_prompts()[0]], strategy=spec, max_new_tokens=8)
        [alone] = sampler.generate_many([trace_prompts()[0]], max_new_tokens=8, **arguments)
        assert (answer.tokens, answer.drafter_forwards) == (alone.tokens, alone.drafter_forwards)
        chunks = sampler.stream(**rows, strategy=spec)
        assert [chunk.tokens for chunk in chunks] == [chunk.tokens for chunk in sampler.stream(**rows, **arguments)]


def test_a_sampler_with_a_strategy_decodes_with_apd_when_a_call_says_so():
    sampler = trace_sampler()
    other = APDSampler(sampler.drafter, sampler.verifier, window_size=4, strategy="left-to-right:2")
    rows = left_padded(trace_prompts()[:2]) | {"max_new_tokens": 8}
    assert other.strategy == LeftToRight(2)
    expected = sampler.generate(**rows, window_size=4)
    assert other.generate(**rows, strategy="apd").tolist() == expected.tolist()


def test_knobs_beside_a_name():
    """Those of every strategy count, those of APD alone are refused beside another one, and none is given twice."""
    assert settle("confidence:2", APDConfig(), {"window_size": 4}) == (Confidence(2), APDConfig(window_size=4))
    assert settle("apd:R=0.2", APDConfig(correction=True), {"window_size": 4}) == (
        None,
        APDConfig(mixture_weight=0.2, window_size=4, correction=True),
    )
    with pytest.raises(ValueError, match=r"`window_size` must be given once, got 4 and 'apd:M=8'"):
        settle("apd:M=8", APDConfig(), {"window_size": 4})
    for strategy, default in (("confidence", None), (Confidence(), None), (None, Confidence())):
        with pytest.raises(ValueError, match="`correction` has no effect beside `strategy`"):
            settle(strategy, APDConfig(), {"correction": True}, default=default)
        with pytest.raises(ValueError, match="`first` has no effect beside `strategy`"):
            settle(strategy, APDConfig(), {"first": "judge"}, default=default)


def test_the_rule_follows_from_the_knobs():
    assert apd_of(APDConfig(0.3, 0.2, correction=True)) == APD(0.3, Coupling(0.2, True))
    assert apd_of(APDConfig(acceptance="rejection")) == APD(0.5, Rejection())
    assert apd_of(APDConfig(acceptance="rejection", first="judge")) == APD(0.5, Rejection(), first="judge")
    assert apd_of(APDConfig(acceptance=Coupling(0.7))) == APD(0.5, Coupling(0.7))
