"Every bench runs, on small input: its figures are there and are figures. How large they are is not asserted."
import csv
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from deescal.features import read_guide
from deescal.lexicon import lexicon_marks, read_rules
from deescal.read import read_folder
from deescal.roles import ROLES, assign_roles, read_weights

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "data/sample"


def gold_key(salt, file, *what):
    "As data/gold/README.md defines it, and not by the bench's own function: the gold that ships depends on it."
    return hashlib.sha256("\0".join((salt, file, *map(str, what))).encode()).hexdigest()[:24]


def write_gold(path, head, rows):
    with open(path, "w", newline="") as f:
        w = csv.writer(f)
        w.writerow(head)
        w.writerows(rows)
    return path


def column(lines, name, at):
    "The figure at a place of the line that begins with `name`, white space and table bars apart."
    line = next((x for x in lines if re.match(rf"\W*{re.escape(name)}(?!\w)", x)), None)
    assert line, f"no line {name!r} in:\n" + "\n".join(lines)
    value = float(line[line.index(name) + len(name):].replace("|", " ").split()[at].rstrip("s;,").replace(",", ""))
    assert math.isfinite(value) and value > 0, line
    return value


def score(bench, tmp):
    out = bench("2").splitlines()
    assert out[0].startswith("2 pairs, ") and "package ratio" in out[1]
    for metric, package in {
            "rouge_l": "rouge-score", "bleu_4": "sacrebleu", "meteor": "nltk", "bertscore_f1": "bert-score"}.items():
        assert package in next(x for x in out if x.startswith(metric))
        for at in (4, 5): column(out, metric, at)
        differs = float(next(x for x in out if x.startswith(metric)).split()[-1])
        # bert-score's own scores differ by as much from batch to batch (bench/score.py says why)
        assert differs < (0.02 if package == "bert-score" else 1e-6), f"{metric} is not what {package} computes"


def corpus(bench, tmp):
    folder = tmp / "few"
    folder.mkdir()
    for p in sorted(SAMPLE.glob("*.csv"))[::8]: shutil.copy2(p, folder)
    out = bench(folder, "--scale", "1", "2").splitlines()
    assert f"merging, {len(list(folder.iterdir()))} files" in out[0]
    assert float(re.search(r"ratio ([\d.]+) ", out[0])[1]) > 0
    for part in "read_folder assign_roles summarize_scenarios near_duplicates duplicate_groups audit all".split():
        assert float(next(x for x in out if x.startswith(part)).split()[1]) >= 0
    for scale in ("1", "2"): column([x for x in out if len(x.split()) == 11], scale, 7)
    assert sum("planted copies among" in x for x in out) == 2


def roles(bench, tmp):
    "The sample, labelled by the model that ships; a second reader of every other file differs at times."
    turns = assign_roles(read_folder(SAMPLE)[0])
    speakers = turns.group_by("scenario_id", "file", "speaker_label", maintain_order=True).agg(pl.col("role").first())
    files, rows = sorted(set(turns["file"])), []
    for i, (_, file, label, role) in enumerate(speakers.rows()):
        role = ROLES[i % 5] if i < 10 else role     # so that all five roles are there
        second = "" if files.index(file) % 2 else "other" if i % 9 == 0 else role
        rows.append((gold_key("deescal roles 2026", file, label), role, second, role, int(i % 4 == 0), ""))
    gold = write_gold(tmp / "roles.csv", ("key", "first", "second", "role", "mixed", "note"), rows)
    out = bench(SAMPLE, "--gold", gold, "--write")
    made = json.loads(out[:out.index("\n}") + 2])
    assert made["scenarios labelled"] == len(files) and made["speakers labelled"] == len(rows)
    for way in (
            "label, authority or civilian (as the paper)", "label, five roles", "evidence without words", "evidence"):
        line = next(x for x in out.splitlines() if x.startswith(way + "  "))
        assert 0 < float(re.search(r"accuracy of turns ([\d.]+)", line)[1]) <= 1
    assert all(f"│ {r} " in out for r in ROLES)
    written = read_weights(bench.root / "deescal/roles.json")
    assert written["made"]["speakers labelled"] == len(rows) and "NaN" not in json.dumps(written)
    assert all(len(w) == 5 for w in written["words"].values())


def features(bench, tmp):
    "The sample, of which a reader says what the lexicon does, and a second one the same but for every tenth scenario."
    turns = read_folder(SAMPLE)[0]
    marks, _ = lexicon_marks(turns.select("text", video_id="scenario_id", line="turn"))
    names = [f.feature for f in read_guide()]
    said = {v: "".join("01"[p] for p in marks.filter(video_id=v)["present"]) for v in marks["video_id"].unique()}
    rows = []
    for i, (video, file) in enumerate(turns.select("scenario_id", "file").unique(maintain_order=True).rows()):
        other = said[video].translate(str.maketrans("01", "10")) if i % 10 == 9 else said[video]
        rows.append((gold_key("deescal features 2026", file), said[video], other))
    gold = write_gold(tmp / "features.csv", ("key", "first", "second"), rows)
    out = bench(SAMPLE, "--gold", gold, "--write").splitlines()
    assert f"{len(rows)} scenarios, two readers" in out
    assert all(sum(line.startswith(f"{n} ") for line in out) == 2 for n in names)
    assert -1 <= column(out, "mean kappa, reader to reader:", 0) <= 1
    assert all(0 <= column(out, f"rule {rule}: readers keep", 0) <= len(rows) for rule in ("paper", "code"))
    assert len(read_rules(bench.root / "deescal/lexicon_rules.csv")) == 2 * len(names)
    made = json.loads((bench.root / "data/gold/features.json").read_text())
    assert made["scenarios"] == len(rows) and {m["feature"] for m in made["features"]} == set(names)


