"""The page of `benchmark.py --html`, as a file and in a real headless Chromium."""

import json
import re
import shutil
import subprocess

import pytest

import benchmark
import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=3000 --dump-dom"
)
HOSTILE = (
    "<script>document.title = 'owned'</script></script><img src=x onerror=\"document.title = 'owned'\">"
    "<!--<script>{{ 7 * 7 }}{% raw %}\u2028\ud800 & ' \" \x1b[31m\n#### 18"
)


def line(id, text, **more):
    return {
        "id": id,
        "question": f"question <b>{id}</b>",
        "model_output": text,
        "ground_truth_answer": "#### 18",
    } | more


def make_page(folder, *files):
    paths = []
    for number, rows in enumerate(files):
        paths.append(folder / f"run{number}.jsonl")
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = folder / "page.html"
    benchmark.main([*map(str, paths), "--html", str(page)])
    return page


def read_data(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two runs over four questions: right/right, right/wrong, unfinished/no answer, hostile/ambiguous."""
    first = ["#### 18", "<think>so</think>9+9\n#### 18 eggs", "<think>18", HOSTILE]
    second = ["#### 18", "#### 7", "the answer is 18", "#### 4 and 6"]
    return make_page(
        tmp_path_factory.mktemp("page"),
        [line(id, text, output_tokens=5) for id, text in enumerate(first)],
        [line(id, text) for id, text in enumerate(second)],
    )


@pytest.fixture
def browse(tmp_path):
    """Open a page at a fragment, press keys, and give the DOM without its data; errors fail."""
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")

    def browse(page, fragment="", keys=()):
        press = (
            f"<script>for (const key of {json.dumps(keys)})"
            "document.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));"
            "document.body.dataset.fragment = location.hash;</script></body>"
        )
        dom = dump_dom(tmp_path, page.read_text().replace("</body>", press), fragment)
        assert '<div id="error" role="alert"></div>' in dom
        return dom

    return browse


def dump_dom(folder, text, fragment="", window="1280,800"):
    """The DOM of a page once its scripts have run, without its data; an error of theirs fails."""
    (folder / "shown.html").write_text(text)
    command = [CHROMIUM, *FLAGS.split(), f"--window-size={window}", f"--user-data-dir={folder / 'profile'}"]
    command.append(f"file://{folder / 'shown.html'}#{fragment}")
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in result.stderr
    return re.sub(r'<script type="application/json".*?</script>', "", result.stdout, flags=re.DOTALL)


def shown(dom):
    """The ids of the questions that the filters leave."""
    ids = re.findall(r'<div class="question[^"]*"><button.*?<span class="id">(\d+)</span>', dom)
    assert f">{len(ids)} of 4 questions<" in dom
    return [int(id) for id in ids]


def test_the_page_holds_every_answer_cut_where_it_was_read(page):
    data = read_data(page)
    first, second = data["questions"][1]["outputs"]
    assert data["runs"] == ["run0", "run1"]
    assert first[0]["parts"] == ["<think>so</think>", "9+9\n####", " 18 eggs", ""]
    assert (first[0]["read"], first[0]["tokens"], second[0]["read"]) == ("18", 5, "7")
    assert [list(data["marks"])[output["status"]] for output in first + second] == ["right", "wrong"]


def test_the_page_needs_no_network_and_holds_no_markup_of_a_model(page):
    text = page.read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"(src|href)\s*=\s*[\"']?\w", re.sub(r'id="data">.*?</script>', "", text, flags=re.DOTALL))
    assert "<img" not in text
    assert text.count("</script>") == 2
    assert "".join(read_data(page)["questions"][3]["outputs"][0][0]["parts"]) == HOSTILE.replace("\ud800", "\ufffd")


@pytest.mark.parametrize(
    ("fragment", "ids"),
    [
        ("", [0, 1, 2, 3]),
        ("run0=right&run1=wrong", [1]),
        ("run0=right&run1=not_right", [1, 3]),
        ("run0=unfinished", [2]),
        ("run1=no_answer", [2]),
        ("run1=ambiguous", [3]),
        ("search=9%2B9", [1]),
        ("search=EGGS", [1]),
    ],
)
def test_filters_and_search_of_a_shared_link_are_applied(page, browse, fragment, ids):
    assert shown(browse(page, fragment)) == ids


def test_an_open_row_shows_the_chosen_runs_with_the_thought_folded_and_the_answer_marked(page, browse):
    dom = browse(page, "open=1&show=0")
    assert re.findall(r'class="run">(\w+)<', dom) == ["run0"]
    assert "<details><summary>thought, 17 characters</summary><pre>&lt;think&gt;so&lt;/think&gt;</pre></details>" in dom
    assert "<pre>9+9\n####<mark> 18 eggs</mark></pre>" in dom
    assert "read 18 · 5 tokens" in dom


def test_what_a_model_wrote_is_shown_as_text_and_never_run(page, browse):
    dom = browse(page, "open=3")
    assert "<title>GSM8K answers: model and data set not recorded</title>" in dom
    assert "<img" not in dom
    assert "&lt;script&gt;document.title = 'owned'&lt;/script&gt;&lt;/script&gt;&lt;img src=x onerror=" in dom
    assert "{{ 7 * 7 }}{% raw %}" in dom


def test_keys_move_between_the_questions_shown_and_the_link_follows(page, browse):
    assert 'data-fragment="#run0=right&amp;open=1"' in browse(page, "run0=right", ["j", "j", "j", "k"])
    assert 'data-fragment="#run0=right"' in browse(page, "run0=right", ["j", "Escape"])


def test_a_question_of_several_samples_shows_them_all(tmp_path, browse):
    rows = [line(0, text, sample=sample) for sample, text in enumerate(["#### 18", "#### 1", "#### 18"])]
    dom = browse(make_page(tmp_path, rows), "open=0")
    assert 'title="run0: 2 of 3 right">2/3</span>' in dom
    assert dom.count('class="output"') == 3


def test_files_too_large_for_a_page_are_sampled_by_question_with_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "PAGE_BYTES", 10_000)
    files = [[line(id, letter * 92 + "#### 18") for id in range(100)] for letter in "ab"]
    page = make_page(tmp_path, *files)
    questions = read_data(page)["questions"]
    assert 10 <= len(questions) <= 40
    assert all(len(output) == 1 for question in questions for output in question["outputs"])
    warning = f"a sample of {len(questions)} of 100 questions"
    assert warning in page.read_text()
    assert warning in capsys.readouterr().err


def test_twelve_real_files_make_a_page_under_25_megabytes(shared, tmp_path, browse):
    files = sorted((shared / "published_outputs").glob("*.jsonl"))
    paths = [tmp_path / f"{number}-{path.name}" for number, path in enumerate((files * 3)[:12])]
    for path, source in zip(paths, (files * 3)[:12], strict=True):
        path.symlink_to(source)
    page = tmp_path / "page.html"
    benchmark.main([*map(str, paths), "--html", str(page)])
    assert page.stat().st_size < 25e6
    assert "1,319 of 1,319 questions" in browse(page)


def test_a_page_of_150000_questions_shows_the_one_that_is_asked_for(page, browse, tmp_path):
    text, data = page.read_text(), read_data(page)
    question = {"question": "q", "answer": "#### 18", "outputs": [[{"status": 0, "parts": ["", "", "18", ""]}], []]}
    data["questions"] = [question | {"id": id} for id in range(150_000)]
    large = tmp_path / "large.html"
    start = text.index('id="data">') + len('id="data">')
    large.write_text(text[:start] + json.dumps(data) + text[text.index("</script>", start) :])
    dom = browse(large, "open=149998", ["j"])
    assert ">150,000 of 150,000 questions<" in dom and 'data-fragment="#open=149999"' in dom
    assert re.search(r'class="question open">.*?<span class="id">149999</span>', dom)
    assert dom.count('class="id"') < 300


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_as_wide_as_the_screen_and_little_of_it_sticks(tmp_path, width):
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    long = "a-run-with-a-long-name_" * 4
    paths = [tmp_path / f"{number}-{long}.jsonl" for number in range(8)]
    for path in paths:
        path.write_text("".join(json.dumps(line(id, "x" * 400 + "\n#### 18")) + "\n" for id in range(3)))
        record = {
            "decides": {"prompt": "y" * 300, "mode": "cot"},
            "segments": [{"model": "m" * 90, "command": "c" * 300}],
        }
        path.with_suffix(".run.json").write_text(json.dumps(record))
    page = tmp_path / "page.html"
    benchmark.main([*map(str, paths), "--compare", "--html", str(page)])
    measure = (
        "<script>document.querySelectorAll('details').forEach(details => { details.open = true; });"
        "parent.postMessage([document.documentElement.scrollWidth, byId('controls').offsetHeight], '*')</script></body>"
    )
    page.write_text(page.read_text().replace("</body>", measure))
    frame = (
        "<script>addEventListener('message', event => { document.body.dataset.size = event.data; })</script>"
        f'<iframe src="page.html#open=1" style="border: 0; width: {width}px; height: 800px"></iframe>'
    )
    dom = dump_dom(tmp_path, f"<body>{frame}</body>", window="1400,900")
    content, stuck = map(int, re.search(r'data-size="(\d+),(\d+)"', dom).groups())
    assert content <= width and stuck <= 60


def test_the_page_tells_how_each_run_was_made_and_what_the_marks_mean(tmp_path):
    (tmp_path / "run0.run.json").write_text(
        json.dumps(
            {
                "decides": {"prompt": "<|im_start|>", "mode": "cot", "do_sample": True, "temperature": 0.6, "seed": 42},
                "segments": [{"model": "/home/me/Qwen3-0.6B", "dataset": "openai/gsm8k", "command": "python <b>"}],
            }
        )
    )
    text = make_page(tmp_path, [line(0, "#### 18")], [line(0, "#### 18")]).read_text()
    assert "<title>GSM8K answers: Qwen3-0.6B on openai/gsm8k</title>" in text
    assert "<b>run0</b>: Qwen3-0.6B, cot, sampled, temperature 0.6, seed 42</summary>" in text
    assert "&lt;|im_start|&gt;</dd>" in text and "python &lt;b&gt;</dd>" in text and "/home/me" not in text
    assert "<b>run1</b></summary>\n<dl><dt>record</dt><dd>none</dd></dl>" in text
    for status, meaning in report.STATUS_MEANINGS.items():
        assert re.search(rf'class="chip {status}">.</span> {status.replace("_", " ")}: {meaning}', text)


def test_questions_and_answers_count_towards_the_size_of_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PAGE_BYTES", 20_000)
    rows = [line(id, "#### 18") | {"question": f"{id} " + "q" * 500} for id in range(100)]
    assert len(read_data(make_page(tmp_path, rows))["questions"]) < 60
