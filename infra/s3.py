"""An S3-compatible server for one machine: moto's, with one bucket and one user, in memory.

`python -m infra.s3 PORT` takes the user's key from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
Requests are checked for its signature. What it holds is gone when it ends.
"""

import json
import os
import sys

from infra.first_start import BUCKET, REGION

USER = "sdft"
ALLOWED = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}


def main() -> None:
    os.environ["INITIAL_NO_AUTH_ACTION_COUNT"] = "0"  # no request without a signature
    from moto import server
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.iam.models import iam_backends
    from moto.s3.models import s3_backends

    users = iam_backends[DEFAULT_ACCOUNT_ID]["aws"]
    users.create_user(REGION, USER)
    policy = {"Version": "2012-10-17", "Statement": [ALLOWED]}
    users.put_user_policy(USER, "all", json.dumps(policy))
    key = users.create_access_key(USER)
    users.access_keys.pop(key.physical_resource_id)
    key.access_key_id = os.environ["AWS_ACCESS_KEY_ID"]
    key.secret_access_key = os.environ["AWS_SECRET_ACCESS_KEY"]
    users.access_keys[key.physical_resource_id] = key
    s3_backends[DEFAULT_ACCOUNT_ID]["aws"].create_bucket(BUCKET, REGION)
    server.main(["--port", sys.argv[1]])


if __name__ == "__main__":
    main()
