"Ten thousand broken transcripts: whatever the bytes, nothing raises and every record is accounted for."
import os
import random
import re
import shutil
from pathlib import Path

import pytest

from deescal.audit import audit, duplicate_groups, near_duplicates
from deescal.clean import clean
from deescal.engine.tables import check_table
from deescal.corpus import corpus_accounting, summarize_scenarios
from deescal.read import read_folder
from deescal.roles import assign_roles

SAMPLE = [p.read_bytes() for p in sorted((Path(__file__).resolve().parents[2] / "data/sample").glob("*.csv"))]
HEADER = "start_time,speaker_label,transcript"
HEADERS = [
    HEADER, HEADER.upper(), f'"{HEADER}"', HEADER.replace(",", ";"), HEADER.replace(",", "\t"), HEADER + ",",
    f" {HEADER} ", "start_time,speaker_label", "transcript,speaker_label,start_time", f"{HEADER},{HEADER}",
    "id," + HEADER, "a,b,c", "", HEADER.replace(",", '","').join('""'), "start\0_time,speaker_label,transcript",
    "0:01,Officer,Stop."]
TIMES = [
    "0:01", "00:07", "1:02:03", "99:59", "999:59", "99:59:59", "00:09,500", "1:00:00.25", "0:60", "-1:00", "", " ",
    "nan", "1e9", "0:5", "1:2:3:4", "９:00", "=1+1", "00:00:00,000", "2024-01-01", "9" * 400, "\u200f0:01", "0:01\0"]
LABELS = [
    "Officer", "[Police Officer]", "Dale", "Dispatch", "", " ", "[Narrator]", "Officer\nPike", "=HYPERLINK(\"x\")",
    "O'Neil", "\U0001f46e\U0001f3fd\u200d\u2640\ufe0f", "شرطي", "-", "Officer " * 300, "[Sean's Wife]", "NAME_1",
    "\u202eeciloP", "\0", "\x1e",
    "e\u0301", "é", "Speaker 2", "ß", "İ", "(.*", "\\1", "Dale\u2028Roe", "a@b.c", "555-013-4477"]
TEXTS = [
    "=cmd|' /C calc'!A0", "@SUM(1+1)*9", "+1-1", "<script>alert(1)</script>", "'; DROP TABLE turns; --",
    "{{7*7}} ${x} %s", "../../etc/passwd", "[Error fetching transcript: 500]", "I don\u00e2\u20ac\u2122t.",
    "\u00c3\u00a9\u00c3\u00a9", "\ufffd\ufffd", "", "   ", "...",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f1fa\U0001f1f8",
    "\u202eright to left\u202c", "اخرج من السيارة الآن", "צא מהרכב עכשיו", "从车里出来", "e" + "\u0301" * 60,
    "\ufb01ne \u212b \u1e9b\u0323", "one\ntwo\r\nthree\rfour", "a\u2028b\u2029c\x85d\x0be\x0cf",
    "a\x1cb\x1db\x1eb\x1fb", "Stop.\n\x1e\nGet out.", "NUL \0 here", "\ufeffBOM inside", "hey " * 90,
    "get down now " * 60, "no no no", "la" * 3000, "My name is Dale Pike, call 555-013-4477.",
    "Mr. Pike, Officer Vance, Dr. Ames.", "NAME_1 and NAME_" + "9" * 5000, "[PHONE] [NAME] [",
    "a@b.c dale at mail dot com www.x.org", "Boy Charles David one two three four", "A B C D E F G H",
    "12 Oak Street, 4417 Elm.", "March 3rd, 1984 3/4/84", 'He said "stop" twice.', '"', '""', '",', "\\",
    "\\1 \\g<0>", "(?:[", "Where were you going last night?", "I was going home, sir.",
    "Step out of the car for me, please.", "Why? What did I do?",
    "Steigen Sie bitte sofort aus dem Wagen aus und zeigen Sie mir Ihre Papiere."]
LONG = [
    "a", "1", "A ", "1 ", "a.", "a-", "9-", "Aa ", "one ", "ab dot ", "@", "\u0301", "\ufffd", "Dale ", "a@", '"',
    "Mr. ", "x\n", "é", "Dale-", "Aa'", "www.", "\n\x1e\n", "no\x1f", "\x1c", "a at b ", "\u00c3\u00a9", "NAME_1-",
    "()", "ha.ha", "从", "1, 2, "]


def pick(rng, items): return items[rng.randrange(len(items))]


