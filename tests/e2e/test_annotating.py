"03 with a language model on loopback: marks that have to be quoted, an answer that makes one up, nothing asked twice."
import json
import re

import polars as pl
import pytest
from conftest import papermill
from llm_server import LLMServer

from deescal.engine.tables import TABLES
from deescal.features import read_guide

SAID = {"a": ("Step out of the car, please.", "Why? What did I do?"), "b": ("Add a pinch of salt.", "And stir."),
        "c": ("Hands up!", "No.")}


@pytest.fixture
def transcribed(new_checkout):
    "A checkout in which 02 has put out three short transcripts; every second cue has an even number."
    tables = new_checkout.root / "data/runs/a/tables"
    tables.mkdir(parents=True)
    def row(table, **given):
        empty = {pl.String: "", pl.Int64: 0, pl.Float64: 0.0, pl.Boolean: True}
        return {c.name: None if c.nullable else empty[c.dtype] for c in TABLES[table].columns} | given
    cues = [row("cues", video_id=v, cue=3 * i, text=t) for v, texts in SAID.items() for i, t in enumerate(texts)]
    transcripts = [row("transcripts", video_id=v, text=" ".join(t), method="captions", status="ok") for v, t in SAID.items()]
    transcripts.append(row("transcripts", video_id="d", method="none", status="rejected", reason="no_voice"))
    for table, rows in (("cues", cues), ("transcripts", transcripts)):
        pl.DataFrame(rows, schema=TABLES[table].schema).write_parquet(tables / f"{table}.parquet")
    return new_checkout, tables


def marks(prompt, body):
    "Orders are seen where somebody says step or hands, in the line where they do; of salt the model makes one up."
    nothing = {f.feature: {"present": False, "line": None, "quote": ""} for f in read_guide()}
    found = re.search(r"^\| (\d+) (.*(?:Step|Hands).*)$", prompt, re.M)
    line, quote = (int(found[1]), found[2]) if found else (0, "put the knife down")
    return json.dumps(nothing | {"police_commands_present": {"present": True, "line": line, "quote": quote}})


def annotate(checkout, out, server):
    r = papermill(checkout, "03_annotate", out, {"OPENAI_API_KEY": "canary-key"}, run_name="a", lesson=False,
                  annotator="both", llm="openai", llm_model="m", base_url=server.openai)
    assert r.returncode == 0, r.stderr[-2000:]
    return r


def test_a_model_s_marks_stand_beside_the_lexicon_s_and_one_that_makes_up_a_quote_has_none(transcribed, tmp_path):
    checkout, tables = transcribed
    with LLMServer(answer=marks) as server:
        annotate(checkout, tmp_path / "o.ipynb", server)
        asked = len(server.calls)
        first = {p.stem: p.read_bytes() for p in tables.glob("*.parquet") if "timings" not in p.stem}
        annotate(checkout, tmp_path / "o.ipynb", server)
        assert len(server.calls) == asked, "an answer was asked for twice"
    assert {p.stem: p.read_bytes() for p in tables.glob("*.parquet") if "timings" not in p.stem} == first
    table = {name: pl.read_parquet(tables / f"{name}.parquet") for name in (
        "annotations", "features", "evidence", "feature_agreement", "annotate_calls_timings")}
    by_model = dict(table["annotations"].filter(annotator="m").select("video_id", "reason").rows())
    assert by_model == {"a": None, "b": "quote_not_in_line", "c": None, "d": "no_voice"}
    assert asked > 3 and set(table["annotate_calls_timings"]["outcome"]) == {"ok", "quote_not_in_line"}
    assert table["features"].group_by("annotator").len().sort("len")["len"].to_list() == [60, 90]
    shown = table["evidence"].filter(annotator="m").select("video_id", "line", "words").sort("video_id").rows()
    assert shown == [("a", 0, SAID["a"][0]), ("c", 0, SAID["c"][0])]
    agreed = table["feature_agreement"]
    assert set(agreed["n"]) == {2} and len(agreed) == 30
    assert "canary-key" not in "".join(p.read_text(errors="ignore") for p in checkout.root.rglob("*.json"))


def test_what_a_model_quotes_stays_out_of_the_page(transcribed, tmp_path):
    checkout, _ = transcribed
    with LLMServer(answer=marks) as server: annotate(checkout, tmp_path / "o.ipynb", server)
    outputs = json.dumps([c.get("outputs") for c in json.loads((tmp_path / "o.ipynb").read_text())["cells"]])
    assert "Hands up!" not in outputs and "Step out of the car" not in outputs
