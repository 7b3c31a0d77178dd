"Every notebook run by hand, by plain papermill: on real data no word of it shows, and a finished run is not spoilt."
import json
import subprocess
import sys

import nbformat
import polars as pl
import pytest
from conftest import papermill

from deescal.engine.notebooks import lessons, notebook_parameters, tagged
from deescal.engine.run import Run
from deescal.engine.series import read_stages

CANARY, NAME = "zebraquartz", "Quagmirella"
# what makes a stage quick; everything else is its defaults
QUICK = {
    "base": {"steps": 4, "report_steps": 2, "vocabulary": 600}, "finetune": {"epochs": 0.2, "report_steps": 2},
    "generate": {"max_new_tokens": 4}, "examples": {"test_fraction": 0.3, "validation_fraction": 0.2}}


def shown(path):
    "Everything that the cells of an executed notebook show, pictures left out."
    nb = nbformat.read(path, as_version=4)
    return json.dumps([c.get("outputs", []) for c in nb.cells if c.cell_type == "code"])


def runs_and_shows_no_word(checkout, notebook, out, **parameters):
    "Run a notebook by hand: neither what it shows nor what is said beside it holds a word of real data."
    r = papermill(checkout, notebook, out, **parameters)
    assert r.returncode == 0, f"{notebook}: {r.stderr[-2000:]}"
    text = shown(out)
    assert "Fictional" not in text and not any(w in text + r.stdout + r.stderr for w in (CANARY, NAME)), notebook


def transcripts_with_canary(checkout):
    "A corpus that is not the fiction that ships: six dialogues in which every turn holds a word to be looked for."
    folder = checkout.root / "data/canary"
    folder.mkdir()
    for k in range(6):
        rows = [f'0:{i % 60:02},{"[Officer]" if i % 2 else NAME},"{CANARY} number {k} {i}, will you {i * k} step back?"'
                for i in range(30)]
        (folder / f"youtube_{k}.csv").write_text("start_time,speaker_label,transcript\n" + "\n".join(rows) + "\n")
    return checkout


def clips_with_canary(checkout):
    """Two clips of the sample, one changed by a byte, with captions that are somebody's: cue after cue where a voice is
    heard, and a loop."""
    folder = checkout.root / "data/canary_clips"
    folder.mkdir()
    for name, more in (("youtube_9103", b""), ("youtube_9105", b"\0")):
        sound = (checkout.root / f"data/clips/{name}.ogg").read_bytes()
        (folder / f"{name}.ogg").write_bytes(sound + more)
        cues = [f"00:{i:02}.000 --> 00:{i + 1:02}.000\n{CANARY} of {NAME}, number {i}\n" for i in range(8)]
        loop = f"00:08.000 --> 00:10.000\n{f'{CANARY} {NAME} ' * 120}\n"
        (folder / f"{name}.en.vtt").write_text("\n".join(["WEBVTT\n", *cues, loop]))


@pytest.fixture(scope="module")
def canary(checkout):
    return transcripts_with_canary(checkout)


def test_no_notebook_run_by_hand_shows_a_word_of_real_data(canary, tmp_path):
    """Every stage in order, by plain papermill, with nothing but the data and a name: dialogue is hidden by default,
    and asking for it does not help."""
    for stage in read_stages(canary.root / "nbs").values():
        declared = notebook_parameters(canary.root / f"nbs/{stage.notebook}.ipynb")
        wanted = {"data": "data/canary", "show_text": True, "run_name": "canary", "lesson": False} | QUICK.get(stage.name, {})
        parts = [{"system": "baselines"}, {"system": "tiny-tuned", "model": "tiny", "source": "tiny", "variant": "tuned"},
                 {"system": "tiny-base", "model": "tiny", "source": "tiny", "variant": "base"}] \
            if stage.per == "system" else [{}]
        for part in parts:
            out = tmp_path / f"{stage.notebook}{part.get('system', '')}.ipynb"
            given = {k: v for k, v in (wanted | part).items() if k in declared}
            runs_and_shows_no_word(canary, stage.notebook, out, **given)
    data = canary.root / "data/runs/canary"
    for p in [*(canary.root / "figures/canary").rglob("*"), *(data / "cards").rglob("*"), *(data / "export").rglob("*")]:
        if p.suffix in (".json", ".csv", ".md", ".tex", ".txt", ".svg", ".html"):
            assert CANARY not in p.read_text() and NAME not in p.read_text(), p