def field(rng, text):
    "A field, quoted as it should be, or (rarely) not."
    how = rng.random()
    if how < 0.03: return text
    if how < 0.04: return '"' + text
    return '"' + text.replace('"', '""') + '"' if how < 0.3 or any(c in text for c in ',"\r\n') else text


def table(rng, header=HEADER):
    "A well-formed transcript of odd values, but for the quotes."
    n, end = rng.choice([1, 3, 8, 20, 40]), rng.choice(["\n", "\n", "\r\n", "\r"])
    labels = [pick(rng, LABELS) for _ in range(rng.randint(1, 4))]
    some = [pick(rng, TEXTS) for _ in range(rng.randint(1, 12))]
    def time(i): return f"{i // 20}:{i * 3 % 60:02}" if rng.random() < 0.7 else pick(rng, TIMES)
    rows = [",".join(field(rng, x) for x in (time(i), pick(rng, labels), pick(rng, some))) for i in range(n)]
    return (header + end + end.join(rows) + rng.choice(["", end, end * 3])).encode("utf-8", "surrogatepass")


def long_field(rng):
    "One field of up to 60,000 times the same."
    text = pick(rng, LONG) * rng.choice([300, 3000, 60_000]) + rng.choice(["", "@", " dot com", "!", "\0"])
    row = [pick(rng, TIMES), pick(rng, LABELS), "Stop."]
    row[rng.choice([0, 1, 2, 2, 2, 2])] = text
    return f"{HEADER}\n{','.join(field(rng, x) for x in row)}\n0:09,Dale,Why?\n".encode()


def other_encoding(rng):
    text = table(rng).decode("utf-8", "replace")
    names = "utf-16 utf-16-le utf-16-be utf-32 utf-8-sig cp1252 latin-1 cp037 utf-7 shift_jis".split()
    return text.encode(pick(rng, names), "replace")


def cells(rng):
    "Nothing but what a parser stumbles over."
    bits = ['"', ",", "\n", "\r", "\r\n", "\0", " ", "0:01,", '0:02,"', "Officer", "é", "\ufeff", HEADER, ";"]
    return "".join(rng.choices(bits, k=rng.randint(1, 200))).encode()


NOTHING = [
    b"", b"\n", b"\0", b",", b"," * 5000, b"\n" * 5000, b'"' * 4001, b"\xef\xbb\xbf", b"\xff\xfe", b"\r",
    b"\xff\xfe\0\0", b"\0" * 999, b"%PDF-1.4\n%\xe2", b"PK\x03\x04" + bytes(99), b"\x1f\x8b\x08", b",,\n" * 900,
    HEADER.encode(),
    *(HEADER.encode() + rest for rest in (b"\n", b"\n,,\n,,\n", b'\n0:01,A","x' * 900, b'\nA","x' * 900))]


def damage(rng, data):
    "`data` with some bytes flipped, left out, put in, moved or repeated."
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 10, 60])):
        if not data: break
        a, n = rng.randrange(len(data)), rng.choice([1, 1, 1, 4, 100, 2000])
        b = rng.randrange(len(data))
        what = rng.randrange(7)
        if what == 0: data[a] ^= 1 << rng.randrange(8)
        elif what == 1: del data[a:a + n]
        elif what == 2: data[a:a] = rng.randbytes(min(n, 100))
        elif what == 3: data[a:a + n], data[b:b + n] = data[b:b + n], data[a:a + n]
        elif what == 4 and len(data) < 200_000: data[b:b] = data[a:a + n]
        elif what == 5: data[a:a] = pick(rng, [
            b'"', b"\0", b"\r", b"\n", b",", b"\xef\xbb\xbf", b"\xff", b"\n0:01,", b"=", b"\x1e"])
        elif n > 100: data = data[:a]
    return bytes(data)


def line_ends(rng, data):
    return b"".join(line + rng.choice([b"\n", b"\r", b"\r\n", b"\n\n", b"\n\r"]) for line in data.split(b"\n"))


KINDS = [
    lambda rng: rng.randbytes(rng.choice([1, 20, 400, 4000])), lambda rng: pick(rng, NOTHING), cells, long_field,
    other_encoding, table, table, lambda rng: table(rng, pick(rng, HEADERS)), lambda rng: damage(rng, table(rng)),
    lambda rng: damage(rng, pick(rng, SAMPLE)), lambda rng: damage(rng, pick(rng, SAMPLE)),
    lambda rng: line_ends(rng, pick(rng, SAMPLE)), lambda rng: pick(rng, SAMPLE),
    lambda rng: pick(rng, SAMPLE)[:rng.randrange(3000)], lambda rng: rng.randbytes(30) + pick(rng, SAMPLE),
    lambda rng: table(rng) + table(rng), lambda rng: b"\xef\xbb\xbf" * 2 + table(rng),
    lambda rng: damage(rng, other_encoding(rng))]
