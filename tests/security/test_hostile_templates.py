"""Templates that mean harm, wherever one can be given, and rows that look like templates."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
from hostile_run import records, start

import pipeline
from pipeline.errors import RowFault, RunFailed, UsageError
from pipeline.prompt.template import PromptConfig
from pipeline.records import ImageRef, Row
from pipeline.tensors.processor import Processor, ProcessorSource

DEMO_MODEL = Path(pipeline.__file__).parent / "vlm" / "demo"

PAYLOADS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ joiner.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "{{ self._TemplateReference__context.cycler.__init__.__globals__.os }}",
    "{{ title | attr('__class__') | attr('__base__') }}",
    "{{ title['__class__']['__mro__'] }}",
    "{{ (title | map(attribute='__class__') | list)[0] }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(title) }}",
    "{{ title.format.__globals__ }}",
    "{{ image.__globals__ }}",
    "{{ image.__closure__ }}",
    "{{ row.__class__.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ dict.mro() }}",
    "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    "{% include '/etc/passwd' %}",
    "{% extends '/etc/passwd' %}",
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 300000000 }}",
    "{{ [0] * 300000000 }}",
    "{{ 9 ** 99999999 }}",
]


@pytest.mark.parametrize("key", ["user", "system", "assistant_prefix", "variants"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_template_reaches_nothing_and_is_cut_short(
    payload: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault S-4: injections, endless loops, 300 MB of text, in each key for a template: refused or cut within 2 s."""
    monkeypatch.chdir(tmp_path)
    prompt = PromptConfig(**{key: {"a": payload} if key == "variants" else payload})  # type: ignore[arg-type]
    before = resource.getrusage(resource.RUSAGE_SELF)
    row = Row(0, "0", (ImageRef(data=b"x"),), {"title": "a title", "n": 3})
    with pytest.raises((UsageError, RowFault)):
        prompt.build(("title", "n")).prompts(row)
    after = resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 2
    assert after.ru_maxrss - before.ru_maxrss < 100_000, "KiB"
    assert list(tmp_path.iterdir()) == []


def test_rows_that_look_like_templates_are_asked_about_as_they_are(tmp_path: Path) -> None:
    """Fault S-4: templates in columns, ids and file names are text: they come back as they are, and nothing runs."""
    lines = [json.dumps({"image": None, "title": payload, "n": payload}) for payload in PAYLOADS]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    job = ["dataset=jsonl", "dataset.path=rows.jsonl", "dataset.image_column=null", "dataset.id_column=n"]
    start(tmp_path, *job, "prompt.user={{ title }} {{ row['n'] }}", "prompt.system={{ title }}")
    assert [(row["status"], row["prompt"], row["id"]) for row in records(tmp_path)] == [
        ("ok", f"{payload} {payload}", payload) for payload in PAYLOADS
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl"]


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_chat_template_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault S-4: a chat template that loops without an end is ended after some seconds: refused, or a row fault."""
    monkeypatch.setattr("pipeline.tensors.chat._MOST_SECONDS", 0.5)
    source = ProcessorSource(str(DEMO_MODEL), chat_template=ENDLESS)
    with pytest.raises(RunFailed, match=r"cannot prepare a picture: TemplateTimeout: the chat template took more than"):
        Processor(source)
    only_then = "{% if 'Ada' in messages | string %}" + ENDLESS + "{% endif %}"
    own = (DEMO_MODEL / "chat_template.jinja").read_text()
    processor = Processor(ProcessorSource(str(DEMO_MODEL), chat_template=only_then + own))
    for name, fails in (("Bob", False), ("Ada", True), ("Bob", False)):
        turns = [{"role": "user", "content": [{"type": "text", "text": f"Who is {name}?"}]}]
        if fails:
            with pytest.raises(RowFault, match="took more than"):
                processor.encode(turns, [])
        else:
            assert processor.encode(turns, []).num_prompt_tokens