def test_words_and_titles_of_released_dialogues_show_neither_in_03_nor_in_04(new_checkout, tmp_path):
    "A released file has a video's title in its name, and so in its identifier."
    c = transcripts_with_canary(new_checkout)
    (c.root / "data/canary/youtube_0.csv").rename(c.root / f"data/canary/tiktok_7_{CANARY}_and_{NAME}_0a1b2c3d.csv")
    given = {"run_name": "canary", "lesson": False}
    runs_and_shows_no_word(c, "03_annotate", tmp_path / "o.ipynb", given="data/canary", **given)
    runs_and_shows_no_word(c, "04_select", tmp_path / "o.ipynb", reviews="", **given)
    decisions = Run("canary", root=c.root).read("decisions")
    assert len(decisions) == 6 and decisions["video_id"].str.contains(CANARY).sum() == 1


def test_what_real_clips_and_labels_say_shows_nowhere_before_the_corpus(new_checkout, tmp_path):
    """Captions through 02 to 04, and transcripts with labels and the captions again through 05, by plain papermill; then an
    error in each whose message holds their words."""
    c = transcripts_with_canary(new_checkout)
    clips_with_canary(c)
    given = {"run_name": "canary", "lesson": False}
    out = tmp_path / "o.ipynb"
    runs_and_shows_no_word(c, "01_harvest", out, clips="data/canary_clips", **given)
    runs_and_shows_no_word(c, "02_transcribe", out, show_text=True, **given)
    runs_and_shows_no_word(c, "03_annotate", out, **given)
    runs_and_shows_no_word(c, "04_select", out, **given)
    runs_and_shows_no_word(c, "05_diarize", out, labelled="data/canary", **given)
    run = Run("canary", root=c.root)
    cues, segments = run.read("cues"), run.read("segments")
    heard = cues.filter(pl.col("heard").str.contains(CANARY))
    assert set(heard["video_id"]) == {"youtube_9103", "youtube_9105"} and "loop_cut" in heard["reason"]
    assert all(segments.filter(method=m)["text"].str.contains(CANARY).any() for m in ("local", "labelled"))
    for stage, words in (("02_transcribe", "run.read('cues')['heard']"), ("05_diarize", "run.read('segments')['text']")):
        path = c.root / f"nbs/{stage}.ipynb"
        nb = nbformat.read(path, as_version=4)
        next(cell for cell in nb.cells if cell.id == "run_it").source = f"raise KeyError(' '.join({words}))"
        nbformat.write(nb, path)
        r = papermill(c, stage, out, **given)
        assert r.returncode and "KeyError" in r.stderr and "not shown" in r.stderr, r.stderr[-2000:]
        assert not any(w in out.read_text() + r.stdout + r.stderr for w in (CANARY, NAME)), stage


def test_an_error_about_real_data_is_told_without_its_words(canary):
    "A cell that fails with a text of the data in its message: neither the message nor the notebook shows it."
    path = canary.root / "nbs/08_examples.ipynb"
    kept = path.read_text()
    nb = nbformat.read(path, as_version=4)
    next(c for c in nb.cells if c.id == "run_it").source = "raise KeyError(run.read('turns')['text'][0])"
    nbformat.write(nb, path)
    try:
        r = canary.reproduce("--run", "failing", "--data", "data/canary", "--set", "run.baselines=[tfidf]", ok=False)
    finally:
        path.write_text(kept)
    assert r.returncode and "08_examples stopped: KeyError (what it says is not shown" in r.stdout + r.stderr
    assert CANARY not in r.stdout + r.stderr
    for folder in ("figures/failing", "data/runs/failing/jobs", "data/runs/failing/params"):
        for p in (canary.root / folder).rglob("*"):
            assert p.suffix in (".png", ".parquet") or not p.is_file() or CANARY not in p.read_text(), p


