"""Reads access keys, region and endpoint of AWS's shared configuration files.

obstore itself reads environment variables, and asks the metadata services of EC2, ECS and EKS. It does not read
~/.aws/credentials and ~/.aws/config, which the AWS command line and boto3 read. This module reads the settings that
these files can hold as text. Profiles that need a login or another role (sso_*, role_arn, credential_process) are not
supported; `aws configure export-credentials --format env` prints variables for them.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from pathlib import Path

from prep.console import UserError

_KEYS = {  # key in the files -> setting of obstore's S3Store
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "region": "region",
    "endpoint_url": "endpoint",
}
_SECRETS = ("access_key_id", "secret_access_key", "session_token")
_VARIABLES = {  # setting -> environment variables that take precedence over the files
    "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    "endpoint": ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"),
}


def profile_settings(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Settings for S3Store from the profile AWS_PROFILE (default: `default`), without those that variables give.

    An access key in the environment replaces the keys of the profile, as in the AWS command line. Raises UserError if a
    file cannot be read, or if AWS_PROFILE names a profile that is in neither file.
    """
    profile = environment.get("AWS_PROFILE", "")
    home = Path(environment.get("HOME", "~")).expanduser()
    credentials = Path(environment.get("AWS_SHARED_CREDENTIALS_FILE", home / ".aws" / "credentials"))
    config = Path(environment.get("AWS_CONFIG_FILE", home / ".aws" / "config"))
    name = profile or "default"
    sections = [_section(config, name if name == "default" else f"profile {name}"), _section(credentials, name)]
    if profile and sections == [None, None]:
        raise UserError(
            f"AWS_PROFILE is {profile}, but neither {credentials} nor {config} has this profile. Correct the name, or "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    settings = {_KEYS[key]: value for section in sections for key, value in (section or {}).items() if key in _KEYS}
    if "AWS_ACCESS_KEY_ID" in environment:
        settings = {key: value for key, value in settings.items() if key not in _SECRETS}
    return {
        key: value
        for key, value in settings.items()
        if not any(variable in environment for variable in _VARIABLES.get(key, ()))
    }


def _section(path: Path, name: str) -> Mapping[str, str] | None:
    """The section `name` of a file, or None if there is no such file or section."""
    parser = configparser.RawConfigParser()
    try:
        parser.read(path, "utf-8")
    except (OSError, ValueError, configparser.Error) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read ({reason}). Correct the file, or set AWS_ACCESS_KEY_ID.") from None
    return parser[name] if parser.has_section(name) else None
