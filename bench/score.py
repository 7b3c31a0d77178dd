"""How much is won by scoring all pairs in one call? Ratios of one run on one machine: python bench/score.py [PAIRS]

Per metric: seconds for one call a pair (as the published scorer does), for one call in all, and their ratio. The pairs
are the sample's points with the civilian's previous reply.
"""
import sys
import time

from deescal.audit import duplicate_groups
from deescal.engine.files import project_root
from deescal.read import read_transcripts
from deescal.roles import assign_roles
from deescal.examples import find_points, split_scenarios, to_messages
from deescal.generate import generate
from deescal.metrics import METRICS


def pairs(n):
    turns = assign_roles(read_transcripts(project_root() / "data/sample")[0])
    ids = turns["scenario_id"].unique()
    none = turns.select("scenario_id").head(0).with_columns(scenario_a="scenario_id", scenario_b="scenario_id")
    split = split_scenarios(duplicate_groups(ids, none), 3407, 0.5, 0.0)
    messages = to_messages(turns)
    points = find_points(messages, split)
    replies = generate("previous", points, messages, 3407).join(
        points, on=["scenario_id", "point"], maintain_order="left")
    return replies["reply"].to_list()[:n], replies["reference"].to_list()[:n]


def main(n):
    p, r = pairs(n)
    print(f"{len(p)} pairs\n{'metric':14}{'one by one s':>14}{'one call s':>12}{'ratio':>8}")
    for name, metric in METRICS.items():
        m = metric(keep_in_memory=True)
        m.compute(predictions=p[:2], references=r[:2])  # loads what there is to load
        start = time.perf_counter()
        for a, b in zip(p, r):
            m.compute(predictions=[a], references=[b])
        middle = time.perf_counter()
        m.compute(predictions=p, references=r)
        end = time.perf_counter()
        print(f"{name:14}{middle - start:14.2f}{end - middle:12.2f}{(middle - start) / (end - middle):8.1f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 400)
