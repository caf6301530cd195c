"""Profiles in AWS's shared configuration files are read as boto3 reads them."""

from __future__ import annotations

from pathlib import Path

import boto3
import pytest

from prep.console import UserError
from prep.remote.aws_profile import profile_settings

CREDENTIALS = """
[default]
aws_access_key_id = default-key
aws_secret_access_key = default-secret
[lab]
aws_access_key_id = lab-key
aws_secret_access_key = lab-secret%x
aws_session_token = lab-token
region = eu-north-1
"""
CONFIG = """
[default]
region = us-west-2
[profile lab]
region = eu-west-1
endpoint_url = http://minio:9000
s3 =
    max_concurrent_requests = 20
[profile place]
region = sa-east-1
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(CREDENTIALS)
    (tmp_path / ".aws" / "config").write_text(CONFIG)
    return tmp_path


@pytest.mark.parametrize("profile", ["", "default", "lab"])
@pytest.mark.parametrize("has_key", [False, True])
def test_keys_and_region_are_those_of_boto3(
    home: Path, monkeypatch: pytest.MonkeyPatch, profile: str, has_key: bool
) -> None:
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    environment = {"HOME": str(home), **({"AWS_PROFILE": profile} if profile else {})}
    if has_key:
        environment |= {"AWS_ACCESS_KEY_ID": "variable-key", "AWS_SECRET_ACCESS_KEY": "variable-secret"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    session = boto3.Session()
    expected = session.get_credentials()
    settings = profile_settings(environment)
    assert settings["region"] == session.region_name
    if has_key:
        assert expected.access_key == "variable-key"
        assert not {"access_key_id", "secret_access_key", "session_token"} & set(settings)
    else:
        assert settings["access_key_id"] == expected.access_key
        assert settings["secret_access_key"] == expected.secret_key
        assert settings.get("session_token") == expected.token


def test_variables_for_region_and_endpoint_replace_those_of_the_profile(home: Path) -> None:
    environment = {"HOME": str(home), "AWS_PROFILE": "lab"}
    assert profile_settings(environment)["endpoint"] == "http://minio:9000"
    environment |= {"AWS_DEFAULT_REGION": "x", "AWS_ENDPOINT_URL": "http://other:1"}
    assert set(profile_settings(environment)) == {"access_key_id", "secret_access_key", "session_token"}


def test_files_at_other_paths_are_read(home: Path) -> None:
    environment = {
        "HOME": "/nowhere",
        "AWS_SHARED_CREDENTIALS_FILE": str(home / ".aws" / "credentials"),
        "AWS_CONFIG_FILE": str(home / ".aws" / "config"),
        "AWS_PROFILE": "place",
    }
    assert profile_settings(environment) == {"region": "sa-east-1"}
    assert profile_settings({"HOME": "/nowhere"}) == {}


def test_a_profile_that_is_in_neither_file_is_an_error(home: Path) -> None:
    with pytest.raises(UserError, match=r"AWS_PROFILE is lib, but neither .*credentials nor .*config has this profile"):
        profile_settings({"HOME": str(home), "AWS_PROFILE": "lib"})


def test_a_file_that_cannot_be_parsed_is_an_error_of_one_line(home: Path) -> None:
    (home / ".aws" / "credentials").write_text("no section\n")
    with pytest.raises(UserError, match=r"credentials: cannot be read") as raised:
        profile_settings({"HOME": str(home)})
    assert "\n" not in str(raised.value)
