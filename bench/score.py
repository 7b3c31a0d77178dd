"""How much is won by scoring all pairs in one call? Ratios of one run on one machine: python bench/score.py [PAIRS]

Per metric the seconds of three ways to score the same pairs: `package`, the reference package row by row, loaded once
and asked for this metric alone; `one by one`, our metric with a call for each pair, as the published scorer calls its
own; `one call`, our metric with one call for all. Ratios: the first two over the last. `differs` is the largest
difference between the package's score of a pair and ours. (bert-score's own depend on the batch: beside longer texts a
token gets padding to match, of similarity 0, which is more than a negative one.) Least of three rounds, the ways taken
in turns; none profits from a text or a word that another has seen. The pairs are the sample's points with the
civilian's previous reply. All 400 take minutes, nearly all of them for BERTScore.
"""
import argparse
import math
import time
from types import SimpleNamespace

from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp

from _shared import script
from deescal.audit import duplicate_groups, near_duplicates
from deescal.baselines import baseline_replies
from deescal.corpus import summarize_scenarios
from deescal.engine.errors import InputError
from deescal.engine.files import project_root
from deescal.examples import find_points, split_scenarios, to_messages
from deescal.metrics import METRICS, find_encoder, load_wordnet, meteor_tokens
from deescal.read import read_folder
from deescal.roles import assign_roles

ROUNDS, SEED = 3, 3407
WARM = [("No, sir.", "I did not."), ("Yes.", "Yes, I do.")]     # loads what there is to load


def rouge_row():
    from rouge_score.rouge_scorer import RougeScorer
    scorer = RougeScorer(["rougeL"])
    return lambda p, r: scorer.score(r, p)["rougeL"].fmeasure


def bleu_row():
    "The package's own add-k leaves single words out, the published scorer does not: its counts, our last line."
    from sacrebleu.metrics import BLEU
    bleu = BLEU(smooth_method="none", effective_order=True)

    def score(p, r):
        s = bleu.sentence_score(p, [r])
        return s.bp * math.exp(sum(math.log((c + 1) / (t + 1)) for c, t in zip(s.counts, s.totals)) / 4)
    return score


def meteor_row():
    from nltk.translate.meteor_score import single_meteor_score
    synsets = load_wordnet()[0].synsets
    plain = SimpleNamespace(synsets=getattr(synsets, "__wrapped__", synsets))   # without our memory of synonyms
    return lambda p, r: single_meteor_score(meteor_tokens(r), meteor_tokens(p), wordnet=plain)


def bertscore_row():
    import torch
    from bert_score import BERTScorer
    path, layer, _ = find_encoder()
    scorer = BERTScorer(model_type=path, num_layers=layer, device="cuda" if torch.cuda.is_available() else "cpu")
    return lambda p, r: scorer.score([p], [r])[2].item() if p.strip() and r.strip() else 0.0


PACKAGES = {"rouge_l": ("rouge-score", rouge_row), "bleu_4": ("sacrebleu", bleu_row), "meteor": ("nltk", meteor_row),
            "bertscore_f1": ("bert-score", bertscore_row)}


def forget():
    "Empty what sacrebleu, NLTK and ours remember of texts and words; else the second round is a look-up."
    for tokenizer in (Tokenizer13a, TokenizerRegexp): tokenizer.__call__.cache_clear()
    wordnet = load_wordnet()[0]
    if not hasattr(wordnet, "root"): return     # there is no WordNet here
    wordnet.synsets.cache_clear()
    wordnet._synset_offset_cache.clear()


def sample_pairs(n):
    "Replies and references of `n` points; the corpus is split in halves, so that there are enough."
    turns, _, files = read_folder(project_root() / "data/sample")
    turns = assign_roles(turns)
    scenarios, groups = summarize_scenarios(turns, files), duplicate_groups(
        turns["scenario_id"].unique(), near_duplicates(turns))
    messages = to_messages(turns)
    points = find_points(messages, split_scenarios(scenarios, groups, SEED, 0.5, 0.0))
    said = baseline_replies("previous", points, messages, SEED).join(
        points, on=["scenario_id", "point"], maintain_order="left")
    if not 0 < n <= len(said):
        raise InputError(f"{n} pairs asked for", where="PAIRS", remedy=f"the sample gives 1 to {len(said)}")
    return said["reply"].to_list()[:n], said["reference"].to_list()[:n]


def least_seconds(ways):
    "Name -> (least seconds, what it gave) of some functions, over all rounds."
    best = {}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            forget()
            start = time.perf_counter()
            scores = way()
            seconds = time.perf_counter() - start
            best[name] = min(best.get(name, (seconds, scores)), (seconds, scores), key=lambda b: b[0])
    return best


def main(n):
    p, r = sample_pairs(n)
    head = ("package s", "one by one s", "one call s", "package ratio", "by one ratio", "differs")
    print(f"{len(p)} pairs, {len({*zip(p, r)})} distinct; seconds, least of {ROUNDS}\n"
          f"{'metric':14}{'package':12}" + "".join(f"{h:>15}" for h in head), flush=True)
    for name, metric in METRICS.items():
        (package, make), m = PACKAGES[name], metric(keep_in_memory=True)
        def ours(p, r): return m.compute(predictions=p, references=r)[name]
        ours(*map(list, zip(*WARM)))    # first, for it silences the bars with which a package loads its model
        row = make()
        for a, b in WARM: row(a, b)
        best = least_seconds({
            "package": lambda: [row(a, b) for a, b in zip(p, r)],
            "one by one": lambda: [ours([a], [b])[0] for a, b in zip(p, r)], "one call": lambda: ours(p, r)})
        seconds, call = {k: s for k, (s, _) in best.items()}, best["one call"][0]
        differs = max(abs(a - b) for a, b in zip(best["package"][1], best["one call"][1]))
        figures = (f"{seconds['package']:.3f}", f"{seconds['one by one']:.3f}", f"{call:.3f}",
                   f"{seconds['package'] / call:.2f}", f"{seconds['one by one'] / call:.2f}", f"{differs:.6f}")
        print(f"{name:14}{package:12}" + "".join(f"{x:>15}" for x in figures), flush=True)


if __name__ == "__main__":
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("pairs", nargs="?", type=int, default=400, metavar="PAIRS", help="how many pairs (default 400)")
    script(main, args.parse_args().pairs)
