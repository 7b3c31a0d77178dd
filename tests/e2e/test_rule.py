"""A corpus whose truth is known: the tuned model must follow the rule, the base must not, and a null pair must be no
different."""
import numpy as np
import polars as pl
import pytest

from deescal.engine.run import Run
from deescal.planted import RULE
from deescal.generate import load_system, model_replies
from deescal.metrics import rouge_l_scores
from deescal.score import paired_test


@pytest.fixture(scope="module")
def answers(checkout):
    "Every model reply of the micro run beside the real one: system, reply, reference, follows (the rule)."
    run = Run("micro", 3407, checkout.root)
    systems = run.read("systems", parts=["tiny-base", "tiny-tuned"]).select("system_id", "system")
    replies = run.read("replies", parts=["tiny-base", "tiny-tuned"]).join(systems, on="system_id")
    both = replies.join(run.read("points"), on=["scenario_id", "point"])
    assert both["reference"].is_in(list(RULE.values())).all() and both.filter(system="tiny-base").height == 160
    return both.with_columns((pl.col("reply") == pl.col("reference")).alias("follows"))


def share(answers, system):
    return answers.filter(system=system)["follows"].mean()


def test_the_tuned_model_follows_the_rule_and_the_base_does_not(answers):
    assert share(answers, "tiny-tuned") >= 0.75
    assert share(answers, "tiny-base") <= 0.4, "one answer of four is right by chance"


def test_the_tuned_model_answers_the_cue_and_not_a_habit(answers):
    by_answer = answers.filter(system="tiny-tuned").group_by("reference").agg(pl.col("follows").mean())
    assert len(by_answer) == len(RULE) and by_answer["follows"].min() >= 0.5


def test_tuned_against_base_is_a_difference_and_a_null_pair_is_none(answers, checkout, tmp_path):
    run, wide = Run("micro", 3407, checkout.root), answers.sort("system", "scenario_id", "point")
    def rouge(df): return rouge_l_scores(df["reply"].to_list(), df["reference"].to_list())
    base, tuned = rouge(wide.filter(system="tiny-base")), rouge(wide.filter(system="tiny-tuned"))
    difference, p = paired_test(tuned, base)
    assert difference > 0.4 and p < 0.001
    settings = {"decoding": "sampling", "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.05,
                "max_new_tokens": 24, "length": 512, "samples": 1}
    model, form = load_system(run.folder("base", "tiny"))
    asked = run.read("points").filter(split="test")
    other = model_replies(
        model, form, run.read("messages"), asked, settings, "the same base, other random numbers", 1, tmp_path)
    null = rouge(other.join(asked, on=["scenario_id", "point"]).sort("scenario_id", "point"))
    assert not np.array_equal(null, base), "the two systems of the null pair must not be one"
    assert paired_test(null, base)[1] > 0.05


def test_every_civilian_token_is_learned_from_and_the_tables_say_so(checkout):
    run = Run("micro", 3407, checkout.root)
    coverage = run.read("coverage", parts=["tiny"])
    assert (coverage["civilian_tokens"].to_list() == coverage["supervised_tokens"].to_list()
            and coverage["civilian_tokens"].min() > 0)
    log = run.read("adapters", parts=["tiny"]).row(0, named=True)
    assert (log["best_loss"] < log["first_loss"] and log["adapter_dtype"] == "float32"
            and log["quantization"] == "nf4, double")
    report = (checkout.root / "figures/micro/report.html").read_text()
    assert "of them a target in each of" in report and "its scores mean nothing" in report
