# SPDX-License-Identifier: Apache-2.0
"""An S3 API of its own: moto, which checks every signature with botocore, in a
process that checks that what was signed is what came (s3_server.py)."""

import json
import os
import pathlib
import signal
import ssl
import subprocess
import sys
import urllib.request

import boto3

BUCKET = "weights"
_SERVER = pathlib.Path(__file__).with_name("s3_server.py")


def _allow(action, **more):
    statement = {"Effect": "Allow", "Action": action, **more}
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})


def _user(anybody):
    iam = boto3.client("iam", **anybody)
    iam.create_user(UserName="gradwire")
    iam.put_user_policy(
        UserName="gradwire",
        PolicyName="all",
        PolicyDocument=_allow("s3:*", Resource="*"),
    )
    return iam.create_access_key(UserName="gradwire")["AccessKey"]


def _role(anybody):
    iam = boto3.client("iam", **anybody)
    role = iam.create_role(
        RoleName="gradwire",
        AssumeRolePolicyDocument=_allow("sts:AssumeRole", Principal="*"),
    )
    iam.put_role_policy(
        RoleName="gradwire",
        PolicyName="all",
        PolicyDocument=_allow("s3:*", Resource="*"),
    )
    sts = boto3.client("sts", **anybody)
    return sts.assume_role(
        RoleArn=role["Role"]["Arn"], RoleSessionName="training"
    )["Credentials"]


class ObjectStore:
    """A bucket, keys that may use it, and a process that can be stopped.

    pki: a folder with server.pem, server.key and their ca.pem: it is reached by
    TLS alone. temporary: its keys have a session token.
    """

    def __init__(self, pki=None, temporary=False):
        files = [pki / "server.pem", pki / "server.key"] if pki else []
        self.process = subprocess.Popen(
            [sys.executable, _SERVER, *files],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.endpoint = self.process.stdout.readline().strip()
        assert self.endpoint, f"it ended with {self.process.wait()}"
        where = {
            "endpoint_url": self.endpoint,
            "region_name": "us-east-1",
            "verify": str(pki / "ca.pem") if pki else None,
        }
        anybody = {
            **where,
            "aws_access_key_id": "anybody",
            "aws_secret_access_key": "anybody",
        }
        boto3.client("s3", **anybody).create_bucket(Bucket=BUCKET)
        keys = (_role if temporary else _user)(anybody)
        self.key, self.secret = keys["AccessKeyId"], keys["SecretAccessKey"]
        self.token = keys.get("SessionToken")
        # From now on nobody comes in without a valid signature.
        urllib.request.urlopen(
            urllib.request.Request(
                f"{self.endpoint}/moto-api/reset-auth",
                data=b"0",
                headers={"Content-Type": "text/plain"},
            ),
            context=ssl.create_default_context(cafile=pki / "ca.pem")
            if pki
            else None,
        ).close()
        self.s3 = boto3.client(
            "s3",
            **where,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            aws_session_token=self.token,
        )

    def delay(self, **seconds):
        """Of requests for commit.json, by method (s3_server.py)."""
        body = json.dumps(seconds).encode()
        urllib.request.urlopen(
            f"{self.endpoint}/gradwire-delays", data=body
        ).close()

    def environment(self):
        token = {"AWS_SESSION_TOKEN": self.token} if self.token else {}
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": self.endpoint,
            **token,
        }

    def keys(self, prefix=""):
        pages = self.s3.get_paginator("list_objects_v2")
        return [
            entry["Key"]
            for page in pages.paginate(Bucket=BUCKET, Prefix=prefix)
            for entry in page.get("Contents", ())
        ]

    def get(self, key):
        return self.s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def put(self, key, content):
        self.s3.put_object(Bucket=BUCKET, Key=key, Body=content)

    def stop(self):
        """It takes connections and does not answer."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def go_on(self):
        os.kill(self.process.pid, signal.SIGCONT)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