def deidentify(bench, tmp):
    "Some of the sample; marked are the names behind a title, in all turns but every third."
    folder, rows = tmp / "some", []
    folder.mkdir()
    for p in sorted(SAMPLE.glob("*.csv"))[::4]: shutil.copy2(p, folder)
    for i, (file, line, text) in enumerate(read_folder(folder)[0].select("file", "line", "text").rows()):
        found = re.finditer(r"\b(?:Officer|Deputy|Sergeant|Mr\.|Ms\.|Mrs\.) ([A-Z][a-z]+)", text)
        spans = " ".join(f"{m.start(1)}-{m.end(1)}:name" for m in found)
        key = gold_key("deescal personal data 2026", file, line)
        if spans or i % 3 == 0: rows.append((key, "measure" if i % 2 else "rules", spans))
    gold = write_gold(tmp / "personal.csv", ("key", "half", "spans"), rows)
    for args, half in ((["--write"], "measure"), (["--half", "rules", "--show"], "rules")):
        out = bench(folder, "--gold", gold, *args)
        made = json.loads(out[out.index("{\n"):])
        assert made["utterances"] == sum(r[1] == half for r in rows) and 0 < made["precision"] <= 1
        assert [t["type"] for t in made["types"]] == ["name", "all"] and 0 < made["types"][1]["recall"] <= 1
        if half == "measure": assert json.loads((bench.root / "data/gold/personal.json").read_text()) == made


def jobs(bench, tmp):
    before = {"06_corpus": 8.0, "07_audit": 3.0, "gone": 1.0}
    for run, seconds in {"before": before, "after": {"06_corpus": 2.0, "07_audit": 3.0}}.items():
        (tmp / run / "jobs").mkdir(parents=True)
        for name, s in seconds.items():
            record = {"job": name, "stage": name[3:], "seconds": s, "peak_mb": 100 * s}
            (tmp / run / "jobs" / f"{name}.json").write_text(json.dumps(record))
        (tmp / run / "jobs" / "failed.failed.json").write_text('{"what": "it stopped"}')
    out = bench(tmp / "before").splitlines()
    assert [column(out, "06_corpus (corpus)", at) for at in (0, 2)] == [8, 800]
    assert [column(out, "all 3", at) for at in (0, 2)] == [12, 800]
    out = bench(tmp / "before", tmp / "after", "--parts", "--rounds", "1").splitlines()
    assert column(out, "06_corpus", 2) == 4 and column(out, "07_audit", 2) == 1
    assert column(out, "all in both: 2, 2", 2) == 2.2 and column(out, "all: 3, 2", 0) == 12
    assert "failed" not in "".join(out)
    for part in (
            "start the interpreter", "import deescal.engine.cli", "import polars", "import papermill",
            "start an ipykernel", "stop it", "papermill on one empty cell", "import torch", "import transformers"):
        column(out, part, 0)


def llm(bench, tmp):
    out = bench("--calls", "60", "--faults", "0.2", "--latency", "0.01", "--concurrency", "4").splitlines()
    assert out[0].startswith("60 questions, 4 at once") and out[-1] == "lost 0, paid twice 0"
    for line in ("bare client, no faults:", "door, no faults, nothing kept:", "door, faults, all kept:", "door, asked again:"):
        column(out, line, 0)
    assert column(out, "calls sent", 0) == column(out, "calls sent", 2) > 60


SMALL = {"llm.py": llm, "score.py": score, "corpus.py": corpus, "roles.py": roles, "features.py": features,
         "deidentify.py": deidentify,         "jobs.py": jobs}
BENCHES = sorted(p.name for p in (ROOT / "bench").glob("[!_]*.py"))     # _shared.py is none


@pytest.fixture
def run_bench(new_checkout):
    "bench, arguments -> what it did; in a copy of the project, for some write into it."
    def run(name, *args):
        command = [sys.executable, new_checkout.root / "bench" / name, *map(str, args)]
        # one thread: the benches' tests share the machine with the others
        env = new_checkout.env | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=new_checkout.root, env=env, capture_output=True, text=True)
    run.root = new_checkout.root
    return run


@pytest.mark.parametrize("name", BENCHES)
def test_bench_runs_on_small_input_and_prints_its_figures(name, run_bench, tmp_path_factory):
    assert name in SMALL, f"bench/{name} has no small input: write a function for it and add it to SMALL in {__file__}"

    def bench(*args):
        r = run_bench(name, *args)
        assert r.returncode == 0, r.stdout + r.stderr
        return r.stdout
    bench.root = run_bench.root
    SMALL[name](bench, tmp_path_factory.mktemp("input"))


def test_no_small_input_is_left_of_a_bench_that_is_gone():
    assert set(SMALL) <= set(BENCHES)


@pytest.mark.parametrize("name", ["corpus.py", "roles.py", "features.py", "deidentify.py", "jobs.py"])
def test_a_folder_that_is_not_there_is_named_with_a_remedy(name, run_bench):
    r = run_bench(name, "/no/such/transcripts")
    assert r.returncode == 1 and "Traceback" not in r.stderr, r.stderr
    assert "where:  /no/such/transcripts" in r.stderr and "remedy: " in r.stderr and not r.stdout


@pytest.mark.parametrize("name", ["roles.py", "features.py", "deidentify.py"])
def test_transcripts_that_the_gold_does_not_know_are_refused(name, run_bench):
    r = run_bench(name, "data/planted")
    assert r.returncode == 1 and "Traceback" not in r.stderr, r.stderr
    assert re.search(r"where:  data/planted, \S+data/gold/(roles|features|personal)\.csv", r.stderr), r.stderr
