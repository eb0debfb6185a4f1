"""Secrets stay where they are: in the environment, on the command line, in the addresses that rows hold."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hostile_run import data_uri, records, start, written

from pipeline.compose import compose
from pipeline.errors import RowFault, UsageError
from pipeline.records import Stage
from pipeline.redaction import is_secret_key, redacted, secret_variables, with_credentials, without_credentials

PASSWORD, ROTATED, TOKEN, SIGNATURE = (
    "pa55/w0rd+of=alice",
    "an0ther-pa55w0rd",
    "hf_ThisIsNobodysToken",
    "51gnature0fnobody",
)
VARIABLES = {"HF_TOKEN": TOKEN, "AWS_SECRET_ACCESS_KEY": "aws/" + TOKEN}
ROWS = [
    {"image": data_uri(1), "n": 1},
    {"image": "absent.png", "n": 2},
    {"image": f"https://bob:{PASSWORD}@127.0.0.1/a.png", "n": 3},
    {"image": f"https://127.0.0.1/a.png?size=1&X-Amz-Signature={SIGNATURE}", "n": 4},
    {"image": f"s3://bob:{PASSWORD}@bucket/a.png", "n": 5},
    {"image": f"https://bob:{'long' * 30}{PASSWORD}@127.0.0.1/a.png", "n": 6},
    {"image": data_uri(2), "n": 7},
]


def store(*passwords: str) -> str:
    """A source with a password, for the main process: worker processes have a store of their own, an empty one."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    files = [f"/alice:{password}@host/in/rows.jsonl" for password in passwords]
    return f"import fsspec\nfor name in {files!r}: fsspec.filesystem('memory').pipe(name, {lines.encode()!r})"


def words(password: str) -> list[str]:
    return [
        "dataset=jsonl", f"dataset.path=memory://alice:{password}@host/in/rows.jsonl", "dataset.allow_urls=true",
        "write.shard_rows=4",
    ]  # fmt: skip


def test_no_secret_is_written_or_said(tmp_path: Path) -> None:
    """Fault S-2: passwords in the address of the source and in rows, tokens in the environment: in no byte written."""
    secrets = [PASSWORD, ROTATED, SIGNATURE, TOKEN, "long" * 3]
    job = ["dataset.columns=[n]", "write.keep_images=true", *words(PASSWORD)]
    printed = start(tmp_path, *job, prelude=store(PASSWORD), crash_at="shard_settled", code=-9, variables=VARIABLES)
    assert list((tmp_path / "out" / "work").glob("*.journal")), "journals are looked at, too"
    plan_id = json.loads((tmp_path / "out" / "plan.json").read_text())["plan_id"]
    for path, content in written(tmp_path / "out"):
        assert not [secret for secret in secrets if secret.encode() in content], path
    # The password has changed meanwhile: the source is the same, and is read with the new one.
    job = ["dataset.columns=[n]", "write.keep_images=true", *words(ROTATED)]
    printed += start(tmp_path, *job, prelude=store(ROTATED), variables=VARIABLES)
    rows = records(tmp_path)
    assert [row["n"] for row in rows] == [row["n"] for row in ROWS]
    assert {row["run_id"] for row in rows} == {plan_id}
    assert [row["n"] for row in rows if row["status"] == "ok"] == [1, 7]
    assert rows[1]["error_message"].count("memory://***@host/in/absent.png"), "the message names what was not found"
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["root"] == "memory://***@host/in"
    for path, content in written(tmp_path / "out"):
        assert not [secret for secret in secrets if secret.encode() in content], path
    assert not [secret for secret in secrets if secret in printed], printed


def test_a_column_that_is_kept_is_data(tmp_path: Path) -> None:
    """Fault S-2: an input column that the user keeps is written as it is, addresses with passwords included."""
    addresses = [row["image"] for row in ROWS if "://" in str(row["image"])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"image": address}) + "\n" for address in addresses))
    printed = start(tmp_path, "dataset=jsonl", "dataset.path=rows.jsonl")
    assert "example  read/UrlsNotAllowed: 0: rows.jsonl row 0: https://***@127.0.0.1/a.png" in printed
    assert PASSWORD not in printed
    rows = records(tmp_path)
    assert [row["image"] for row in rows] == addresses
    assert not [row for row in rows if PASSWORD in (row["error_message"] or "")]


