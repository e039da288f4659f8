"""Names of files: which are URLs, what they are normalised to, and which are refused, without repeating a secret."""

from __future__ import annotations

import pytest

from triptych.datasets.schema import InputError
from triptych.datasets.storage.access import absolute, find_files, is_there, open_input
from triptych.datasets.storage.filesystems import is_url


def refusal(function, *args):
    with pytest.raises(InputError) as refused:
        function(*args)
    assert "\n" not in str(refused.value)
    return str(refused.value)


class TestNames:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("s3://bucket/log", "s3://bucket/log"),
            ("S3A://bucket//log/./x/../y/", "s3://bucket/log/y"),
            ("s3://bucket", "s3://bucket"),
            ("s3://bucket/?region=eu-west-1&endpoint_override=http://h:1", "s3://bucket?region=eu-west-1&endpoint_override=http://h:1"),
            ("s3://bucket/day=?/x=1-?.parquet", "s3://bucket/day=?/x=1-?.parquet"),
            ("gcs://bucket/a%20b c", "gs://bucket/a%20b c"),
            ("hdfs://user@namenode:8020/log/", "hdfs://user@namenode:8020/log"),
            ("memory://log/", "memory://log"),
            ("file:///tmp/./x/", "/tmp/x"),
        ],
    )
    def test_urls_are_normalised(self, name, expected):
        assert is_url(name) and absolute(name) == expected and absolute(expected) == expected

    def test_local_paths_become_absolute(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", "/home/somebody")
        assert [absolute(name) for name in ("x/../y", ".", "~/x", "/a/b/")] == [f"{tmp_path}/y", str(tmp_path), "/home/somebody/x", "/a/b"]
        assert not any(map(is_url, ("x", "/a/b", "C:/x", "a:b", "s3:/bucket")))

    @pytest.mark.parametrize(
        "name",
        [
            "s3://AKIA:hidden@bucket/log",
            "s3://AKIA:hid/hidden@bucket/log",
            "s3://hidden@bucket/log",
            "s3://bucket:hidden/log",
            "s3://bucket/log?secret_key=hidden",
            "s3://bucket/log?region=x&X-Amz-Signature=hidden",
            "s3://bucket/log?endpoint_override=http://me:hidden@host",
            "gs://bucket/log?access_token=hidden",
            "https://me:hidden@host/log",
            "https://hidden@host/log",
            "https://host/log.parquet?sig=hidden",
            "hdfs://me:hidden@host/log",
            "az://container/log?sas_token=hidden",
        ],
    )
    @pytest.mark.parametrize("function", [absolute, is_there, open_input, lambda name: find_files("s3://bucket", name)])
    def test_credentials_are_refused_and_not_repeated(self, function, name):
        message = refusal(function, name)
        assert "hidden" not in message and message.startswith(
            f"{name[: name.index(':')]}://...: a URL must not hold credentials; put them into"
        )
        if name.startswith("s3:"):
            assert "AWS_ACCESS_KEY_ID" in message
        if name.startswith("gs:"):
            assert "GOOGLE_APPLICATION_CREDENTIALS" in message

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("s4q://bucket/log", "s4q://bucket: unknown scheme 's4q'; known are s3, gs, hdfs, file, http, https, memory, "),
            ("htps://host/log", "htps://host: unknown scheme 'htps' (did you mean 'https'?); known are s3, "),
            ("oci://container/log", "oci://container: the client for oci:// is not installed: Install ocifs to access"),
            ("s3:///log", "s3:///log: no bucket; write s3://BUCKET/FOLDER"),
            ("file://host/log", "file://host/log: files of another host; write file:///FOLDER"),
            ("s3://b/x?regoin=eu", "s3://b/x?regoin=eu: unknown option 'regoin' (did you mean 'region'?); s3:// has region, scheme, "),
            ("memory://x?a=1", "memory://x?a=1: unknown option 'a'; memory:// has none"),
        ],
    )
    @pytest.mark.parametrize("function", [absolute, open_input])
    def test_what_no_storage_understands(self, function, name, message):
        assert refusal(function, name).startswith(message)