@pytest.mark.parametrize("stage, cell, given", [
    ("01_harvest", "run_it", {}), ("08_examples", "run_it", {"run_name": "canary"})])
def test_an_error_by_hand_is_told_without_the_words_of_real_data(canary, tmp_path, stage, cell, given):
    "Of a chain of errors too; before the corpus nobody knows yet whose words they are."
    path, out = canary.root / f"nbs/{stage}.ipynb", tmp_path / "o.ipynb"
    kept = path.read_text()
    nb = nbformat.read(path, as_version=4)
    next(c for c in nb.cells if c.id == cell).source = (
        f"try: float('{CANARY} my wife'[:99])\nexcept ValueError as e: raise KeyError(str(e)) from e")
    nbformat.write(nb, path)
    try: r = papermill(canary, stage, out, lesson=False, **{"run_name": "by_hand_error"} | given)
    finally: path.write_text(kept)
    told = [o for c in nbformat.read(out, as_version=4).cells for o in c.get("outputs", []) if o.output_type == "error"]
    assert r.returncode and len(told) == 1 and told[0].ename == "KeyError", r.stderr[-2000:]
    assert "could not convert" not in r.stderr + str(told) and "not shown" in told[0].evalue
    assert "KeyError(str(e))" in "".join(told[0].traceback)  # the code that failed is there


def test_an_error_before_the_corpus_never_trusts_what_an_earlier_run_was_made_from(checkout):
    "The finished run's origin says fiction; the reference that is given now is somebody's words."
    rows = "".join(f"youtube_9101,{i},{i + 1},a,officer,x\n" for i in range(300))  # that start_s is taken for a number
    (checkout.root / "data/reference.csv").write_text(
        f"clip,start_s,end_s,speaker,role,text\n{rows}youtube_9101,{CANARY} my wife,1,a,officer,x\n")
    r = checkout.deescal("job", "02_transcribe", "--profile", "micro", "--set",
                         "transcribe.reference=data/reference.csv", ok=False)
    assert r.returncode and "02_transcribe stopped" in r.stderr and CANARY not in r.stdout + r.stderr
    notebook = checkout.root / "figures/micro/notebooks/02_transcribe.failed.ipynb"
    assert notebook.is_file() and CANARY not in notebook.read_text()
    checkout.reproduce()


def test_other_data_by_hand_is_refused_under_the_name_of_a_run(canary, tmp_path):
    "Else its tables, of real people, would stand beside an origin that says fiction."
    r = papermill(canary, "06_corpus", tmp_path / "o.ipynb", run_name="canary", data="data/planted", lesson=False)
    assert r.returncode and "was made from other data" in r.stderr and "run_name" in r.stderr


def test_the_same_by_hand_on_fiction_shows_it_where_it_is_asked_for(checkout, tmp_path):
    given = {"run_name": "by_hand", "data": "data/planted", "lesson": False}
    for wanted in (False, True):
        r = papermill(checkout, "06_corpus", tmp_path / "o.ipynb", show_text=wanted, **given)
        assert r.returncode == 0 and ("He is old." in shown(tmp_path / "o.ipynb")) == wanted, r.stderr[-2000:]


@pytest.mark.parametrize("parameter, value, words", [
    ("scenarios", "-5", ["06_corpus", "scenarios is -5", "0.."]),
    ("scenarios", "abc", ["scenarios is 'abc'", "of type str", "int"]),
    ("lesson", "false", ["lesson is 'false'", "True or False"])])
