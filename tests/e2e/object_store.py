# SPDX-License-Identifier: Apache-2.0
"""An S3 API of its own: moto, which checks every signature with botocore."""

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request

import boto3

BUCKET = "weights"
_POLICY = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}],
}


class ObjectStore:
    """A bucket, keys that may use it, and a process that can be stopped."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        while "Running on" not in (line := self.process.stderr.readline()):
            assert line, f"moto ended with {self.process.wait()}"
        self.endpoint = line.split()[-1].removesuffix("\x1b[0m")
        # Its later lines must not fill the pipe.
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        any_key = {
            "endpoint_url": self.endpoint,
            "region_name": "us-east-1",
            "aws_access_key_id": "anybody",
            "aws_secret_access_key": "anybody",
        }
        boto3.client("s3", **any_key).create_bucket(Bucket=BUCKET)
        iam = boto3.client("iam", **any_key)
        iam.create_user(UserName="gradwire")
        iam.put_user_policy(
            UserName="gradwire",
            PolicyName="all",
            PolicyDocument=json.dumps(_POLICY),
        )
        key = iam.create_access_key(UserName="gradwire")["AccessKey"]
        self.key, self.secret = key["AccessKeyId"], key["SecretAccessKey"]
        # From now on nobody comes in without a valid signature.
        urllib.request.urlopen(
            urllib.request.Request(
                f"{self.endpoint}/moto-api/reset-auth",
                data=b"0",
                headers={"Content-Type": "text/plain"},
            )
        ).close()
        self.s3 = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
        )

    def environment(self):
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": self.endpoint,
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