NAMES = [
    "youtube_{}", "tiktok_{}_A_Title", "facebook_{}", "{}", "YOUTUBE_{}", "=cmd {}", "-rf {}", "{} ; rm x", "a b\t{}",
    "new\nline {}", "é{}", "e\u0301{}", "\U0001f46e{}", "شرطة_{}", "\u202e{}", "'{}'", '"{}"', "%2e%2e{}", "{}..",
    "n" * 200 + "{}", "ü" * 100 + "{}", "con{}", "{}\\x", "$(x){}", "a,b{}", "{}.csv", "_{}", "*?{}", "\udcff{}",
    "\x01{}", "İ{}", "ß{}", "SS{}"]


def write_files(folder, seed, n):
    "`n` files of odd names and contents below `folder`, in it, in train/ and in test/; some of them are no files."
    rng = random.Random(seed)
    for sub in ("train", "test"): (folder / sub).mkdir()
    for i in range(n):
        number = rng.choice([i, i, i // 2, "x"])  # names that are one name once they are made safe
        name = pick(rng, NAMES).format(number) + rng.choice([".csv", ".csv", ".CSV"])
        path = folder / rng.choice(["", "train", "test"]) / name
        if os.path.lexists(path): path = path.with_name(f"again_{i}.csv")
        kind = rng.random()
        if kind < 0.004: path.mkdir()
        elif kind < 0.008: path.symlink_to("nowhere")
        else: path.write_bytes(pick(rng, KINDS)(rng))


def said(text): return set(re.findall(r"\w+", re.sub(r"NAME_\d+s?\b|\[[A-Z]+\]", " ", text)))


def run_through(folder, n):
    "Reading, roles, audit and clean corpus of a folder; every file, record and turn is in the books."
    turns, rejects, files = read_folder(folder)
    assert len(files) == n and set(files["file"]) == set(turns["file"]) | set(rejects["file"])
    assert files["rows"].sum() == len(turns) + (rejects["unit"] == "row").sum()
    assert files["kept"].sum() == len(turns) and files["rejected"].sum() == (rejects["unit"] == "row").sum()
    corpus_accounting(turns, rejects, files)
    turns = check_table(assign_roles(turns), "turns")
    scenarios = check_table(summarize_scenarios(turns, files), "scenarios")
    pairs = check_table(near_duplicates(turns), "duplicates")
    groups = check_table(duplicate_groups(scenarios["scenario_id"], pairs), "groups")
    assert len(groups) == len(scenarios) == turns["scenario_id"].n_unique() and scenarios["turns"].sum() == len(turns)
    check_table(rejects, "rejects"), check_table(files, "files")
    check_table(audit(turns, scenarios, pairs), "findings")
    tidy, trace, _ = clean(turns, scenarios)
    tidy, trace, key = check_table(tidy, "clean_turns"), check_table(trace, "trace"), ["scenario_id", "turn"]
    assert trace.select(key).equals(turns.select(key))
    left = trace.filter(trace["fate"] != "excluded")
    assert left.select(key).equals(tidy.select(key)) and set(trace["fate"]) <= {"kept", "repaired", "excluded"}
    both = turns.join(tidy, on=key, suffix="_after").join(trace.select(*key, "fate", "reason"), on=key)
    kept = both.filter(fate="kept")
    for c in ("speaker_label", "text", "start_s"): assert kept[c].equals(kept[f"{c}_after"], null_equal=True), c
    for before, after in both.filter(reason="personal_data").select("text", "text_after").rows():
        assert said(after) <= said(before), "what is not masked is what was said in that very turn"
    return len(turns), len(rejects)


@pytest.fixture
def folder(tmp_path):
    "A folder whose files go when the test is over: there are thousands."
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_three_hundred_broken_files(folder):
    write_files(folder, 3407, 300)
    turns, rejects = run_through(folder, 300)
    assert turns > 1000 and rejects > 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_ten_thousand_broken_files(folder, seed):
    write_files(folder, seed, 500)
    run_through(folder, 500)