def test_a_wrong_parameter_by_hand_is_named(checkout, tmp_path, parameter, value, words):
    r = papermill(checkout, "06_corpus", tmp_path / "o.ipynb", **{"run_name": "by_hand", parameter: value})
    assert r.returncode and all(w in r.stderr for w in words), r.stderr[-1500:]


def test_lesson_false_by_hand_leaves_out_the_examples(checkout, tmp_path):
    r = papermill(checkout, "08_examples", tmp_path / "o.ipynb", run_name="micro", lesson=False)
    assert r.returncode == 0, r.stderr[-1500:]
    nb = nbformat.read(tmp_path / "o.ipynb", as_version=4)
    examples = [c for c in nb.cells if "example" in c.metadata.get("tags", [])]
    assert examples and not any(c.outputs for c in examples)
    checkout.reproduce()  # what was written by hand is made again


def test_a_run_by_hand_does_not_spoil_a_finished_run(checkout, tmp_path):
    "Its record is dropped, so the series makes it again, and the tables are those of the profile."
    tables, before = checkout.tables(), checkout.records()
    r = papermill(checkout, "07_audit", tmp_path / "o.ipynb", run_name="micro", lesson=False, min_shared=3)
    assert r.returncode == 0, r.stderr[-1500:]
    assert checkout.deescal("verify", "--profile", "micro", ok=False).returncode == 1
    checkout.reproduce()
    assert checkout.ran(before) == {"07_audit"} and checkout.tables() == tables


def test_a_kernel_holds_the_run_for_as_long_as_it_lives(checkout):
    "A notebook by hand and the series never write one run at a time, and a killed kernel holds nothing."
    code = ("from deescal.engine.lesson import hold_by_hand; from deescal.engine.run import Run; "
            f"hold_by_hand(Run('micro', root={str(checkout.root)!r})); print('held', flush=True); input()")
    def kernel():
        p = subprocess.Popen([sys.executable, "-c", code], cwd=checkout.root, env=checkout.env, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return p, p.stdout.readline()
    first, said = kernel()
    try:
        assert said == "held\n"
        r = checkout.reproduce("--set", "report.title=Two at once", ok=False)
        assert r.returncode and f"process {first.pid} on" in r.stderr and "until its kernel is shut down" in r.stderr
        second, said = kernel()
        assert said == "" and "is being executed by another process" in second.communicate()[1]
    finally:
        first.kill()
        first.wait()
    assert "nothing was run" in checkout.reproduce().stdout


def test_papermill_with_a_jobs_parameter_file_writes_the_same_tables(checkout, tmp_path):
    before = checkout.tables()
    command = [sys.executable, "-m", "papermill", "-k", "python3", "--cwd", "nbs", "-f",
               "data/runs/micro/params/08_examples.yml", "nbs/08_examples.ipynb", str(tmp_path / "out.ipynb")]
    r = subprocess.run(command, cwd=checkout.root, env=checkout.env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    assert checkout.tables() == before
    checkout.reproduce()


LIBRARY = [p.stem for p in lessons() if not tagged(p, "stage")]
APPENDIX = [f"appendix/{p.stem}" for p in sorted((lessons()[0].parent / "appendix").glob("*.ipynb"))]


@pytest.mark.parametrize("name", [*LIBRARY, *(pytest.param(n, marks=pytest.mark.slow) for n in APPENDIX)])
def test_a_lesson_that_is_no_stage_is_executed_to_a_page(checkout, name):
    out = checkout.deescal("lesson", name.split("/")[-1])
    page = (checkout.root / f"figures/lessons/{name.split('/')[-1]}.html").read_text()
    assert "<h1" in page and "Traceback (most recent" not in page and "page rendered" in out.stdout
    assert "nothing has changed" in checkout.deescal("lesson", name.split("/")[-1]).stdout
