"The review page as a reviewer uses it: JupyterLab in a real browser, by keys, with a reload and a dead kernel."
import contextlib
import importlib.util
import json
import os
import shutil
from pathlib import Path

import nbformat
import polars as pl
import pytest
from browser import chromium, jupyterlab, until

from deescal.review import read_verdicts, reviewer_order, store_file, store_rows

ROOT = Path(__file__).resolve().parents[2]
LAB = importlib.util.find_spec("jupyterlab") and importlib.util.find_spec("websocket")
pytestmark = [
    pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on PATH: apt install chromium"),
    pytest.mark.skipif(not LAB, reason="no jupyterlab: install the extra `dev`")]

CELL = '''
import os
from pathlib import Path
import polars as pl
from deescal.features import read_guide
from deescal.reviewpage import ReviewPage

lines = pl.read_json("lines.json")
queue = lines.select("video_id").unique(maintain_order=True)
features = queue.with_columns(pl.lit(f.feature == "police_commands_present").alias(f.feature) for f in read_guide())
evidence = queue.with_columns(feature=pl.lit("police_commands_present"), line=pl.lit(2, pl.Int64),
                              words=pl.lit("step out of the car"))
Path("kernel.pid").write_text(str(os.getpid()))
ReviewPage(queue, lines, "reviews", ["Ann", "Bo"], features, evidence)
'''
HOSTILE = "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'><b id=planted>Now!</b>"
SAID = [("officer", "Evening. Do you know why I stopped you?"), ("officer", "Please step out of the car, sir."),
        ("civilian", "What for? I did nothing. I am not getting out."), ("officer", HOSTILE),
        ("officer", "Nobody is arrested. I only want to see your licence, and then we both go home."),
        ("civilian", "Fine. It is in the glove box."), ("officer", "Thank you. Take your time.")]
VIDEOS = [f"fiction_{n:02}" for n in range(20)]
PAGE = "document.querySelector('.deescal-review')"