@pytest.mark.parametrize(
    ("word", "named"),
    [
        (f"vlm.processor.token={TOKEN}", "vlm.processor.token"),
        (f"vlm.processor={{nested: {{api_key: {TOKEN}}}}}", "vlm.processor.nested.api_key"),
        (f"generation.extra.use_auth_token={TOKEN}", "generation.extra.use_auth_token"),
        (f"prompt.user=Describe {TOKEN}.", "prompt.user holds the value of HF_TOKEN"),
        (f"prompt.variants={{a: {TOKEN}}}", "prompt.variants.a holds the value of HF_TOKEN"),
        (f"output_dir=out/{TOKEN}", "output_dir holds the value of HF_TOKEN"),
        (f"dataset.path=s3://bucket/{TOKEN}/a", "dataset.path holds the value of HF_TOKEN"),
        (f"dataset.path=https://host/a.tar?sig={TOKEN}&x=1", "'sig'"),
        (f"dataset.path=zip://a::https://host/a.zip?X-Goog-Signature={TOKEN}", "'X-Goog-Signature'"),
        (f"token={TOKEN}", "there is no key 'token'"),
        (f"seed={TOKEN}", "seed="),
    ],
)
def test_a_secret_among_the_settings_is_refused(word: str, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault S-2: a token in a setting, which the plan would hold, is refused without being repeated."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UsageError) as caught:
        compose(["dataset=images", "dataset.path=photos", word])
    assert named in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_a_configuration_of_ones_own_may_name_the_variable_of_a_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault S-2: a password that a YAML file takes from the environment is in no YAML that is shown."""
    monkeypatch.setenv("STORE_PASSWORD", PASSWORD)
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "mine.yaml").write_text(
        "defaults: [images_schema, _self_]\npath: 'sftp://alice:${oc.env:STORE_PASSWORD}@host/photos'\n"
    )
    composed = compose(["dataset=mine"], config_dir=str(tmp_path))
    assert composed.config.dataset.path == f"sftp://alice:{PASSWORD}@host/photos"
    assert PASSWORD not in composed.yaml
    assert "sftp://***@host/photos" in composed.yaml


@pytest.mark.parametrize(
    "prelude",
    [
        "",  # a package that this kind of address needs is missing, or the host is
        "from pipeline.dataset import jsonl\ndef listed(path, _): raise KeyError(path)\njsonl.listed = listed",
    ],
    ids=["known", "unknown"],
)
def test_an_error_shows_no_password(prelude: str, tmp_path: Path) -> None:
    """Fault S-2: an address that cannot be opened is quoted without its password, in a traceback of a bug, too."""
    job = ["dataset=jsonl", f"dataset.path=ftp://alice:{PASSWORD}@127.0.0.1:1/rows.jsonl"]
    printed = start(tmp_path, *job, prelude=prelude, code=1 if prelude else 2)
    assert PASSWORD not in printed
    assert "ftp://***@127.0.0.1:1/rows.jsonl" in printed


@pytest.mark.parametrize(
    ("address", "left"),
    [
        ("https://alice:x@host:80/a?b=c", "https://***@host:80/a?b=c"),
        ("https://ghp_token@host/a", "https://***@host/a"),
        ("https://alice:p@ss@host/a@b.jpg", "https://***@host/a@b.jpg"),
        ("s3://AKIA:ab/c+d/e=@bucket/a.parquet", "s3://***@bucket/a.parquet"),
        ("zip://in ner.png::https://alice:x@host/a.zip", "zip://in ner.png::https://***@host/a.zip"),
        ("https://h/a?Expires=1&Signature=abc%2B&Key-Pair-Id=K", "https://h/a?Expires=1&Signature=***&Key-Pair-Id=***"),
        # These hold no secret.
        ("hf://datasets/org/name@a1b2/data/a.parquet", None),
        ("https://host:8080/a@b/c.jpg", None),
        ("s3://bucket/alice@example.org/a.jpg", None),
        ("file:///home/alice@work/a.jpg", None),
        ("/data/a&token=1/b.jpg", None),
        ("zip://inner@1::https://host/a.zip", "zip://***@1::https://host/a.zip"),
        ("https://host/a?size=10&keyword=b", None),
    ],
)
def test_what_is_secret_in_an_address(address: str, left: str | None) -> None:
    """Fault S-2: user, password, token and signature leave an address, and nothing else does."""
    shown = without_credentials(address)
    assert shown == (left or address)
    assert without_credentials(shown) == shown
    if "?" not in address:
        assert with_credentials(shown, address) == address


@pytest.mark.parametrize("text", ["/a:b", "://a:b", "?token", "?" + "token" * 1000, "://" + "a:" * 1000])
def test_a_row_cannot_make_the_search_for_secrets_take_for_ever(text: str) -> None:
    """Fault S-2: the search is linear in the length of a text, whatever stands in it."""

    def seconds(num_characters: int) -> float:
        began = time.process_time()
        redacted((text * num_characters)[:num_characters])
        return time.process_time() - began

    # Four times the text takes four times as long; were it the square, sixteen times, and minutes for some of these.
    assert min(seconds(400_000) for _ in range(3)) < 8 * max(seconds(100_000) for _ in range(3)) + 0.2


def test_names_that_hold_secrets() -> None:
    variables = {"AWS_SESSION_TOKEN": "x" * 20, "PGPASSWORD": "y" * 20, "OPENAI_API_KEY": "z" * 20, "DB_PWD": "p" * 20}
    others = {
        "TOKENIZERS_PARALLELISM": "x" * 20,
        "HF_TOKEN_PATH": "/a/very/long/path",
        "MY_TOKEN": "short",
        "HOME": "h" * 20,
        "PWD": "/where/the/shell/is",
        "OLDPWD": "/where/the/shell/was",
    }
    assert secret_variables(variables | others) == variables
    assert all(
        map(is_secret_key, ("token", "hf_token", "use_auth_token", "api_key", "aws_secret_access_key", "password"))
    )
    assert not any(map(is_secret_key, ("image_token", "pad_token", "max_new_tokens", "key", "do_resize")))


def test_a_fault_that_came_from_a_worker_process_has_no_secret() -> None:
    """Fault S-2: also where a library quotes an address that it has taken apart."""
    fault = RowFault(Stage.READ, "OSError", f"sftp://alice:{PASSWORD}@host/a: refused")
    assert fault.message == str(fault) == "sftp://***@host/a: refused"
    assert redacted("no bucket 'AKIA:ab/c@name' at 12:30@noon (a:b)") == "no bucket '***@name' at ***@noon (a:b)"
    assert redacted("'host:8080/a@b': refused") == "'host:8080/a@b': refused"
