"""Reads access keys, region and endpoint from AWS's shared configuration files.

obstore, the library that reads and writes buckets, takes settings from environment variables and from the metadata
services of EC2, ECS and EKS. Unlike the AWS command line and boto3, obstore does not read ~/.aws/credentials and
~/.aws/config. This module reads these two files. Profiles that need a login or another role (sso_*, role_arn,
credential_process) are not supported. For such a profile, `aws configure export-credentials --format env` prints the
credentials as environment variables, which obstore reads.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Mapping
from pathlib import Path

from prep.console import UserError

_KEYS = {  # name of a setting in the files -> name of the setting of obstore's S3Store
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
    """Return settings for S3Store from the profile that AWS_PROFILE names, or from the profile `default`.

    A setting is left out if an environment variable gives it. If AWS_ACCESS_KEY_ID is in the environment, the access
    key, the secret key and the session token of the profile are left out, as in the AWS command line. Raises UserError
    if a file cannot be read, or if neither file has the profile that AWS_PROFILE names.
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
    """Return the section `name` of a file; None if the file or the section does not exist."""
    parser = configparser.RawConfigParser()
    try:
        parser.read(path, "utf-8")
    except (OSError, ValueError, configparser.Error) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read ({reason}). Correct the file, or set AWS_ACCESS_KEY_ID.") from None
    return parser[name] if parser.has_section(name) else None