@pytest.fixture
def lab(tmp_path):
    lines = [{"video_id": v, "line": n, "role": role, "text": said.replace("stopped you", f"stopped you ({v})")}
             for v in VIDEOS for n, (role, said) in enumerate(SAID * 3, 1)]
    pl.DataFrame(lines).write_json(tmp_path / "lines.json")
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL.strip())], metadata={
        "kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), tmp_path / "read.ipynb")
    (tmp_path / "profile").mkdir()
    env = {"PYTHONPATH": str(ROOT), "DEESCAL_ROOT": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with jupyterlab(tmp_path, **env) as (url, token), chromium(tmp_path / "profile") as tab:
        tab.go(f"{url}lab/tree/read.ipynb?token={token}")
        yield tab, tmp_path
        save("last", tab)


def ready(tab):
    return until(lambda: tab.js("Boolean(document.querySelector('.jp-NotebookPanel .jp-Cell .cm-content')) && "
                                "document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'"),
                 what="the notebook")


def text(tab):
    return tab.js(f"{PAGE}?.innerText") or ""


def run_cell(tab):
    "Run the cell as a person does: click into it, Ctrl+Enter; then choose who is reading."
    def ran():  # a cell that is run before its kernel is there is not run; a person sees that, and does it again
        tab.click(".jp-Cell .cm-content")
        tab.press("Enter", modifiers=2)
        with contextlib.suppress(AssertionError):
            return until(lambda: "Who is reading?" in text(tab), seconds=15)
    until(ran, what="the page")
    tab.click(".deescal-review")
    tab.press("1")
    until(lambda: "of 20 read" in text(tab), what="the desk")


def shown(tab):
    return tab.js(f"{PAGE}?.querySelector('.video')?.textContent")


def decide(tab, key):
    "Press the key of a verdict and wait for the next video."
    before = shown(tab)
    tab.press(key)
    until(lambda: not tab.js(f"'busy' in {PAGE}.dataset") and shown(tab) != before, what=f"the video after {before}")


def save(name, tab):
    "A picture for those who ask for it."
    if where := os.environ.get("DEESCAL_SCREENSHOTS"):
        tab.screenshot(Path(where) / f"{name}.png")


def test_twenty_videos_by_keys_with_a_reload_and_a_killed_kernel(lab):
    tab, folder = lab
    order = reviewer_order(pl.DataFrame({"video_id": VIDEOS}), "Ann")
    keys = ["arurauaara"[n % 10] for n in range(20)]
    expected = dict(zip(order, ({"a": "accept", "r": "reject", "u": "unsure"}[k] for k in keys)))
    ready(tab)
    run_cell(tab)

    # text is text, and the model's marks are nowhere before the first verdict
    everything = "document.documentElement.outerHTML"
    assert shown(tab) == order[0] and HOSTILE in tab.js(f"{PAGE}.textContent")
    assert tab.js("window.ran === undefined && !document.querySelector('#planted, .deescal-review script, .deescal-review img')")
    assert tab.js(f"!{PAGE}.querySelector('mark') && !{PAGE}.innerHTML.includes('police')")
    save("1_before", tab)

    # a reason, a verdict, a look back at the marks, an undo
    tab.press("e")
    tab.type("a stop, and <b>calm</b>")
    tab.press("Enter")
    decide(tab, keys[0])
    assert tab.js(f"!{PAGE}.querySelector('mark')") and shown(tab) == order[1]
    tab.press("ArrowLeft")
    until(lambda: tab.js(f"{PAGE}.querySelector('mark')?.textContent") == "step out of the car", what="marks")
    assert "police commands present" in text(tab)
    assert tab.js(f"{PAGE}.querySelector('input').value") == "a stop, and <b>calm</b>"
    save("2_marks", tab)
    tab.press("n")
    until(lambda: shown(tab) == order[1], what="the next open video")
    decide(tab, "r" if keys[1] != "r" else "a")
    tab.press("z")
    until(lambda: shown(tab) == order[1], what="the undone video")
    for key in keys[1:8]: decide(tab, key)
    assert tab.js("document.querySelectorAll('.jp-Cell').length") == 1  # `a` is also JupyterLab's key for a new cell

    # the browser is reloaded: the kernel lives, the page comes back where it was
    tab.press("s", modifiers=2)
    until(lambda: json.loads((folder / "read.ipynb").read_text())["cells"][0]["outputs"], what="the saved notebook")
    tab.reload()
    ready(tab)
    until(lambda: shown(tab) == order[8] and "8 of 20 read" in text(tab), what="the page after a reload")
    tab.click(".deescal-review .title")
    for key in keys[8:12]: decide(tab, key)

    # the kernel is killed: what is pressed then is not stored, and the page says so
    os.kill(int((folder / "kernel.pid").read_text()), 9)
    until(lambda: tab.js("Boolean(document.querySelector('.jp-Dialog'))"), what="JupyterLab's word of the dead kernel")
    save("3_dead", tab)
    tab.click(".jp-Dialog .jp-mod-accept")
    until(lambda: not tab.js("Boolean(document.querySelector('.jp-Dialog'))"), what="the dialog to close")
    tab.click(".deescal-review .title")
    tab.press("a")
    until(lambda: "kernel does not answer" in text(tab), what="word of the dead kernel")
    assert len(read_verdicts(folder / "reviews")) == 12
    save("4_unheard", tab)

    # a new kernel goes on at the right video
    ready(tab)
    run_cell(tab)
    assert "12 of 20 read" in text(tab) and shown(tab) == order[12]
    for key in keys[12:]: decide(tab, key)
    until(lambda: "All read" in text(tab), what="the end")
    save("5_end", tab)

    verdicts = read_verdicts(folder / "reviews")
    assert dict(verdicts.select("video_id", "verdict").rows()) == expected
    rows = store_rows(store_file(folder / "reviews", "Ann"))
    assert len(rows) == 22 and rows[0]["reason"] == "a stop, and <b>calm</b>"
    assert [r["video_id"] for r in rows if r["seen_features"]] == [order[1]] * 2  # the undo, and the verdict after it
    assert tab.js("window.ran === undefined")
